// Append attention: include/attention.h.
//
// Two steps: every token's rotary table, keys and values are written; then (key/value head, tile of query tokens) units are
// computed independently. In a unit, the query heads of all its tokens are rows against the same keys: all scores first
// (keys turned into columns, so a score is one running sum over D, whatever is computed beside it), then the softmax of each
// row with position p in lane p % 16, then the values in increasing position. No sum depends on the tiles.
#include "../include/attention.h"

#include <stdlib.h>

#include "dispatch.h"
#include "transpose.h"

namespace pm {
namespace PM_ISA {
namespace {

// Keys scored and values added at a time: two vectors of positions.
constexpr int kKeys = 32;
// Bytes of a cache line.
constexpr int64_t kLine = 64;
// Rows of a unit, so that a tile of keys is unpacked once for as many; fewer when their scores would pass kScoreFloats.
constexpr int64_t kRows = 64;
constexpr int64_t kScoreFloats = int64_t{1} << 20;
// Register tiles: rows and vectors of keys of the scores, and accumulators of the values.
#if defined(__AVX512F__)
constexpr int kBlockRows = 8, kBlockVectors = 2, kAccumulators = 16;
#else
constexpr int kBlockRows = 4, kBlockVectors = 1, kAccumulators = 4;
#endif

template <int N>
struct Int {
  static constexpr int value = N;
};
// f(Int<rows>): a block of 1..Most rows with their number known to the compiler.
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

template <class E>
struct Problem {
  const E* qkv;
  E *key_cache, *value_cache;
  const int32_t *cu_seqlens, *context_lens, *block_tables;
  E* out;
  int64_t T, B, M, Hq, Hkv, D, block_size, window;
  float scale;
  float* rotary;      // [T, D]: the D / 2 cosines, then the D / 2 sines of each token's position
  int64_t* tiles_to;  // [B + 1]: tiles of query tokens before sequence b

