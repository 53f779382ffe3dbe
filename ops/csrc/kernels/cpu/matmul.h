// Dot products of weight rows with tokens: the engine of linear.cc and moe.cc.
//
// ORDER       one F32x16 chain a (row, token): acc = fma(w[k..k+15], x[k..k+15], acc) in increasing k from zero, the last
//             vector filled up with zeros, then reduce_add. Blocking only chooses which chains run side by side.
// TOKENS      are converted to float32 once and interleaved in panels of up to kPanel tokens, [K / 16][tokens][16]: the
//             stream of the inner loop is sequential and never collides in one cache set as rows of 16 KiB would.
// WEIGHTS     are used as they come from memory, kGroup rows at once, by all the panels of a task while they are in cache.
#ifndef PADDLE_MIXTRAL_MATMUL_H_
#define PADDLE_MIXTRAL_MATMUL_H_

#include <stdlib.h>

#include "dispatch.h"

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
constexpr int kHalfTile = 16;               // a tile is two runs of up to 16 rows (the gate and the up rows of one slice)
constexpr int kTile = 2 * kHalfTile;        // rows
constexpr int kTaskPanels = 8;              // panels of one task: 768 KiB at K = 4096, for the second-level cache
constexpr int64_t kBlockFloats = 1 << 21;   // floats of a block of tokens, 8 MiB: for the third, and bounds the workspace
constexpr int64_t kWorthThreads = 1 << 17;  // multiply-adds below which waking a thread costs more than it saves

inline int64_t vectors_of(int64_t k) { return (k + 15) / 16; }
inline int64_t equal_parts(int64_t total, int64_t largest) { return (total + largest - 1) / largest; }
// Tokens of K elements that a block may hold: whole tasks.
inline int64_t block_tokens(int64_t K) {
  return equal_parts(kBlockFloats / K + 1, kTaskPanels * kPanel) * kTaskPanels * kPanel;
}

struct Scratch {
  float* data;
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(aligned_alloc(64, static_cast<size_t>(floats + 15) / 16 * 64))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// A block of tokens in panels of equal size (within one), zeros beyond K.
struct Tokens {
  float* data;             // count * vectors * 16
  int64_t count, vectors;  // vectors = ceil(K / 16)

