// A tile of attention: 16 rows (one query head at one position each) of one warp against 64 keys and values of one head.
//
// ORDER       This is where the order of attention's sums on a GPU is fixed, for decodes and for long chunks alike.
// Positions
//             are cut at multiples of 64 (a tile) and of 256 (a chunk), wherever a sequence, a window or a launch begins.
//             A tile's scores are mma in increasing d, its values mma in increasing position; a row's chunk is its tiles
//             merged one by one in increasing order, and the row is its chunks merged likewise, both by `merge` from
//             nothing. A row of a mma depends on that row alone, and a tile that a row does not see merges as nothing, bit
//             for bit: so it makes no difference whether a warp skips it, or which rows share a warp.
// ROUNDING    Queries (after rotation) and the tile's weights, 2^(score - largest of the tile), are rounded to the
//             activations' type for mma; scores, the weights' sum, and all accumulators are float32. Scores are in units of
//             ln 2: scaled by scale * log2(e).
// SOURCE      Dao, FlashAttention-2, arXiv:2307.08691; the fixed cut of the keys is this project's (law 1)
#ifndef PADDLE_MIXTRAL_CUDA_ATTENTION_TILE_CUH_
#define PADDLE_MIXTRAL_CUDA_ATTENTION_TILE_CUH_

#include <math.h>

#include <type_traits>

#include "ptx.cuh"
#include "vector.cuh"

namespace pm::cuda::attention {

constexpr int kTile = 64, kHalf = kTile / 2, kChunkTiles = 4, kChunk = kChunkTiles * kTile;
constexpr int kRows = 16;  // of a warp

// A softmax over some positions: the largest score, the sum of 2^(score - largest); of no position at all, this.
struct Softmax {
  float largest = -INFINITY, sum = 0.0f;
};

// What two parts' sums are multiplied by when they are added.
struct Merge {
  float largest, first, second;
  __device__ __forceinline__ Merge(float a, float b) {
    largest = fmaxf(a, b);
    const float origin = largest == -INFINITY ? 0.0f : largest;
    first = exp2f(__fsub_rn(a, origin));
    second = exp2f(__fsub_rn(b, origin));
  }
  __device__ __forceinline__ float operator()(float a, float b) const { return __fmaf_rn(b, second, __fmul_rn(a, first)); }
};

// Merges `part` into `all`; what the values' sums are merged by.
__device__ __forceinline__ Merge merge(Softmax& all, const Softmax& part) {
  const Merge by(all.largest, part.largest);
  all.sum = by(all.sum, part.sum);
  all.largest = by.largest;
  return by;
}

// The first position that a query at `position` sees.
__device__ __forceinline__ int first_seen(int position, int window) {
  return window > 0 ? max(0, position - window + 1) : 0;
}

// Keys or values in shared memory, rows of Width elements: where the 16 bytes `unit` of a row are, so that the eight rows
// that ldmatrix reads at once lie in different banks.
template <int Width>
__device__ __forceinline__ int place(int row, int unit) {
  constexpr int kUnits = Width / 8, kRowsOfALine = kUnits < 8 ? 8 / kUnits : 1;
  return row * Width + (unit ^ (row / kRowsOfALine % (kUnits < 8 ? kUnits : 8))) * 8;
}

// The pages of one sequence's cache, for one key/value head. Positions outside first .. end - 1 read as zeros, and their
// pages are not looked at.
struct Pages {
  static constexpr uint32_t kNone = ~0u;
  const int32_t* table;
  uint32_t page, head, row;  // in eights of elements: a page's, those before this head's in a page, a row's
  int block_size, first, end;

  // Eights of elements before a position's row: of caches up to 2^35 elements.
  __device__ __forceinline__ uint32_t offset(int position) const {
    if (position < first || position >= end) return kNone;
    const int index = position / block_size;
    return static_cast<uint32_t>(table[index]) * page + head + static_cast<uint32_t>(position - index * block_size) * row;
  }
};

// The warp fetches Rows rows (16 or 32) of `cache` into `shared` from row `to` on: lane i % Rows brings row i's offset.
template <int Width, int Rows, class Element>
__device__ __forceinline__ void fetch(const Pages& pages, const Element* cache, uint32_t mine, Element* shared, int to) {
  constexpr int kUnits = Width / 8, kAtOnce = 32 / kUnits;
  const int lane = static_cast<int>(threadIdx.x % 32), unit = lane % kUnits;
#pragma unroll
  for (int i = 0; i < Rows; i += kAtOnce) {
    const int row = i + lane / kUnits;
    const uint32_t offset = __shfl_sync(~0u, mine, row);
    const bool valid = offset != Pages::kNone && unit < static_cast<int>(pages.row);
    cp_async_16(shared + place<Width>(to + row, unit), valid ? cache + (int64_t{offset} + unit) * 8 : cache, valid);
  }
}

// One warp's rows: lane 4 g + t of the warp holds what belongs to rows g and g + 8.
template <class Element, int Width>
struct Rows {
  uint32_t q[Width / 16][4];  // as A of mma
  int position[2];            // of rows g and g + 8; -1: there is no such row
  int window;

  // Row g + 8 i sees position first(i) and on, up to its own.
  __device__ __forceinline__ int first(int i) const { return first_seen(position[i], window); }

  // Row g is at `low`, row g + 8 at `high` (null: none), of D elements.
  __device__ __forceinline__ void load(const Element* low, const Element* high, int D) {
    const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int k = 0; k < Width / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Element* const row = i % 2 ? high : low;
        const int d = 16 * k + 8 * (i / 2) + 2 * t;
        q[k][i] = row && d < D ? *reinterpret_cast<const uint32_t*>(row + d) : 0u;
      }
  }
};

