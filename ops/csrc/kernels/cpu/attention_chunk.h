// One chunk of positions against some query rows: scores, softmax and values of include/attention.h, and how chunks are
// merged. The chunk's keys and values are groups of sixteen rows; where a group lies is the caller's business.
#ifndef PADDLE_MIXTRAL_ATTENTION_CHUNK_H_
#define PADDLE_MIXTRAL_ATTENTION_CHUNK_H_

#include "../include/attention.h"
#include "columns.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int64_t kChunk = PM_ATTENTION_CHUNK;
constexpr int kGroup = 16;
constexpr int64_t kGroups = kChunk / kGroup;
// Scores of a row: sixteen more than positions, so that rows do not compete for the same cache sets.
constexpr int64_t kSpan = kChunk + 16;
constexpr int64_t kLine = 64;  // bytes of a cache line
// Groups scored at once, groups whose values are added at once, and how many groups before its use a group is fetched.
constexpr int kScored = 2, kAdded = 4, kAhead = 4;
// Query rows scored at once, rows whose values are added at once, and vectors of their sums.
#if defined(__AVX512F__)
constexpr int kRows = 8, kSumRows = 4, kSumVectors = 4;
#else
constexpr int kRows = 4, kSumRows = 2, kSumVectors = 2;
#endif

// gcc 12 keeps accumulators in memory where a kernel is inlined into a lambda.
#define PM_NOINLINE __attribute__((noinline))

