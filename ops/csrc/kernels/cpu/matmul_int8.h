// Products of packed int8 weights with tokens in 16-bit fixed point: include/linear.h defines them, quantize.h the packing.
//
// EXACT       A token is x = s * q with integers |q| <= 32639, so a product of integers is summed, and the sum, below 2^47,
// is
//             the same whatever the order: no blocking, thread, instruction set or batch can change it. It is rounded once,
//             to float32, and multiplied by s.
// WEIGHTS     u = w + 128 (unsigned): sum q w = sum q u - 128 sum q. Dot product instructions take one operand of each sign.
// UNITS       avx512_vnni and amx multiply bytes: q = 256 hi + lo, both signed bytes, two int32 sums (|hi|, |lo| <= 128, u
// <= 255:
//             exact for K <= 65,536). avx512 and avx2 multiply 16-bit integers and empty their int32 sums every kMaddTiles
//             tiles. The baseline adds in int64.
#ifndef PADDLE_MIXTRAL_MATMUL_INT8_H_
#define PADDLE_MIXTRAL_MATMUL_INT8_H_

#include "../include/quantize.h"
#include "matmul.h"
#include "tiles.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int kTileColumns = PM_INT8_TILE_COLUMNS;  // 64
constexpr int kQuads = kTileColumns / 4;            // groups of four columns, side by side for each row
constexpr int kQuadBytes = PM_INT8_TILE_ROWS * 4;   // [32 rows][4 columns]
constexpr int kTileBytes = kQuads * kQuadBytes;     // 2048
constexpr float kLargestQ = 32639.0f;               // 127 * 256 + 127
constexpr float kSmallestToken = 0x1p-100f;         // 32639 / it is finite

constexpr int kTileUnitWorth = 8;  // tokens: a tile of one row costs the unit as much as one of sixteen

#if defined(__AVX512F__)
constexpr int kFixedPanel = 6;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kFixedPanel = 3;
#else
constexpr int kFixedPanel = 1;
#endif

// A block of tokens of K columns as integers, zeros beyond K up to whole tiles; the panels of a unit are laid out for it:
//   vnni        [quad][token][hi: 4 bytes, lo: 4 bytes]
//   madd        [quad][token][4 int16]
//   amx         [tile][hi, lo][token][64 bytes], panels of up to 16 tokens
struct FixedTokens {
  int8_t* data;    // two bytes an element
  float* scale;    // [count] s, NaN for a token that is not finite
  int64_t* total;  // [count] sum of q
  Panels panels;
  int64_t K;
  Isa unit;

  static int64_t tiles_of(int64_t K) { return equal_parts(K, kTileColumns); }
  static int64_t token_bytes(int64_t K) { return tiles_of(K) * kTileColumns * 2; }

  const int8_t* panel(int64_t p) const { return data + panels.begin(p) * token_bytes(K); }

  // row: the K elements of token t.
  template <class X>
  void pack(int64_t t, const X* row) const {
    F32x16 largest = zero(), finite = zero();  // finite: x - x, 0 or NaN
    for (int64_t k = 0; k < K; k += 16) {
      const F32x16 v = load_upto(row + k, K - k);
      largest = max(largest, max(v, sub(zero(), v)));
      finite = add(finite, sub(v, v));
    }
    const float most = reduce_max(largest);
    const bool usable = reduce_add(finite) == 0.0f;
    const bool nothing = !usable || most < kSmallestToken;
    scale[t] = !usable ? NAN : nothing ? 0.0f : most / kLargestQ;
    const F32x16 inverse = set1(nothing ? 0.0f : kLargestQ / most);

    const int64_t p = panels.of(t), width = panels.width(p), lane = t - panels.begin(p);
    int8_t* to = data + panels.begin(p) * token_bytes(K);
    int64_t sum = 0;
    for (int64_t tile = 0; tile < tiles_of(K); ++tile) {
      alignas(64) int32_t q[kTileColumns];
      for (int i = 0; i < kTileColumns; i += 16) {
        const int64_t k = tile * kTileColumns + i;
        const bool any = k < K && !nothing;
        store_rounded(q + i, any ? mul(load_upto(row + k, K - k), inverse) : zero());
      }
      for (int i = 0; i < kTileColumns; ++i) sum += q[i];
      alignas(64) int8_t hi[kTileColumns], lo[kTileColumns];
      alignas(64) int16_t whole[kTileColumns];
      switch (unit) {
        case Isa::amx:
          split(q, hi, lo);
          memcpy(to + ((tile * 2 + 0) * width + lane) * kTileColumns, hi, kTileColumns);
          memcpy(to + ((tile * 2 + 1) * width + lane) * kTileColumns, lo, kTileColumns);
          break;
        case Isa::avx512_vnni:
          split(q, hi, lo);
          for (int quad = 0; quad < kQuads; ++quad) {
            int8_t* at = to + ((tile * kQuads + quad) * width + lane) * 8;
            memcpy(at, hi + quad * 4, 4);
            memcpy(at + 4, lo + quad * 4, 4);
          }
          break;
        default:
          for (int i = 0; i < kTileColumns; ++i) whole[i] = static_cast<int16_t>(q[i]);
          for (int quad = 0; quad < kQuads; ++quad)
            memcpy(to + ((tile * kQuads + quad) * width + lane) * 8, whole + quad * 4, 8);
      }
    }
    total[t] = sum;
  }

