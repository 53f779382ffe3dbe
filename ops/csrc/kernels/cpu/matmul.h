// Dot products of a tile of weight rows with a block of tokens: the engine of linear.cc and moe.cc.
//
// ORDER       one F32x16 chain a (row, token): acc = fma(w[k..k+15], x[k..k+15], acc) in increasing k from zero, the last
//             vector filled up with zeros, then reduce_add. Every path below computes exactly this, whatever its blocking:
//             accumulators are kept whole between k blocks, never summed across them.
// TOKENS      are converted to float32 once and interleaved in panels of up to kPanel tokens, [K / 16][tokens][16]: the
//             streams of the inner loop are sequential and never collide in one cache set as rows of 16 KiB would.
// FEW TOKENS  (one panel) read the weights as they are, kGroup rows at once: memory is the bound.
// MANY        widen a k block of the tile to float32 in scratch and use it for every panel: fused multiply-adds are the
// bound.
#ifndef PADDLE_MIXTRAL_MATMUL_H_
#define PADDLE_MIXTRAL_MATMUL_H_

#include <omp.h>
#include <stdlib.h>

#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

// Registers: kGroup x kPanel accumulators, kGroup weights and a token (AVX-512 has 32 registers of one F32x16, AVX2 8).
#if defined(__AVX512F__)
constexpr int kPanel = 6;
constexpr int kGroup = 4;
#else
constexpr int kPanel = 3;
constexpr int kGroup = 2;
#endif
constexpr int kHalfTile = 16;          // a tile is two runs of up to 16 rows (the gate and the up rows of one slice)
constexpr int kTile = 2 * kHalfTile;   // rows
constexpr int kDepth = 32;             // vectors of a k block: kGroup + kPanel rows of it stay in the first-level cache
constexpr int kTilePanels = 16;        // panels of one task: its accumulators stay in the second-level cache
constexpr int64_t kBlockTokens = 512;  // tokens held as panels at once: bounds the workspace
constexpr int64_t kTileTokens = kTilePanels * kPanel;
// Floats a thread needs: accumulators, widened weights, sums.
constexpr int64_t kThreadScratch = kTile * kTileTokens * 16 + kTile * kDepth * 16 + kTile * kTileTokens;
// Multiply-adds below which waking a second thread costs more than it saves.
constexpr int64_t kWorthThreads = 1 << 16;