  int64_t group() const { return Hq / Hkv; }
  const E* qkv_row(int64_t t) const { return qkv + t * (Hq + 2 * Hkv) * D; }
  int64_t length(int64_t b) const { return cu_seqlens[b + 1] - cu_seqlens[b]; }
  // The first position that a query at `position` sees.
  int64_t first_seen(int64_t position) const { return window > 0 ? larger(0, position - window + 1) : 0; }
  // Elements of a cache before position j of sequence b, key/value head h.
  int64_t cache_offset(int64_t b, int64_t h, int64_t j) const {
    return ((block_tables[b * M + j / block_size] * Hkv + h) * block_size + j % block_size) * D;
  }
  // Scores a row of a unit has room for: positions up to `end`, from a multiple of 32 on, and 16 more so that rows do not
  // compete for the same cache sets.
  int64_t span(int64_t tokens, int64_t end) const {
    const int64_t all = round_up(end, kKeys);
    return 16 + (window > 0 ? smaller(all, round_up(window + tokens, kKeys) + kKeys) : all);
  }
  int64_t tile_tokens(int64_t b) const {
    int64_t tokens = smaller(length(b), larger(1, kRows / group()));
    const int64_t end = context_lens[b] + length(b);
    while (tokens > 1 && tokens * group() * span(tokens, end) > kScoreFloats) tokens /= 2;
    return tokens;
  }
};

// The last b with starts[b] <= x, of starts[0] .. starts[n]: whose x it is, when starts[0] <= x < starts[n].
template <class Index>
inline int64_t owner(const Index* starts, int64_t n, int64_t x) {
  int64_t low = 0;
  for (int64_t high = n; high - low > 1;) {
    const int64_t middle = (low + high) / 2;
    (starts[middle] <= x ? low : high) = middle;
  }
  return low;
}

// NeoX rotation of one head.
template <class In, class Out>
void rotate(const In* x, const float* rotary, Out* y, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int n = static_cast<int>(smaller(16, half - i));
    const auto part = [n](const auto* p) { return n == 16 ? load(p) : load_partial(p, n); };
    const F32x16 c = part(rotary + i), s = part(rotary + half + i), a = part(x + i), b = part(x + half + i);
    const F32x16 first = sub(mul(a, c), mul(b, s)), second = add(mul(b, c), mul(a, s));
    n == 16 ? store(y + i, first) : store_partial(y + i, first, n);
    n == 16 ? store(y + half + i, second) : store_partial(y + half + i, second, n);
  }
}

template <class E>
void append(const Problem<E>& p, const float* inv_freq, int64_t t) {
  const int64_t b = owner(p.cu_seqlens, p.B, t), D = p.D;
  const int64_t position = p.context_lens[b] + t - p.cu_seqlens[b];
  float* rotary = p.rotary + t * D;
  for (int64_t i = 0; i < D / 2; ++i) {
    const double angle = static_cast<float>(position) * inv_freq[i];  // float32, as Hugging Face has it
    rotary[i] = static_cast<float>(cos(angle));
    rotary[D / 2 + i] = static_cast<float>(sin(angle));
  }
  const E* key = p.qkv_row(t) + p.Hq * D;
  const E* value = key + p.Hkv * D;
  for (int64_t h = 0; h < p.Hkv; ++h) {
    const int64_t offset = p.cache_offset(b, h, position);
    rotate(key + h * D, rotary, p.key_cache + offset, D);
    memcpy(p.value_cache + offset, value + h * D, static_cast<size_t>(D) * sizeof(E));
  }
}

// The cache rows of positions j .. j + 31 of sequence b, head h. Positions outside first .. end - 1 repeat another's row: it
// is readable, and what is made of it is never used. Where no position is inside, `rows` stays as it was.
template <class E>
void find_rows(const Problem<E>& p, const E* cache, int64_t b, int64_t h, int64_t j, int64_t first, int64_t end,
               const E** rows) {
  const int64_t start = larger(j, first), stop = smaller(j + kKeys, end);
  for (int64_t i = start; i < stop;) {
    const E* row = cache + p.cache_offset(b, h, i);
    const int64_t page_end = smaller(stop, i + p.block_size - i % p.block_size);
    for (; i < page_end; ++i, row += p.D) rows[i - j] = row;
  }
  if (start >= stop) return;
  for (int64_t i = j; i < start; ++i) rows[i - j] = rows[start - j];
  for (int64_t i = stop; i < j + kKeys; ++i) rows[i - j] = rows[start - j];
}

// 32 keys as columns: packed[d * 32 + k] = rows[k][d].
template <class E>
void pack_keys(const E* const* rows, const E* const* ahead, int64_t D, float* packed) {
  for (int k = 0; k < kKeys; k += 16)
    for_columns(rows + k, ahead + k, D, [&](int64_t d, F32x16 column) { store(packed + d * kKeys + k, column); });
}

// What score_block does, for rows that are alone with these keys: they are used as they are turned.
template <int R, class E>
void score_alone(const float* q, const E* const* rows, const E* const* ahead, int64_t D, float scale, float* scores,
                 int64_t stride) {
  for (int k = 0; k < kKeys; k += 16) {
    F32x16 sums[R];
    for (int r = 0; r < R; ++r) sums[r] = zero();
    for_columns(rows + k, ahead + k, D, [&](int64_t d, F32x16 column) {
      for (int r = 0; r < R; ++r) sums[r] = fma(set1(q[r * D + d]), column, sums[r]);
    });
    for (int r = 0; r < R; ++r) store(scores + r * stride + k, mul(sums[r], set1(scale)));
  }
}

// scores[r][0 .. 31] = q[r] . keys * scale, summed in increasing d.
template <int R>
void score_block(const float* q, const float* packed, int64_t D, float scale, float* scores, int64_t stride) {
  for (int k = 0; k < kKeys; k += 16 * kBlockVectors) {
    F32x16 sums[R][kBlockVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = zero();
    for (int64_t d = 0; d < D; ++d) {
      F32x16 keys[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) keys[v] = load(packed + d * kKeys + k + 16 * v);
      for (int r = 0; r < R; ++r) {
        const F32x16 x = set1(q[r * D + d]);
        for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = fma(x, keys[v], sums[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kBlockVectors; ++v) store(scores + r * stride + k + 16 * v, mul(sums[r][v], set1(scale)));
  }
}

// scores[first .. last] become exp(score - largest); returns their sum, position p in lane p % 16.
inline float exponentials(float* scores, int64_t first, int64_t last) {
  const int64_t begin = first / 16 * 16, end = round_up(last + 1, 16);
  for (int64_t j = begin; j < first; ++j) scores[j] = -INFINITY;
  for (int64_t j = last + 1; j < end; ++j) scores[j] = -INFINITY;
  F32x16 most = load(scores + begin);
  for (int64_t j = begin + 16; j < end; j += 16) most = max(most, load(scores + j));
  const F32x16 largest = set1(reduce_max(most));
  F32x16 sums = zero();
  for (int64_t j = begin; j < end; j += 16) {
    const F32x16 e = exp(sub(load(scores + j), largest));
    store(scores + j, e);
    sums = add(sums, e);
  }
  return reduce_add(sums);
}

// sums[r][0 .. 16 C - 1] += weights[r][j] * rows[j][d ..], in increasing j. Meanwhile the rows `ahead`, unless null, are
// fetched.
template <int R, int C, class V>
void add_block(const float* weights, int64_t stride, const V* const* rows, const V* const* ahead, int64_t d, int64_t n,
               float* sums, int64_t width) {
  F32x16 a[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) a[r][c] = load(sums + r * width + d + 16 * c);
  for (int64_t j = 0; j < n; ++j) {
    F32x16 v[C];
    for (int c = 0; c < C; ++c) v[c] = load(rows[j] + d + 16 * c);
    for (int64_t c = 0; ahead && c < 16 * C; c += kLine / sizeof(V)) __builtin_prefetch(ahead[j] + d + c, 0, 2);
    for (int r = 0; r < R; ++r) {
      const F32x16 w = set1(weights[r * stride + j]);
      for (int c = 0; c < C; ++c) a[r][c] = fma(w, v[c], a[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(sums + r * width + d + 16 * c, a[r][c]);
}
constexpr int columns(int rows) {
  int c = 8;
  while (c > 1 && c * rows > kAccumulators) c /= 2;
  return c;
}
// The same for all the query heads of one token.
template <class V>
void add_values(const float* weights, int64_t stride, const V* const* rows, const V* const* ahead, int64_t n, int64_t heads,
                float* sums, int64_t width) {
  for (int64_t h = 0; h < heads; h += kBlockRows)
    with_rows<kBlockRows>(smaller(kBlockRows, heads - h), [&](auto block) {
      constexpr int R = decltype(block)::value, C = columns(R);
      int64_t d = 0;
      for (; d + 16 * C <= width; d += 16 * C)
        add_block<R, C>(weights + h * stride, stride, rows, h ? nullptr : ahead, d, n, sums + h * width, width);
      for (; d < width; d += 16)
        add_block<R, 1>(weights + h * stride, stride, rows, h ? nullptr : ahead, d, n, sums + h * width, width);
    });
}

// Where a unit keeps its floats.
struct Layout {
  int64_t q, scores, totals, sums, keys, values, all;
  Layout(int64_t rows, int64_t span, int64_t D) {
    const int64_t width = round_up(D, 16);
    q = 0;
    scores = q + round_up(rows * D, 16);
    totals = scores + rows * span;
    sums = totals + round_up(rows, 16);
    keys = sums + rows * width;
    values = keys + D * kKeys;
    all = values + kKeys * width;
  }
};

// Query tokens from `begin` on of sequence b, against key/value head kv.
template <class E>
void attend(const Problem<E>& p, int64_t b, int64_t begin, int64_t tokens, int64_t kv, float* scratch) {
  const int64_t D = p.D, width = round_up(D, 16), group = p.group(), rows = tokens * group;
  const int64_t position = p.context_lens[b] + begin, end = position + tokens;
  const int64_t base = p.first_seen(position) / kKeys * kKeys, span = p.span(tokens, end), t = p.cu_seqlens[b] + begin;
  const Layout at(rows, span, D);
  float *q = scratch + at.q, *scores = scratch + at.scores, *totals = scratch + at.totals, *sums = scratch + at.sums;
  float *keys = scratch + at.keys, *values = scratch + at.values;

  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t g = 0; g < group; ++g)
      rotate(p.qkv_row(t + i) + (kv * group + g) * D, p.rotary + (t + i) * D, q + (i * group + g) * D, D);

  const int64_t first = p.first_seen(position);
  const E *cached[kKeys], *next[kKeys];
  find_rows(p, p.key_cache, b, kv, base, first, end, next);
  for (int64_t j = base; j < end; j += kKeys) {
    memcpy(cached, next, sizeof cached);
    find_rows(p, p.key_cache, b, kv, j + kKeys, first, end, next);
    if (rows <= kBlockRows) {
      with_rows<kBlockRows>(rows, [&](auto block) {
        score_alone<decltype(block)::value>(q, cached, next, D, p.scale, scores + j - base, span);
      });
      continue;
    }
    pack_keys(cached, next, D, keys);
    for (int64_t r = 0; r < rows; r += kBlockRows) {
      const int64_t n = smaller(kBlockRows, rows - r);
      if (j > position + (r + n - 1) / group || j + kKeys <= p.first_seen(position + r / group)) continue;
      with_rows<kBlockRows>(n, [&](auto block) {
        score_block<decltype(block)::value>(q + r * D, keys, D, p.scale, scores + r * span + j - base, span);
      });
    }
  }

  for (int64_t i = 0; i < rows * width; ++i) sums[i] = 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t own = position + r / group;
    totals[r] = exponentials(scores + r * span, p.first_seen(own) - base, own - base);
  }

  const bool unpack = D % 16 != 0 || (sizeof(E) != sizeof(float) && tokens > 1);
  find_rows(p, p.value_cache, b, kv, base, first, end, next);
  for (int64_t j = base; j < end; j += kKeys) {
    memcpy(cached, next, sizeof cached);
    find_rows(p, p.value_cache, b, kv, j + kKeys, first, end, next);
    const bool paced = tokens == 1 && !unpack;  // else there is so much to do with these rows that the next come at once
    for (int k = 0; !paced && k < kKeys; ++k)
      for (int64_t d = 0; d < D; d += kLine / sizeof(E)) __builtin_prefetch(next[k] + d, 0, 2);
    const float* unpacked[kKeys];
    for (int k = 0; unpack && k < kKeys; ++k) {
      unpacked[k] = values + k * width;
      for (int64_t d = 0; d < width; d += 16) {
        const int n = static_cast<int>(smaller(16, D - d));
        store(values + k * width + d, n == 16 ? load(cached[k] + d) : load_partial(cached[k] + d, n));
      }
    }
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t from = larger(j, p.first_seen(position + i)), n = smaller(j + kKeys, position + i + 1) - from;
      if (n <= 0) continue;
      const float* weights = scores + i * group * span + from - base;
      if (unpack)
        add_values(weights, span, unpacked + (from - j), static_cast<const float* const*>(nullptr), n, group,
                   sums + i * group * width, width);
      else
        add_values(weights, span, cached + (from - j), paced ? next + (from - j) : nullptr, n, group,
                   sums + i * group * width, width);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    E* out = p.out + ((t + r / group) * p.Hq + kv * group + r % group) * D;
    for (int64_t d = 0; d < D; d += 16) {
      const int n = static_cast<int>(smaller(16, D - d));
      const F32x16 y = div(load(sums + r * width + d), set1(totals[r]));
      n == 16 ? store(out + d, y) : store_partial(out + d, y, n);
    }
  }
}

template <class E>
int run(Problem<E> p, double rope_theta) {
  float* inv_freq = static_cast<float*>(malloc(static_cast<size_t>(p.D / 2) * sizeof(float)));
  p.rotary = static_cast<float*>(malloc(static_cast<size_t>(p.T * p.D) * sizeof(float)));
  p.tiles_to = static_cast<int64_t*>(malloc(static_cast<size_t>(p.B + 1) * sizeof(int64_t)));
  int status = inv_freq && p.rotary && p.tiles_to ? PM_OK : PM_OUT_OF_MEMORY;
  int64_t floats = 0;
  if (status == PM_OK) {
    for (int64_t i = 0; i < p.D / 2; ++i)
      inv_freq[i] = static_cast<float>(pow(rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(p.D)));
    p.tiles_to[0] = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t length = p.length(b), tokens = length ? p.tile_tokens(b) : 1;
      p.tiles_to[b + 1] = p.tiles_to[b] + (length + tokens - 1) / tokens;
      if (length) floats = larger(floats, Layout(tokens * p.group(), p.span(tokens, p.context_lens[b] + length), p.D).all);
    }
    const int64_t tiles = p.tiles_to[p.B];
#pragma omp parallel num_threads(pm_num_threads())
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < p.T; ++t) append(p, inv_freq, t);
      float* scratch = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(round_up(floats, 16)) * sizeof(float)));
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < tiles * p.Hkv; ++unit) {
        if (!scratch) {
#pragma omp atomic write
          status = PM_OUT_OF_MEMORY;
          continue;
        }
        const int64_t tile = tiles - 1 - unit % tiles;  // the last tokens of a sequence have the most to read
        const int64_t b = owner(p.tiles_to, p.B, tile), tokens = p.tile_tokens(b);
        const int64_t begin = (tile - p.tiles_to[b]) * tokens;
        attend(p, b, begin, smaller(tokens, p.length(b) - begin), unit / tiles, scratch);
      }
      free(scratch);
    }
  }
  free(inv_freq);
  free(p.rotary);
  free(p.tiles_to);
  return status;
}

template <class E>
int append_attention_of(const void* qkv, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                        const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M,
                        int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window,
                        float scale) {
  return run(Problem<E>{static_cast<const E*>(qkv), static_cast<E*>(key_cache), static_cast<E*>(value_cache), cu_seqlens,
                        context_lens, block_tables, static_cast<E*>(out), T, B, M, Hq, Hkv, D, block_size, window, scale,
                        nullptr, nullptr},
             rope_theta);
}

}  // namespace

int append_attention(const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
                     const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M,
                     int64_t Hq, int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window, float scale,
                     void*) {
  if (T == 0) return PM_OK;
  const auto of = dtype == PM_BF16 ? append_attention_of<bf16> : append_attention_of<float>;
  return of(qkv, key_cache, value_cache, cu_seqlens, context_lens, block_tables, out, T, B, M, Hq, Hkv, D, block_size,
            rope_theta, window, scale);
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(append_attention,
          (const void* qkv, pm_dtype dtype, void* key_cache, void* value_cache, const int32_t* cu_seqlens,
           const int32_t* context_lens, const int32_t* block_tables, void* out, int64_t T, int64_t B, int64_t M, int64_t Hq,
           int64_t Hkv, int64_t D, int64_t block_size, double rope_theta, int64_t window, float scale, void* stream),
          (qkv, dtype, key_cache, value_cache, cu_seqlens, context_lens, block_tables, out, T, B, M, Hq, Hkv, D, block_size,
           rope_theta, window, scale, stream))