 private:
  static void split(const int32_t* q, int8_t* hi, int8_t* lo) {
    for (int i = 0; i < kTileColumns; ++i) {
      const int32_t h = (q[i] + 128) >> 8;
      hi[i] = static_cast<int8_t>(h);
      lo[i] = static_cast<int8_t>(q[i] - h * 256);
    }
  }
};

// Memory for the blocks of up to `count` tokens of K columns.
struct FixedScratch {
  Scratch<int8_t> data;
  Scratch<float> scale;
  Scratch<int64_t> total;
  FixedScratch(int64_t count, int64_t K) : data(count * FixedTokens::token_bytes(K)), scale(count), total(count) {}
  bool failed() const { return !data.data || !scale.data || !total.data; }
  FixedTokens block(int64_t count, int64_t K) const {
    const Isa unit = isa() == Isa::amx && count < kTileUnitWorth ? Isa::avx512_vnni : isa();
    return {data.data, scale.data, total.data, {count, unit == Isa::amx ? 16 : kFixedPanel}, K, unit};
  }
};

// The sums of sixteen rows with a token, from the exact total of q u.
inline void finish_sums(const double* total, int64_t token_total, float scale, float* sums) {
  for (int r = 0; r < kHalfTile; ++r)
    sums[r] = static_cast<float>(total[r] - 128.0 * static_cast<double>(token_total)) * scale;
}

#if defined(__AVX512F__)

// The same where it is 256 hi + lo.
inline void finish_sums(__m512i hi, __m512i lo, int64_t token_total, float scale, float* sums) {
  const __m512d offset = _mm512_set1_pd(128.0 * static_cast<double>(token_total)), weight = _mm512_set1_pd(256.0);
  const __m512d h0 = _mm512_cvtepi32_pd(_mm512_castsi512_si256(hi)),
                h1 = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(hi, 1));
  const __m512d l0 = _mm512_cvtepi32_pd(_mm512_castsi512_si256(lo)),
                l1 = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(lo, 1));
  const __m256 f0 = _mm512_cvtpd_ps(_mm512_sub_pd(_mm512_fmadd_pd(h0, weight, l0), offset));
  const __m256 f1 = _mm512_cvtpd_ps(_mm512_sub_pd(_mm512_fmadd_pd(h1, weight, l1), offset));
  _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_insertf32x8(_mm512_castps256_ps512(f0), f1, 1), _mm512_set1_ps(scale)));
}

// Four products of an unsigned and a signed byte added to each of sixteen int32. (gcc 12 keeps copies of the accumulators
// of its own intrinsic on the stack.)
inline void dpbusd(__m512i& sum, __m512i u, __m512i q) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(q)); }