struct Scratch {
  float* data;
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(aligned_alloc(64, (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// A block of tokens in panels of equal size (within one); `vectors` = ceil(K / 16), zeros beyond K.
struct Tokens {
  float* data;  // count * vectors * 16
  int64_t count, vectors;

  int64_t panels() const { return (count + kPanel - 1) / kPanel; }
  int64_t begin(int64_t panel) const { return panel * count / panels(); }
  int width(int64_t panel) const { return static_cast<int>(begin(panel + 1) - begin(panel)); }
  const float* panel(int64_t p) const { return data + begin(p) * vectors * 16; }
  float* slot(int64_t token, int64_t vector) const {
    const int64_t p = ((token + 1) * panels() - 1) / count;
    return data + (begin(p) * vectors + vector * width(p) + token - begin(p)) * 16;
  }
};

inline int64_t vectors_of(int64_t k) { return (k + 15) / 16; }
inline int64_t equal_parts(int64_t total, int64_t largest) { return (total + largest - 1) / largest; }

template <class T>
inline F32x16 load_upto(const T* p, int64_t n) {
  return n >= 16 ? load(p) : load_partial(p, static_cast<int>(n));
}

// row_of(t): the K elements of token t of the block.
template <class RowOf>
void pack_tokens(const Tokens& x, int64_t K, RowOf row_of) {
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (x.count * K > kWorthThreads)
  for (int64_t t = 0; t < x.count; ++t) {
    const auto* row = row_of(t);
    for (int64_t v = 0; v < x.vectors; ++v) store(x.slot(t, v), load_upto(row + v * 16, K - v * 16));
  }
}

// Up to R rows, each K elements after the one before, with one panel of C tokens, straight from memory.
// sums[c * ld + r] for r < count.
template <class W, int R, int C>
void direct_dots(const W* rows, int count, int64_t K, const float* x, float* sums, int ld) {
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
      const F32x16 token = load(x + k * C + c * 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][c] = fma(w[r], token, acc[r][c]);
    }
  };
  const int64_t full = K & ~int64_t{15};
  for (int64_t k = 0; k < full; k += 16) step(k, [](const W* p) { return load(p); });
  if (full < K) step(full, [&](const W* p) { return load_partial(p, static_cast<int>(K - full)); });
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      if (r < count) sums[c * ld + r] = reduce_add(acc[r][c]);
}

// Adds `depth` vectors of kGroup widened rows, [depth][kGroup][16], and of a panel to their accumulators, [kGroup][C][16].
template <int C>
void widened_dots(const float* w, const float* x, int depth, float* accumulators) {
  F32x16 acc[kGroup][C];
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = load(accumulators + (r * C + c) * 16);
  for (int k = 0; k < depth; ++k) {
    F32x16 row[kGroup];
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) row[r] = load(w + (k * kGroup + r) * 16);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const F32x16 token = load(x + (k * C + c) * 16);
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) acc[r][c] = fma(row[r], token, acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(accumulators + (r * C + c) * 16, acc[r][c]);
}

// Calls body(integral constant of width) for a width in 1..kPanel.
template <int C>
struct Width {
  static constexpr int value = C;
};
template <class Body>
inline void with_width(int width, Body body) {
  switch (width) {
    case 1:
      return body(Width<1>());
    case 2:
      return body(Width<2>());
    case 3:
      return body(Width<3>());
#if defined(__AVX512F__)
    case 4:
      return body(Width<4>());
    case 5:
      return body(Width<5>());
    default:
      return body(Width<6>());
#else
    default:
      return;
#endif
  }
}

// Two runs of consecutive rows of K elements; a run may be empty.
template <class W>
struct Tile {
  const W* rows[2];
  int count[2];  // 0..kHalfTile
};

// sums [tokens of panels first..last-1][kTile]; the places of rows the tile does not have hold zeros.
template <class W>
void tile_dots(const Tile<W>& tile, int64_t K, const Tokens& x, int64_t first, int64_t last, float* scratch, float* sums) {
  const int64_t origin = x.begin(first), tokens = x.begin(last) - origin;
  memset(sums, 0, static_cast<size_t>(tokens * kTile) * sizeof(float));
  if (x.panels() == 1) {
    for (int half = 0; half < 2; ++half)
      with_width(x.width(0), [&](auto width) {
        constexpr int C = decltype(width)::value;
        constexpr int R = C <= 2 ? 2 * kGroup : kGroup;
        for (int r = 0; r < tile.count[half]; r += R) {
          const int left = tile.count[half] - r;
          direct_dots<W, R, C>(tile.rows[half] + r * K, left < R ? left : R, K, x.data, sums + half * kHalfTile + r, kTile);
        }
      });
    return;
  }
  float* accumulators = scratch;  // a group of rows after the other, in it a panel after the other: [kGroup][width][16]
  float* widened = scratch + kTile * kTileTokens * 16;
  memset(accumulators, 0, static_cast<size_t>(kTile * tokens * 16) * sizeof(float));
  for (int64_t v = 0; v < x.vectors; v += kDepth) {
    const int depth = static_cast<int>(x.vectors - v < kDepth ? x.vectors - v : kDepth);
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < kHalfTile; ++r) {
        const int place = half * kHalfTile + r;
        float* to = widened + (place / kGroup * kDepth * kGroup + place % kGroup) * 16;
        const W* from = tile.rows[half] + r * K;
        for (int k = 0; k < depth; ++k)
          store(to + k * kGroup * 16, r < tile.count[half] ? load_upto(from + (v + k) * 16, K - (v + k) * 16) : zero());
      }
    for (int64_t p = first; p < last; ++p)
      with_width(x.width(p), [&](auto width) {
        constexpr int C = decltype(width)::value;
        for (int group = 0; group < kTile / kGroup; ++group)
          widened_dots<C>(widened + group * kDepth * kGroup * 16, x.panel(p) + v * C * 16, depth,
                          accumulators + (group * tokens + x.begin(p) - origin) * kGroup * 16);
      });
  }
  for (int group = 0; group < kTile / kGroup; ++group)
    for (int64_t p = first; p < last; ++p) {
      const int64_t token = x.begin(p) - origin;
      const int width = x.width(p);
      const float* from = accumulators + (group * tokens + token) * kGroup * 16;
      for (int r = 0; r < kGroup; ++r)
        for (int c = 0; c < width; ++c)
          sums[(token + c) * kTile + group * kGroup + r] = reduce_add(load(from + (r * width + c) * 16));
    }
}

// Every tile of a weight with a block of tokens, on all threads. tile_of(i): tile i of `tiles`;
// finish(i, t, sums): takes the kTile sums of tile i and token t of the block.
template <class W, class TileOf, class Finish>
void matmul(const Tokens& x, int64_t K, int64_t tiles, float* scratch, TileOf tile_of, Finish finish) {
  const int64_t slices = equal_parts(x.panels(), kTilePanels), tasks = tiles * slices;
  // One panel: pieces long enough to stream, short enough that a thread held up elsewhere does not keep the others waiting.
  const int64_t piece = x.panels() == 1 ? 1 + tasks / (pm_num_threads() * 8) : 1;
#pragma omp parallel num_threads(pm_num_threads()) if (tiles * kTile * K * x.count > kWorthThreads)
  {
    float* mine = scratch + omp_get_thread_num() * kThreadScratch;
    float* sums = mine + kThreadScratch - kTile * kTileTokens;
#pragma omp for schedule(dynamic, piece)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t i = task / slices, slice = task % slices;
      const int64_t first = slice * x.panels() / slices, last = (slice + 1) * x.panels() / slices;
      tile_dots<W>(tile_of(i), K, x, first, last, mine, sums);
      for (int64_t t = x.begin(first); t < x.begin(last); ++t) finish(i, t, sums + (t - x.begin(first)) * kTile);
    }
  }
}

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

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_MATMUL_H_
