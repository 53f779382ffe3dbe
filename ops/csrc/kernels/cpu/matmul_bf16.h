// Products of packed bfloat16 weights with tokens in bfloat16: include/linear.h defines them, quantize.h the packing.
//
// ORDER       one float32 chain a (row, token), from zero over the pairs of columns k = 0, 2, ... in increasing order:
//             sum = fma(w[k + 1], x[k + 1], sum), then sum = fma(w[k], x[k], sum); zeros beyond K. vdpbf16ps does so with a
//             pair (Intel's manual, volume 2, and so did the processor this was tried on, with 10^8 pairs), hence the unit
//             and multiply-adds give the same bits.
// DENORMALS   are zeros of their sign, as operands and as sums: the unit knows no others. MXCSR tells multiply-adds so.
// WEIGHTS     lie in the lanes, a row each, and a token's pair is the same for all: nothing is summed across lanes, and a
//             strip of tiles is one stream.
// UNITS       avx512_bf16 where the processor has it (has_bf16_unit), else multiply-adds. Where it has tiles of bfloat16
//             (has_bf16_tiles), matmul_bf16_tiles.h does all of this, in its own order.
#ifndef PADDLE_MIXTRAL_MATMUL_BF16_H_
#define PADDLE_MIXTRAL_MATMUL_BF16_H_

#include <xmmintrin.h>

#include "matmul.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int kPairs = PM_TILE_WORDS;            // of columns, side by side for each row
constexpr int kPairColumns = 2 * kPairs;         // of a tile: 32
constexpr int kPairElements = PM_TILE_ROWS * 2;  // [32 rows][2 columns]

// Tokens of a panel: as many as the sums of a strip with them fit into registers, together with what they are made of.
constexpr int kUnitPanel = 12;
// Multiply-adds take as many of a strip's two halves at once.
#if defined(__AVX512F__)
constexpr int kFmaPanel = 12, kHalvesAtOnce = 2;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kFmaPanel = 2, kHalvesAtOnce = 1;
#else
constexpr int kFmaPanel = 1, kHalvesAtOnce = 1;
#endif

// Columns k .. k + 31 of the K elements of a token, rounded, zeros beyond K.
template <class X>
inline void load_pairs(const X* row, int64_t k, int64_t K, bf16* columns) {
  for (int i = 0; i < kPairColumns; i += 16) store(columns + i, k + i < K ? load_upto(row + k + i, K - k - i) : zero());
}

// A block of tokens of K columns, rounded to bfloat16, zeros beyond K up to whole tiles; the panels of a unit are laid out
// for it:
//   avx512_bf16 [pair][token][2 bfloat16]
//   else        [pair][token][2 float32: the odd column, the even one]
struct PairTokens {
  uint8_t* data;
  Panels panels;
  int64_t K;
  bool unit;

  static int64_t tiles_of(int64_t K) { return equal_parts(K, kPairColumns); }
  static int64_t largest_bytes(int64_t K) { return tiles_of(K) * kPairs * 8; }  // of a token

  int64_t pair_bytes() const { return unit ? 4 : 8; }
  uint8_t* panel(int64_t p) const { return data + panels.begin(p) * tiles_of(K) * kPairs * pair_bytes(); }

  // row: the K elements of token t.
  template <class X>
  void pack(int64_t t, const X* row) const {
    const int64_t p = panels.of(t), stride = panels.width(p) * pair_bytes();
    uint8_t* to = panel(p) + (t - panels.begin(p)) * pair_bytes();
    for (int64_t k = 0; k < tiles_of(K) * kPairColumns; k += kPairColumns) {
      alignas(64) bf16 columns[kPairColumns];
      load_pairs(row, k, K, columns);
      for (int i = 0; i < kPairColumns; i += 2, to += stride)
        if (unit) {
          memcpy(to, columns + i, 4);
        } else {
          const float pair[2] = {to_float(columns[i + 1]), to_float(columns[i])};
          memcpy(to, pair, 8);
        }
    }
  }
};

// Memory for the blocks of up to `count` tokens of K columns.
struct PairScratch {
  Scratch<uint8_t> data;
  PairScratch(int64_t count, int64_t K) : data(count * PairTokens::largest_bytes(K)) {}
  bool failed() const { return !data.data; }
  PairTokens block(int64_t count, int64_t K) const {
    const bool unit = has_bf16_unit();
    return {data.data, {count, unit ? kUnitPanel : kFmaPanel}, K, unit};
  }
};

#if defined(__AVX512F__)