// A tile row w of `tiles` tiles with a panel of C tokens: sums[c * kTile + r].
template <int C>
void vnni_dots(const uint8_t* w, int64_t tiles, const int8_t* panel, const float* scale, const int64_t* total, float* sums) {
  __m512i hi[2][C], lo[2][C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) hi[0][c] = hi[1][c] = lo[0][c] = lo[1][c] = _mm512_setzero_si512();
  for (int64_t quad = 0; quad < tiles * kQuads; ++quad, w += kQuadBytes, panel += 8 * C) {
    // Few tokens wait for memory, and the processor's own prefetch of one long stream is the fastest there is. More tokens
    // keep it waiting, and it stops.
    if (C >= 4) {
      __builtin_prefetch(w + 4096, 0, 2);
      __builtin_prefetch(w + 4096 + 64, 0, 2);
    }
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + kQuadBytes / 2);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      int32_t h, l;
      memcpy(&h, panel + 8 * c, 4);
      memcpy(&l, panel + 8 * c + 4, 4);
      const __m512i vh = _mm512_set1_epi32(h), vl = _mm512_set1_epi32(l);
      dpbusd(hi[0][c], w0, vh);
      dpbusd(hi[1][c], w1, vh);
      dpbusd(lo[0][c], w0, vl);
      dpbusd(lo[1][c], w1, vl);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    finish_sums(hi[0][c], lo[0][c], total[c], scale[c], sums + c * kTile);
    finish_sums(hi[1][c], lo[1][c], total[c], scale[c], sums + c * kTile + kHalfTile);
  }
}

// The same for up to sixteen tokens.
PM_TILES_TARGET void amx_dots(const uint8_t* w, int64_t tiles, const int8_t* panel, int width, const float* scale,
                              const int64_t* total, float* sums) {
  configure_tiles(width);
  // 0, 1: sums of hi with the tile's halves; 2, 3: of lo; 4, 5: hi, lo; 6, 7: the halves. The intrinsics take literals only.
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t plane = static_cast<int64_t>(width) * kTileColumns;
  for (int64_t tile = 0; tile < tiles; ++tile, w += kTileBytes, panel += 2 * plane) {
    _tile_loadd(6, w, kQuadBytes);
    _tile_loadd(7, w + kQuadBytes / 2, kQuadBytes);
    _tile_loadd(4, panel, 64);
    _tile_loadd(5, panel + plane, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  alignas(64) int32_t hi[2][16 * 16], lo[2][16 * 16];
  _tile_stored(0, hi[0], 64);
  _tile_stored(1, hi[1], 64);
  _tile_stored(2, lo[0], 64);
  _tile_stored(3, lo[1], 64);
  _tile_release();
  for (int c = 0; c < width; ++c)
    for (int half = 0; half < 2; ++half)
      finish_sums(_mm512_load_si512(hi[half] + c * 16), _mm512_load_si512(lo[half] + c * 16), total[c], scale[c],
                  sums + c * kTile + half * kHalfTile);
}

#endif

#if defined(__AVX2__) && defined(__FMA__)

constexpr int kMaddTiles = 4;  // 64 additions of 2 * 32639 * 255, and the two halves of a row's sum: below 2^31

#if defined(__AVX512F__)
using I16 = __m512i;
constexpr int kMaddRows = 8;  // rows of a vector, four columns each
inline I16 load_weights(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline I16 broadcast(int64_t q) { return _mm512_set1_epi64(q); }
inline I16 madd(I16 sum, I16 w, I16 q) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, q)); }
inline void store_sums(int32_t* p, I16 a) { _mm512_store_si512(p, a); }
#else
using I16 = __m256i;
constexpr int kMaddRows = 4;
inline I16 load_weights(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I16 broadcast(int64_t q) { return _mm256_set1_epi64x(q); }
inline I16 madd(I16 sum, I16 w, I16 q) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, q)); }
inline void store_sums(int32_t* p, I16 a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
#endif

template <int C>
void madd_dots(const uint8_t* w, int64_t tiles, const int8_t* panel, const float* scale, const int64_t* total, float* sums) {
  constexpr int R = 4, kRows = R * kMaddRows;  // rows at once: a tile, or half of one
  for (int row = 0; row < kTile; row += kRows) {
    double exact[C][kRows] = {};
    const uint8_t* from = w + row * 4;
    const int8_t* q = panel;
    for (int64_t begin = 0; begin < tiles; begin += kMaddTiles) {
      I16 acc[R][C] = {};
      const int64_t end = begin + kMaddTiles < tiles ? begin + kMaddTiles : tiles;
      for (int64_t tile = begin; tile < end; ++tile)
        for (int quad = 0; quad < kQuads; ++quad, q += 8 * C) {
          const uint8_t* at = from + tile * kTileBytes + quad * kQuadBytes;
          I16 tokens[C];
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) {
            int64_t four;
            memcpy(&four, q + 8 * c, 8);
            tokens[c] = broadcast(four);
          }
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const I16 weights = load_weights(at + r * kMaddRows * 4);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[r][c] = madd(acc[r][c], weights, tokens[c]);
          }
        }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          alignas(64) int32_t pairs[2 * kMaddRows];
          store_sums(pairs, acc[r][c]);
          for (int i = 0; i < kMaddRows; ++i) exact[c][r * kMaddRows + i] += pairs[2 * i] + pairs[2 * i + 1];
        }
    }
    for (int c = 0; c < C; ++c)
      for (int half = 0; half < kRows; half += kHalfTile)
        finish_sums(exact[c] + half, total[c], scale[c], sums + c * kTile + row + half);
  }
}