template <int N>
struct Int {
  static constexpr int value = N;
};
// f(Int<rows>): 1..Most rows with their number known to the compiler.
template <int Most, class F>
inline void with_rows(int64_t rows, F f) {
  if (rows == Most)
    f(Int<Most>{});
  else if constexpr (Most > 1)
    with_rows<Most - 1>(rows, f);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What some rows have gathered of the positions seen so far: nothing yet, one chunk, or several merged.
struct Gathered {
  float *largest, *total, *sums;  // [rows], [rows], [rows, width]

  static int64_t floats(int64_t rows, int64_t width) { return 2 * round_up(rows, 16) + rows * width; }
  Gathered(float* memory, int64_t rows)
      : largest(memory), total(memory + round_up(rows, 16)), sums(total + round_up(rows, 16)) {}
  void clear(int64_t rows, int64_t width) const {
    for (int64_t r = 0; r < round_up(rows, 16); ++r) {
      largest[r] = -INFINITY;
      total[r] = 0.0f;
    }
    for (int64_t i = 0; i < rows * width; ++i) sums[i] = 0.0f;
  }
};

// Adds `next` to what rows first .. last - 1 have gathered; the order of additions is the order of these calls.
inline void merge(const Gathered& into, const Gathered& next, int64_t first, int64_t last, int64_t width) {
  for (int64_t begin = first / 16 * 16; begin < last; begin += 16) {
    const F32x16 before = load(into.largest + begin), here = load(next.largest + begin), most = max(before, here);
    const F32x16 keep = exp(sub(before, most)), take = exp(sub(here, most));
    const F32x16 total = fma(load(next.total + begin), take, mul(load(into.total + begin), keep));
    float lanes[4][16];
    store(lanes[0], most);
    store(lanes[1], total);
    store(lanes[2], keep);
    store(lanes[3], take);
    for (int64_t r = larger(begin, first); r < smaller(begin + 16, last); ++r) {
      into.largest[r] = lanes[0][r - begin];
      into.total[r] = lanes[1][r - begin];
      const F32x16 k = set1(lanes[2][r - begin]), t = set1(lanes[3][r - begin]);
      for (float *sum = into.sums + r * width, *end = sum + width, *add = next.sums + r * width; sum < end;
           sum += 16, add += 16)
        store(sum, fma(load(add), t, mul(load(sum), k)));
    }
  }
}

// Queries lie in blocks of kRows: q[d * kRows + r]. scores[r][0 .. 16 G - 1] = q[r] . keys * scale, summed in increasing d;
// the keys are used as they are turned into columns. Meanwhile the groups `ahead` are fetched.
template <int R, int G, class E>
PM_NOINLINE void score_rows(const float* q, const E* const* keys, const E* const* ahead, int64_t width, float scale,
                            float* scores) {
  F32x16 sums[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) sums[r][g] = zero();
  for (int64_t d = 0; d < width; d += kFourWords<E>) {
    const float* x = q + d * kRows;
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      F32x16 columns[kFourWords<E>];
      load_columns(keys[g] + d, width, columns);
      const char* fetched = reinterpret_cast<const char*>(ahead[g]) + d * kGroup * static_cast<int64_t>(sizeof(E));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) __builtin_prefetch(fetched + i * kLine, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < kFourWords<E>; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][g] = fma_scalar(x + i * kRows + r, columns[i], sums[r][g]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) store(scores + r * kSpan + g * kGroup, mul(sums[r][g], set1(scale)));
}

// packed[d * 16 G + k] = element d of key k, of G groups.
template <int G, class E>
void pack_keys(const E* const* keys, const E* const* ahead, int64_t width, float* packed) {
  for (int64_t d = 0; d < width; d += kFourWords<E>)
    for (int g = 0; g < G; ++g) {
      F32x16 columns[kFourWords<E>];
      load_columns(keys[g] + d, width, columns);
      const char* fetched = reinterpret_cast<const char*>(ahead[g]) + d * kGroup * static_cast<int64_t>(sizeof(E));
      for (int i = 0; i < 4; ++i) __builtin_prefetch(fetched + i * kLine, 0, 2);
      for (int i = 0; i < kFourWords<E>; ++i) store(packed + ((d + i) * G + g) * kGroup, columns[i]);
    }
}

// What score_rows does, with packed keys.
template <int R, int G>
PM_NOINLINE void score_packed(const float* q, const float* packed, int64_t width, float scale, float* scores) {
  F32x16 sums[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) sums[r][g] = zero();
  for (int64_t d = 0; d < width; ++d) {
    F32x16 keys[G];
    for (int g = 0; g < G; ++g) keys[g] = load(packed + (d * G + g) * kGroup);
    for (int r = 0; r < R; ++r) {
      const F32x16 x = set1(q[d * kRows + r]);
      for (int g = 0; g < G; ++g) sums[r][g] = fma(x, keys[g], sums[r][g]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) store(scores + r * kSpan + g * kGroup, mul(sums[r][g], set1(scale)));
}

// scores[from .. to - 1] become exp(score - largest); their sum with position j in lane j % 16.
inline void exponentials(float* scores, int64_t from, int64_t to, float& largest, float& total) {
  const int64_t begin = from / kGroup * kGroup, end = round_up(to, kGroup);
  for (int64_t j = begin; j < from; ++j) scores[j] = -INFINITY;
  for (int64_t j = to; j < end; ++j) scores[j] = -INFINITY;
  F32x16 most = load(scores + begin);
  for (int64_t j = begin + kGroup; j < end; j += kGroup) most = max(most, load(scores + j));
  largest = reduce_max(most);
  F32x16 sum = zero();
  for (int64_t j = begin; j < end; j += kGroup) {
    const F32x16 e = exp(sub(load(scores + j), set1(largest)));
    store(scores + j, e);
    sum = add(sum, e);
  }
  total = reduce_add(sum);
}

// sums[r][0 .. 32 P - 1] += weights[r][j] * value j, j = from .. to - 1 in this order, of the positions of some groups.
// Meanwhile the groups `ahead` are fetched.
template <int R, int P, bool Fetch, class V, class E>
PM_NOINLINE void add_rows(const float* weights, const V* const* values, const E* const* ahead, int64_t from, int64_t to,
                          float* sums, int64_t width) {
  F32x16 a[R][2 * P];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2 * P; ++c) a[r][c] = load(sums + r * width + 16 * c);
  for (int64_t j = from; j < to;) {
    const V* row = values[j / kGroup] + j % kGroup * width;
    const E* fetched = ahead[j / kGroup] + j % kGroup * width;
    for (const int64_t stop = smaller(to, (j / kGroup + 1) * kGroup); j < stop; ++j, row += width, fetched += width) {
      F32x16 v[2 * P];
      for (int c = 0; c < P; ++c) load_pair(row + 32 * c, v + 2 * c);
      if constexpr (Fetch)
        for (int c = 0; c < 32 * P; c += kLine / sizeof(E)) __builtin_prefetch(fetched + c, 0, 2);
      for (int r = 0; r < R; ++r) {
        const F32x16 w = set1(weights[r * kSpan + j]);
        for (int c = 0; c < 2 * P; ++c) a[r][c] = fma(w, v[c], a[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2 * P; ++c) store(sums + r * width + 16 * c, a[r][c]);
}

// The same for the whole width of any number of rows; the first of them fetch.
template <class V, class E>
void add_values(const float* weights, const V* const* values, const E* const* ahead, int64_t from, int64_t to, int64_t rows,
                float* sums, int64_t width) {
  constexpr int P = kSumVectors / 2;
  for (int64_t d = 0; d < width; d += 32 * P) {
    const V* at[kAdded];
    const E* next[kAdded];
    for (int g = 0; g < kAdded; ++g) {
      at[g] = values[g] + d;
      next[g] = ahead[g] + d;
    }
    for (int64_t r = 0; r < rows; r += kSumRows)
      with_rows<kSumRows>(smaller(kSumRows, rows - r), [&](auto block) {
        constexpr int R = decltype(block)::value;
        const float* w = weights + r * kSpan;
        float* sum = sums + r * width + d;
        if (d + 32 * P > width)
          add_rows<R, 1, true>(w, at, next, from, to, sum, width);
        else if (r == 0)
          add_rows<R, P, true>(w, at, next, from, to, sum, width);
        else
          add_rows<R, P, false>(w, at, next, from, to, sum, width);
      });
  }
}

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_ATTENTION_CHUNK_H_