// A strip of `tiles` tiles with a panel of C tokens: sums[c * kTile + r]. (Inlined where it is chosen among others, gcc 12
// keeps all its accumulators on the stack, and around its own intrinsic it keeps copies of them there.)
template <int C>
__attribute__((noinline)) void unit_dots(const bf16* w, int64_t tiles, const uint8_t* panel, float* sums) {
  __m512 first[C], second[C];
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) first[c] = second[c] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < tiles * kPairs; ++pair, w += kPairElements, panel += 4 * C) {
    static_assert(kPairElements * sizeof(bf16) == kStreamStep);
    prefetch_stream<C>(w, pair);
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + kPairElements / 2);
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) {
      int32_t two;
      memcpy(&two, panel + 4 * c, 4);
      const __m512i token = _mm512_set1_epi32(two);
      asm("vdpbf16ps %2, %1, %0" : "+v"(first[c]) : "v"(w0), "v"(token));
      asm("vdpbf16ps %2, %1, %0" : "+v"(second[c]) : "v"(w1), "v"(token));
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
    _mm512_storeu_ps(sums + c * kTile, first[c]);
    _mm512_storeu_ps(sums + c * kTile + kHalfTile, second[c]);
  }
}

#endif

// The same by multiply-adds; denormals must be off. streams: w comes from memory, not from a cache.
template <int C>
__attribute__((noinline)) void fma_dots(const bf16* w, int64_t tiles, const uint8_t* panel, bool streams, float* sums) {
  F32x16 acc[2][C];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) acc[half][c] = zero();
  for (int64_t pair = 0; pair < tiles * kPairs; ++pair, w += kPairElements, panel += 8 * C) {
    if (C < 8 && streams && pair % (kPage / kStreamStep) == 0) prefetch_next_page(w);  // more tokens are slower with it
#pragma GCC unroll 2
    for (int first = 0; first < 2; first += kHalvesAtOnce) {
      asm volatile("" : : : "memory");  // or gcc loads all weights first, and has no registers left for the sums
      F32x16 odd[kHalvesAtOnce], even[kHalvesAtOnce];
#pragma GCC unroll 2
      for (int half = 0; half < kHalvesAtOnce; ++half) {
        odd[half] = load_odd(w + (first + half) * kPairElements / 2);
        even[half] = load_even(w + (first + half) * kPairElements / 2);
      }
#pragma GCC unroll 12
      for (int c = 0; c < C; ++c) {
        float token[2];
        memcpy(token, panel + 8 * c, 8);
        const F32x16 odd_token = set1(token[0]), even_token = set1(token[1]);
#pragma GCC unroll 2
        for (int half = 0; half < kHalvesAtOnce; ++half) {
          F32x16& sum = acc[first + half][c];
          sum = fma(even[half], even_token, fma(odd[half], odd_token, sum));
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) store(sums + c * kTile + half * kHalfTile, acc[half][c]);
}

// While it lives, this thread takes denormal operands as zeros and makes denormal results zeros.
class DenormalsOff {
 public:
  DenormalsOff() : before_(_mm_getcsr()) {
    constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZeros = 1u << 6;
    _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZeros);
  }
  ~DenormalsOff() { _mm_setcsr(before_); }
  DenormalsOff(const DenormalsOff&) = delete;
  DenormalsOff& operator=(const DenormalsOff&) = delete;

 private:
  const unsigned before_;
};

// The product of a packed weight of any number of rows: w [tiles of rows][tiles of columns][kTileBytes].
struct PairProduct {
  using Tokens = PairTokens;
  const PairTokens& tokens;
  const uint8_t* w;

  static constexpr int kTaskSums = kTile * kTaskTokens;
  int64_t task_tiles(int64_t) const { return 1; }
  int64_t task_panels() const { return kTaskTokens / tokens.panels.widest; }

  // Tile i.
  void multiply(int64_t i, int64_t, int64_t first, int64_t last, float* sums) const {
    const int64_t tiles = PairTokens::tiles_of(tokens.K);
    const bf16* strip = reinterpret_cast<const bf16*>(w + i * tiles * kTileBytes);
    const Panels& panels = tokens.panels;
    for (int64_t p = first; p < last; ++p, sums += panels.height() * kTile)
      dots(strip, tiles, tokens.panel(p), panels.width(p), p == first, sums);
  }

 private:
  void dots(const bf16* strip, int64_t tiles, const uint8_t* panel, int width, bool streams, float* sums) const {
#if defined(__AVX512F__)
    if (tokens.unit) return of_width<kUnitPanel>(width, [&](auto C) { unit_dots<C>(strip, tiles, panel, sums); });
#endif
    const DenormalsOff off;
    of_width<kFmaPanel>(width, [&](auto C) { fma_dots<C>(strip, tiles, panel, streams, sums); });
  }
};

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_MATMUL_BF16_H_
