// Dot products of rows of float32 weights with tokens in float32.
//
// ORDER       one F32x16 chain a (row, token): acc = fma(w[k..k+15], x[k..k+15], acc) in increasing k from zero, the last
//             vector filled up with zeros, then reduce_add. Blocking only chooses which chains run side by side.
// TOKENS      are interleaved in panels, [K / 16][tokens][16]: the stream of the inner loop is sequential and never
//             collides in one cache set as rows of 16 KiB would.
// WEIGHTS     are used as they come from memory, kGroup rows at once.
#ifndef PADDLE_MIXTRAL_MATMUL_FLOAT_H_
#define PADDLE_MIXTRAL_MATMUL_FLOAT_H_

#include "matmul.h"

namespace pm {
namespace PM_ISA {
namespace {

// Registers: kGroup x kPanel accumulators, kGroup weights and a token (AVX-512 has 32 of one F32x16, AVX2 has room for 8).
// Panels of up to kNarrow tokens leave room for twice the rows.
#if defined(__AVX512F__)
constexpr int kPanel = 6, kGroup = 4, kNarrow = 3;
#else
constexpr int kPanel = 3, kGroup = 2, kNarrow = 1;
#endif

// A block of tokens of K elements, zeros beyond K up to a whole number of vectors.
struct FloatTokens {
  float* data;
  Panels panels;
  int64_t K;

  // Elements of `data` for so many tokens.
  static int64_t elements(int64_t count, int64_t K) { return count * equal_parts(K, 16) * 16; }
  FloatTokens(float* data_, int64_t count, int64_t K_) : data(data_), panels{count, kPanel}, K(K_) {}

  const float* panel(int64_t p) const { return data + elements(panels.begin(p), K); }
  // row: the K elements of token t.
  template <class X>
  void pack(int64_t t, const X* row) const {
    const int64_t p = panels.of(t), stride = panels.width(p) * 16;
    float* to = data + elements(panels.begin(p), K) + (t - panels.begin(p)) * 16;
    for (int64_t k = 0; k < K; k += 16, to += stride) store(to, load_upto(row + k, K - k));
  }
};

struct FloatScratch {
  Scratch<float> data;
  FloatScratch(int64_t count, int64_t K) : data(FloatTokens::elements(count, K)) {}
  bool failed() const { return !data.data; }
  FloatTokens block(int64_t count, int64_t K) const { return {data.data, count, K}; }
};

// Up to R rows, each K elements after the one before, with a panel of C tokens: sums[c * kTile + r] for r < count.
template <int R, int C>
void dots(const float* rows, int count, int64_t K, const float* panel, float* sums) {
  const float* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows + (r < count ? r : count - 1) * K;
  F32x16 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  const auto step = [&](int64_t k, auto load_row) __attribute__((always_inline)) {
    F32x16 w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = load_row(row[r] + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const F32x16 token = load(panel + k * C + c * 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][c] = fma(w[r], token, acc[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    // The same place of the next R rows: no prefetcher in hardware follows so many short rows.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + k + R * K, 0, 2);
    step(k, [](const float* from) __attribute__((always_inline)) { return load(from); });
  }
  if (k < K) step(k, [&](const float* from) { return load_partial(from, static_cast<int>(K - k)); });
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      if (r < count) sums[c * kTile + r] = reduce_add(acc[r][c]);
}

// The same for any width of a panel, 1..kPanel.
inline void dots(const float* rows, int count, int64_t K, const float* panel, int width, float* sums) {
  switch (width) {
    case 1:
      return dots<kGroup, 1>(rows, count, K, panel, sums);
    case 2:
      return dots<kGroup, 2>(rows, count, K, panel, sums);
    case 3:
      return dots<kGroup, 3>(rows, count, K, panel, sums);
#if defined(__AVX512F__)
    case 4:
      return dots<kGroup, 4>(rows, count, K, panel, sums);
    case 5:
      return dots<kGroup, 5>(rows, count, K, panel, sums);
    case 6:
      return dots<kGroup, 6>(rows, count, K, panel, sums);
#endif
  }
}

// The same for twice the rows and a panel of 1..kNarrow tokens.
inline void narrow_dots(const float* rows, int count, int64_t K, const float* panel, int width, float* sums) {
  switch (width) {
    case 1:
      return dots<2 * kGroup, 1>(rows, count, K, panel, sums);
#if defined(__AVX512F__)
    case 2:
      return dots<2 * kGroup, 2>(rows, count, K, panel, sums);
    case 3:
      return dots<2 * kGroup, 3>(rows, count, K, panel, sums);
#endif
  }
}

// The product of N rows of K weights, or of two such runs half a tile of each at a time.
struct FloatProduct {
  const FloatTokens& tokens;
  const float* rows[2];  // of the first and the second half of tile 0
  int64_t N;             // rows of each run
  int64_t step;          // rows from a half tile to the same half of the next tile

  FloatProduct(const FloatTokens& tokens_, const float* w, int64_t N_)
      : tokens(tokens_), rows{w, w + kHalfTile * tokens_.K}, N(N_), step(kTile) {}
  // Tile i: kHalfTile rows from each of two runs of N.
  FloatProduct(const FloatTokens& tokens_, const float* first, const float* second, int64_t N_)
      : tokens(tokens_), rows{first, second}, N(N_), step(kHalfTile) {}

  static constexpr int kTaskSums = kTile * kTaskTokens;
  int64_t task_tiles(int64_t) const { return 1; }
  int64_t task_panels() const { return kTaskTokens / kPanel; }

  // Tile i; the sums of rows it does not have are zeros.
  void multiply(int64_t i, int64_t, int64_t first, int64_t last, float* sums) const {
    const Panels& panels = tokens.panels;
    const int64_t K = tokens.K, sums_of_panel = panels.height() * kTile;
    memset(sums, 0, static_cast<size_t>((last - first) * sums_of_panel) * sizeof(float));
    const bool narrow = panels.count <= kNarrow;
    const int at_once = narrow ? 2 * kGroup : kGroup;
    for (int half = 0; half < 2; ++half) {
      const int64_t row = i * step + (step == kTile ? half * kHalfTile : 0);
      const float* w = rows[half] + i * step * K;
      for (int64_t r = 0; r < kHalfTile && row + r < N; r += at_once) {
        const int count = static_cast<int>(N - row - r < at_once ? N - row - r : at_once);
        for (int64_t p = first; p < last; ++p) {
          float* to = sums + (p - first) * sums_of_panel + half * kHalfTile + r;
          if (narrow)
            narrow_dots(w + r * K, count, K, tokens.panel(p), panels.width(p), to);
          else
            dots(w + r * K, count, K, tokens.panel(p), panels.width(p), to);
        }
      }
    }
  }
};

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_MATMUL_FLOAT_H_