  int64_t panels() const { return equal_parts(count, kPanel); }
  int64_t begin(int64_t panel) const { return panel * count / panels(); }
  int width(int64_t panel) const { return static_cast<int>(begin(panel + 1) - begin(panel)); }
  float* panel(int64_t p) const { return data + begin(p) * vectors * 16; }
  int64_t panel_of(int64_t token) const { return ((token + 1) * panels() - 1) / count; }
  float* slot(int64_t token, int64_t vector) const {
    const int64_t p = panel_of(token);
    return panel(p) + (vector * width(p) + token - begin(p)) * 16;
  }
};

template <class T>
inline F32x16 load_upto(const T* p, int64_t n) {
  return n >= 16 ? load(p) : load_partial(p, static_cast<int>(n));
}
template <class T>
inline void store_upto(T* p, F32x16 a, int64_t n) {
  n >= 16 ? store(p, a) : store_partial(p, a, static_cast<int>(n));
}

// row: the K elements of token t of the block.
template <class X>
void pack_token(const Tokens& x, int64_t t, const X* row, int64_t K) {
  float* to = x.slot(t, 0);
  const int64_t stride = x.width(x.panel_of(t)) * 16;
  for (int64_t v = 0; v < x.vectors; ++v) store(to + v * stride, load_upto(row + v * 16, K - v * 16));
}

// Up to R rows, each K elements after the one before, with a panel of C tokens: sums[c * kTile + r] for r < count.
template <int R, int C, class W>
void dots(const W* rows, int count, int64_t K, const float* panel, float* sums) {
  const W* row[R];
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
  const auto load_full = [](const W* from) __attribute__((always_inline)) { return load(from); };
  const int64_t full = K & ~int64_t{15};
  constexpr int64_t kLine = 64 / sizeof(W);  // elements of a cache line
  int64_t k = 0;
  for (; k + kLine <= full; k += kLine) {
    // The same place of the next R rows: no prefetcher in hardware follows so many short rows.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + k + R * K, 0, 2);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLine; i += 16) step(k + i, load_full);
  }
  for (; k < full; k += 16) step(k, load_full);
  if (k < K) step(k, [&](const W* from) { return load_partial(from, static_cast<int>(K - k)); });
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      if (r < count) sums[c * kTile + r] = reduce_add(acc[r][c]);
}

// The same for any width of a panel, 1..kPanel.
template <class W>
void dots(const W* rows, int count, int64_t K, const float* panel, int width, float* sums) {
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
template <class W>
void narrow_dots(const W* rows, int count, int64_t K, const float* panel, int width, float* sums) {
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

// Two runs of consecutive rows of K elements; a run may be empty.
template <class W>
struct Tile {
  const W* rows[2];
  int count[2];  // 0..kHalfTile
};

// Tile i of the N consecutive rows of w.
template <class W>
inline Tile<W> consecutive_tile(const W* w, int64_t N, int64_t K, int64_t i) {
  Tile<W> tile;
  for (int half = 0; half < 2; ++half) {
    const int64_t row = i * kTile + half * kHalfTile, left = N - row;
    tile.rows[half] = w + row * K;
    tile.count[half] = static_cast<int>(left < 0 ? 0 : left < kHalfTile ? left : kHalfTile);
  }
  return tile;
}

// sums [tokens of panels first..last-1][kTile]; the places of rows the tile does not have hold zeros.
template <class W>
void tile_dots(const Tile<W>& tile, int64_t K, const Tokens& x, int64_t first, int64_t last, float* sums) {
  const int64_t origin = x.begin(first);
  memset(sums, 0, static_cast<size_t>((x.begin(last) - origin) * kTile) * sizeof(float));
  const bool narrow = x.count <= kNarrow;
  const int step = narrow ? 2 * kGroup : kGroup;
  for (int half = 0; half < 2; ++half)
    for (int r = 0; r < tile.count[half]; r += step) {
      const W* rows = tile.rows[half] + r * K;
      const int count = tile.count[half] - r < step ? tile.count[half] - r : step;
      for (int64_t p = first; p < last; ++p) {
        float* to = sums + (x.begin(p) - origin) * kTile + half * kHalfTile + r;
        if (narrow)
          narrow_dots(rows, count, K, x.panel(p), x.width(p), to);
        else
          dots(rows, count, K, x.panel(p), x.width(p), to);
      }
    }
}

// Every tile of a weight with a block of tokens, on all threads. tile_of(i): tile i of `tiles`;
// finish(i, t, sums): takes the kTile sums of tile i with token t of the block.
template <class TileOf, class Finish>
void matmul(const Tokens& x, int64_t K, int64_t tiles, TileOf tile_of, Finish finish) {
  const int64_t slices = equal_parts(x.panels(), kTaskPanels), tasks = tiles * slices;
  // Pieces long enough to stream from memory, short enough that no thread waits long for one held up elsewhere.
  const int64_t piece = 1 + tasks / (pm_num_threads() * 16);
#pragma omp parallel for num_threads(pm_num_threads()) \
    schedule(dynamic, piece) if (tiles * kTile * K * x.count > kWorthThreads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t i = task / slices, slice = task % slices;
    const int64_t first = slice * x.panels() / slices, last = (slice + 1) * x.panels() / slices;
    alignas(64) float sums[kTile * kTaskPanels * kPanel];
    tile_dots(tile_of(i), K, x, first, last, sums);
    for (int64_t t = x.begin(first); t < x.begin(last); ++t) finish(i, t, sums + (t - x.begin(first)) * kTile);
  }
}

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_MATMUL_H_