#else

template <int C>
void madd_dots(const uint8_t* w, int64_t tiles, const int8_t* panel, const float* scale, const int64_t* total, float* sums) {
  static_assert(C == 1);
  int64_t exact[kTile] = {};
  for (int64_t tile = 0; tile < tiles; ++tile, w += kTileBytes)
    for (int quad = 0; quad < kQuads; ++quad, panel += 8) {
      int16_t q[4];
      memcpy(q, panel, 8);
      for (int r = 0; r < kTile; ++r) {
        const uint8_t* u = w + quad * kQuadBytes + r * 4;
        exact[r] += q[0] * u[0] + q[1] * u[1] + q[2] * u[2] + q[3] * u[3];
      }
    }
  double rounded[kTile];
  for (int r = 0; r < kTile; ++r) rounded[r] = static_cast<double>(exact[r]);
  for (int half = 0; half < kTile; half += kHalfTile) finish_sums(rounded + half, total[0], scale[0], sums + half);
}

#endif

template <int C>
inline void fixed_dots(Isa unit, const uint8_t* w, int64_t tiles, const int8_t* panel, const float* scale,
                       const int64_t* total, float* sums) {
#if defined(__AVX512F__)
  if (unit == Isa::avx512_vnni) return vnni_dots<C>(w, tiles, panel, scale, total, sums);
#endif
  (void)unit;
  madd_dots<C>(w, tiles, panel, scale, total, sums);
}

// The product of a packed weight of any number of rows: w [tiles of rows][tiles of columns][kTileBytes].
struct FixedProduct {
  const FixedTokens& tokens;
  const uint8_t* w;

  // sums [tokens of panels first..last-1][kTile]
  void tile(int64_t i, int64_t first, int64_t last, float* sums) const {
    const int64_t tiles = FixedTokens::tiles_of(tokens.K);
    const uint8_t* row = w + i * tiles * kTileBytes;
    for (int64_t p = first; p < last; ++p) {
      const int64_t t = tokens.panels.begin(p);
      float* to = sums + (t - tokens.panels.begin(first)) * kTile;
      dots(row, tiles, tokens.panel(p), tokens.panels.width(p), tokens.scale + t, tokens.total + t, to);
    }
  }

 private:
  void dots(const uint8_t* row, int64_t tiles, const int8_t* panel, int width, const float* scale, const int64_t* total,
            float* sums) const {
#if defined(__AVX512F__)
    if (tokens.unit == Isa::amx) return amx_dots(row, tiles, panel, width, scale, total, sums);
#endif
    switch (width) {
      case 1:
        return fixed_dots<1>(tokens.unit, row, tiles, panel, scale, total, sums);
#if defined(__AVX2__) && defined(__FMA__)
      case 2:
        return fixed_dots<2>(tokens.unit, row, tiles, panel, scale, total, sums);
      case 3:
        return fixed_dots<3>(tokens.unit, row, tiles, panel, scale, total, sums);
#endif
#if defined(__AVX512F__)
      case 4:
        return fixed_dots<4>(tokens.unit, row, tiles, panel, scale, total, sums);
      case 5:
        return fixed_dots<5>(tokens.unit, row, tiles, panel, scale, total, sums);
      case 6:
        return fixed_dots<6>(tokens.unit, row, tiles, panel, scale, total, sums);
#endif
    }
  }
};

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_MATMUL_INT8_H_