// Scores of 64 keys, 32 at each of `keys`: s[n] are keys 8 n .. 8 n + 7, as D of mma.
template <class Element, int Width>
__device__ __forceinline__ void score(const Rows<Element, Width>& rows, const Element* const (&keys)[2],
                                      float (&s)[kTile / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane % 8 + lane / 16 * 8, unit = lane / 8 % 2;
#pragma unroll
  for (int n = 0; n < kTile / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[2 * n][i] = s[2 * n + 1][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < Width / 16; ++k) {
      uint32_t b[4];
      ldmatrix_x4(b, keys[n / 2] + place<Width>(n % 2 * 16 + row, 2 * k + unit));
      mma_m16n8k16<Element>(s[2 * n], rows.q[k], {b[0], b[1]}, s[2 * n]);
      mma_m16n8k16<Element>(s[2 * n + 1], rows.q[k], {b[2], b[3]}, s[2 * n + 1]);
    }
  }
}

// Scores of positions from `start` on become weights: weights[n] are of keys 16 n .. 16 n + 15, as A of mma, and
// parts[0 .. 1] the softmax of rows g and g + 8. Where not `all_seen`, rows see what they see.
template <class Element, int Width>
__device__ __forceinline__ void soften(const Rows<Element, Width>& rows, float (&s)[kTile / 8][4], float scale, int start,
                                       bool all_seen, uint32_t (&weights)[kTile / 16][4], Softmax (&parts)[2]) {
  const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = -INFINITY;
    const int first = rows.first(row);
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = start + 8 * n + 2 * t + i;
        float& x = s[n][2 * row + i];
        x = all_seen || (key >= first && key <= rows.position[row]) ? __fmul_rn(x, scale) : -INFINITY;
        largest = fmaxf(largest, x);
      }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const float origin = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * row + i];
        x = exp2f(__fsub_rn(x, origin));
        sum = __fadd_rn(sum, x);
      }
      weights[n / 2][n % 2 * 2 + row] = pack_two<Element>(s[n][2 * row], s[n][2 * row + 1]);
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
    parts[row].largest = largest;
    parts[row].sum = sum;
  }
}

// take(n, o): o is the weighted sum of 64 values, 32 at each of `values`, elements 8 n .. 8 n + 7, as D of mma. keep(word,
// key) is what is left of values key and key + 1 (in the lower and the upper half of a word).
template <class Element, int Width, class Keep, class Take>
__device__ __forceinline__ void add_values(const uint32_t (&weights)[kTile / 16][4], const Element* const (&values)[2],
                                           Keep keep, Take take) {
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane % 16, unit = lane / 16, t = lane % 4;
#pragma unroll
  for (int n = 0; n < Width / 8; n += 2) {
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values[k / 2] + place<Width>(k % 2 * 16 + row, n + unit));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = keep(b[i], 16 * k + i % 2 * 8 + 2 * t);
      mma_m16n8k16<Element>(low, weights[k], {b[0], b[1]}, low);
      mma_m16n8k16<Element>(high, weights[k], {b[2], b[3]}, high);
    }
    take(n, low);
    take(n + 1, high);
  }
}

// add_values, of values all of which every row sees, or whose unseen ones are numbers: their weights are zeros.
template <class Element, int Width, class Take>
__device__ __forceinline__ void add_values(const uint32_t (&weights)[kTile / 16][4], const Element* const (&values)[2],
                                           Take take) {
  add_values<Element, Width>(weights, values, [](uint32_t word, int) { return word; }, take);
}

// add_values, of positions from `start` on, some of which are not seen by some row and may be no number (zero times which
// is not zero): each row by itself, with zeros for what it does not see. The same bits, where all are numbers. take(n, o, i)
// is of row g + 8 i alone.
template <class Element, int Width, class Take>
__device__ __forceinline__ void add_seen_values(const Rows<Element, Width>& rows, int start,
                                                const uint32_t (&weights)[kTile / 16][4], const Element* const (&values)[2],
                                                Take take) {
  const int g = static_cast<int>(threadIdx.x % 32 / 4);
#pragma unroll 1
  for (int row = 0; row < kRows; ++row) {
    const int position = __shfl_sync(~0u, row < 8 ? rows.position[0] : rows.position[1], row % 8 * 4);
    const int first = first_seen(position, rows.window) - start, last = position - start;
    const auto seen = [&](uint32_t word, int key) {
      const uint32_t low = key >= first && key <= last ? 0xffffu : 0,
                     high = key + 1 >= first && key + 1 <= last ? ~0xffffu : 0;
      return word & (low | high);
    };
    add_values<Element, Width>(weights, values, seen, [&](int n, const float (&o)[4]) {
      if (row == g) take(n, o, 0);
      if (row == g + 8) take(n, o, 1);
    });
  }
}

// Whether all of Count elements are numbers.
template <int Count, class Element>
__device__ __forceinline__ bool are_numbers(const Element* values) {
  constexpr uint32_t kExponent = std::is_same_v<Element, __half> ? 0x7c00u : 0x7f80u;
  bool numbers = true;
  for (int i = static_cast<int>(threadIdx.x % 32) * 8; i < Count; i += 32 * 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(values + i);
    for (const uint32_t word : {words.x, words.y, words.z, words.w})
      numbers = numbers && (word & kExponent) != kExponent && (word >> 16 & kExponent) != kExponent;
  }
  return __all_sync(~0u, numbers);
}

}  // namespace pm::cuda::attention
#endif  // PADDLE_MIXTRAL_CUDA_ATTENTION_TILE_CUH_
