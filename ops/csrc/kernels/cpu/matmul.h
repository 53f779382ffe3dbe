// What every product of weights with tokens shares: the cut into tasks for threads, and scratch memory.
//
// WEIGHTS     come in tiles of kTile rows: matmul_float.h (rows of float32), matmul_bf16.h and matmul_int8.h (packed).
// TOKENS      come in blocks, cut into panels: as many tokens as a tile can be multiplied with in one go.
// A weight is read once a block, by all the panels of a task while it is in cache.
#ifndef PADDLE_MIXTRAL_MATMUL_H_
#define PADDLE_MIXTRAL_MATMUL_H_

#include <stdlib.h>

#include <type_traits>

#include "../include/quantize.h"
#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int kHalfTile = 16;              // a tile is two runs of 16 rows (the gate and the up rows of one slice)
constexpr int kTile = 2 * kHalfTile;       // rows
constexpr int kTileBytes = PM_TILE_BYTES;  // of a packed weight: 32 rows, and as many columns as that makes
static_assert(kTile == PM_TILE_ROWS, "packed weights have the same tiles");
constexpr int kTaskTokens = 48;  // of one task: 768 KiB of float32 at K = 4096, for the second-level cache
// Of a block of tokens, 8 MiB of float32: for the third-level cache, and bounds the workspace.
constexpr int64_t kBlockElements = 1 << 21;
constexpr int64_t kWorthThreads = 1 << 17;  // multiply-adds below which waking a thread costs more than it saves

inline int64_t equal_parts(int64_t total, int64_t largest) { return (total + largest - 1) / largest; }
// Tokens of K elements that a block may hold: whole tasks.
inline int64_t block_tokens(int64_t K) { return equal_parts(kBlockElements / K + 1, kTaskTokens) * kTaskTokens; }

template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count)
      : data(static_cast<T*>(aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

template <class T>
inline F32x16 load_upto(const T* p, int64_t n) {
  return n >= 16 ? load(p) : load_partial(p, static_cast<int>(n));
}
template <class T>
inline void store_upto(T* p, F32x16 a, int64_t n) {
  n >= 16 ? store(p, a) : store_partial(p, a, static_cast<int>(n));
}

// `count` tokens in panels of equal size (within one), none wider than `widest`.
struct Panels {
  int64_t count;
  int widest;

  int64_t number() const { return equal_parts(count, widest); }
  int64_t begin(int64_t panel) const { return panel * count / number(); }
  int width(int64_t panel) const { return static_cast<int>(begin(panel + 1) - begin(panel)); }
  int height() const { return static_cast<int>(equal_parts(count, number())); }  // the largest width
  int64_t of(int64_t token) const { return ((token + 1) * number() - 1) / count; }
};

// kernel(width), as a constant; 1 <= width <= Widest.
template <int Widest, class Kernel>
inline void of_width(int width, Kernel kernel) {
  if constexpr (Widest > 1)
    if (width < Widest) return of_width<Widest - 1>(width, kernel);
  kernel(std::integral_constant<int, Widest>());
}

constexpr int kPage = 4096;       // bytes
constexpr int kStreamStep = 128;  // bytes of a tile that are multiplied at a time: one word of each of its rows

// The processor's own prefetch of one long stream is the fastest there is, but it stops where a page of 4 KiB ends, and, if
// the memory lies in such pages, waits for the next one's translation. So the next page's first lines are asked for.
inline void prefetch_next_page(const void* w) {
  for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(w) + kPage + line * 64, 0, 2);
}

// At step number `step` of a strip of tiles, at w, with that many accumulators for each of its two lines: few wait for
// memory; more keep it waiting, and the processor's prefetch stops.
template <int Sums>
inline void prefetch_stream(const void* w, int64_t step) {
  if constexpr (Sums >= 8) {
    for (int line = 0; line < 2; ++line) __builtin_prefetch(static_cast<const char*>(w) + 2 * kPage + line * 64, 0, 2);
  } else if (step % (kPage / kStreamStep) == 0) {
    prefetch_next_page(w);
  }
}

// Converts every token of a block to what the product takes; row(t): the K elements of token t.
template <class Tokens, class Row>
void pack_tokens(const Tokens& tokens, Row row) {
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (tokens.panels.count * tokens.K > kWorthThreads)
  for (int64_t t = 0; t < tokens.panels.count; ++t) tokens.pack(t, row(t));
}

// Every tile of a weight with a block of tokens, on all threads. product.multiply(begin, end, first, last, sums): tiles
// begin..end-1, at most task_tiles(tiles) of them, with the tokens of panels first..last-1, at most task_panels(), to sums
// [tile][panel][height()][kTile], of kTaskSums at most; finish(i, t, sums): takes the kTile sums of tile i with token t.
template <class Product, class Finish>
void matmul(const Product& product, int64_t tiles, Finish finish) {
  const Panels& panels = product.tokens.panels;
  const int64_t runs = equal_parts(tiles, product.task_tiles(tiles));
  const int64_t slices = equal_parts(panels.number(), product.task_panels()), tasks = runs * slices;
  // Pieces long enough to stream from memory, short enough that no thread waits long for one held up elsewhere.
  const int64_t piece = 1 + tasks / (pm_num_threads() * 16);
#pragma omp parallel for num_threads(pm_num_threads()) \
    schedule(dynamic, piece) if (tiles * kTile * product.tokens.K * panels.count > kWorthThreads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t run = task / slices, slice = task % slices;
    const int64_t begin = run * tiles / runs, end = (run + 1) * tiles / runs;
    const int64_t first = slice * panels.number() / slices, last = (slice + 1) * panels.number() / slices;
    alignas(64) float sums[Product::kTaskSums];
    product.multiply(begin, end, first, last, sums);
    const float* of_panel = sums;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t p = first; p < last; ++p, of_panel += panels.height() * kTile)
        for (int64_t t = panels.begin(p); t < panels.begin(p + 1); ++t)
          finish(i, t, of_panel + (t - panels.begin(p)) * kTile);
  }
}

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_MATMUL_H_
