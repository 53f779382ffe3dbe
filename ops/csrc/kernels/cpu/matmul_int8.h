// Products of packed int8 weights with tokens in 16- or 8-bit fixed point: include/linear.h defines them, quantize.h the
// packing.
//
// EXACT       A token is x = s * q with integers |q| <= 32639 (127 of 8 bits), so a product of integers is summed, and the
//             sum, below 2^47, is the same whatever the order: no blocking, thread, instruction set or batch can change it.
//             It is rounded once, to float32, and multiplied by s.
// WEIGHTS     u = w + 128 (unsigned): sum q w = sum q u - 128 sum q. Dot product instructions take one operand of each sign.
// UNITS       avx512_vnni and amx multiply bytes: q = lo + 256 hi, planes of signed bytes, an int32 sum of each (|lo|, |hi|
//             <= 127 or lo = -128, u <= 255: exact for K <= 65,536). 8 bits are one plane, lo: hi would be zero. avx512 and
//             avx2 multiply 16-bit integers, whatever the bits, and empty their int32 sums every kMaddTiles tiles. The
//             baseline adds in int64.
#ifndef PADDLE_MIXTRAL_MATMUL_INT8_H_
#define PADDLE_MIXTRAL_MATMUL_INT8_H_

#include "matmul.h"
#include "matmul_tiles.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int kTileColumns = PM_INT8_TILE_COLUMNS;       // 64
constexpr int kQuads = PM_TILE_WORDS;                    // groups of four columns, side by side for each row
constexpr int kQuadBytes = PM_TILE_ROWS * 4;             // [32 rows][4 columns]
constexpr float kLargestQ[] = {0.0f, 127.0f, 32639.0f};  // by planes; 32639 = 127 * 256 + 127
constexpr float kSmallestToken = 0x1p-100f;              // 32639 / it is finite

constexpr int kTileUnitWorth = 8;  // tokens: a tile of one row costs the unit as much as one of sixteen

// Tokens of a panel: as many as the sums of a tile with them fit into registers, together with what they are made of.
constexpr int kVnniPanel = 12;  // planes of tokens
#if defined(__AVX512F__)
constexpr int kMaddPanel = 6;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kMaddPanel = 3;
#else
constexpr int kMaddPanel = 1;
#endif

// A block of tokens of K columns as integers, zeros beyond K up to whole tiles; the panels of a unit are laid out for it:
//   vnni        [quad][token][plane][4 bytes]
//   madd        [quad][token][4 int16]
//   amx         TokenTiles: a token tile for each plane of a panel
struct FixedTokens {
  int8_t* data;
  float* scale;    // [count] s, NaN for a token that is not finite
  int64_t* total;  // [count] sum of q
  Panels panels;
  int64_t K;
  Isa unit;
  int planes;  // 2: 16 bits, 1: 8 bits

  static int64_t tiles_of(int64_t K) { return equal_parts(K, kTileColumns); }
  static int64_t largest_bytes(int64_t K) { return tiles_of(K) * kTileColumns * 2; }  // of a token

  int8_t* panel(int64_t p) const { return data + panels.begin(p) * tiles_of(K) * kTileColumns * element_bytes(); }
#if defined(__AVX512F__)
  TokenTiles token_tiles() const { return {reinterpret_cast<uint8_t*>(data), panels.height(), tiles_of(K)}; }
#endif

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
    scale[t] = !usable ? NAN : nothing ? 0.0f : most / kLargestQ[planes];
    const F32x16 inverse = set1(nothing ? 0.0f : kLargestQ[planes] / most);

    const int64_t p = panels.of(t), width = panels.width(p), lane = t - panels.begin(p);
    int8_t* to = panel(p);
    int64_t sum = 0;
    for (int64_t tile = 0; tile < tiles_of(K); ++tile) {
      alignas(64) int32_t q[kTileColumns];
      for (int i = 0; i < kTileColumns; i += 16) {
        const int64_t k = tile * kTileColumns + i;
        const bool any = k < K && !nothing;
        store_rounded(q + i, any ? mul(load_upto(row + k, K - k), inverse) : zero());
      }
      for (int i = 0; i < kTileColumns; ++i) sum += q[i];
      alignas(64) int8_t bytes[2][kTileColumns];
      alignas(64) int16_t whole[kTileColumns];
      switch (unit) {
#if defined(__AVX512F__)
        case Isa::amx:
          split(q, bytes[0], bytes[1]);
          for (int plane = 0; plane < planes; ++plane)
            memcpy(token_tiles().at(p * planes + plane, tile) + lane * kTileRowBytes, bytes[plane], kTileRowBytes);
          break;
#endif
        case Isa::avx512_vnni:
          split(q, bytes[0], bytes[1]);
          for (int quad = 0; quad < kQuads; ++quad)
            for (int plane = 0; plane < planes; ++plane)
              memcpy(to + (((tile * kQuads + quad) * width + lane) * planes + plane) * 4, bytes[plane] + quad * 4, 4);
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
  int64_t element_bytes() const { return unit == Isa::avx512_vnni ? planes : 2; }
  static void split(const int32_t* q, int8_t* lo, int8_t* hi) {
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
  int planes;
  FixedScratch(int64_t count, int64_t K, int activation_bits)
      : data(bytes(count, K, activation_bits / 8)), scale(count), total(count), planes(activation_bits / 8) {}
  bool failed() const { return !data.data || !scale.data || !total.data; }
  FixedTokens block(int64_t count, int64_t K) const {
    const Isa unit = unit_for(count);
    return {data.data, scale.data, total.data, {count, widest(unit)}, K, unit, planes};
  }

 private:
  static Isa unit_for(int64_t count) { return isa() == Isa::amx && count < kTileUnitWorth ? Isa::avx512_vnni : isa(); }
  static int64_t bytes(int64_t count, int64_t K, [[maybe_unused]] int planes) {
#if defined(__AVX512F__)
    if (unit_for(count) == Isa::amx) return token_tile_bytes(count, FixedTokens::tiles_of(K), planes);
#endif
    return count * FixedTokens::largest_bytes(K);
  }
  int widest(Isa unit) const {
#if defined(__AVX512F__)
    if (unit == Isa::amx) return kTokenTile;
#endif
    return unit == Isa::avx512_vnni ? kVnniPanel / planes : kMaddPanel;
  }
};

// The sums of sixteen rows with a token, from the exact total of q u.
inline void finish_sums(const double* total, int64_t token_total, float scale, float* sums) {
  for (int r = 0; r < kHalfTile; ++r)
    sums[r] = static_cast<float>(total[r] - 128.0 * static_cast<double>(token_total)) * scale;
}

#if defined(__AVX512F__)

// The same where it is lo + 256 hi.
inline void finish_sums(__m512i lo, __m512i hi, int64_t token_total, float scale, float* sums) {
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

// A tile row w of `tiles` tiles with a panel of C tokens: sums[c * kTile + r]. (Inlined where it is chosen among others, gcc
// 12 keeps all its accumulators on the stack.)
template <int Planes, int C>
__attribute__((noinline)) void vnni_dots(const uint8_t* w, int64_t tiles, const int8_t* panel, const float* scale,
                                         const int64_t* total, float* sums) {
  constexpr int kSums = C * Planes;  // token and plane
  __m512i first[kSums], second[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) first[i] = second[i] = _mm512_setzero_si512();
  for (int64_t quad = 0; quad < tiles * kQuads; ++quad, w += kQuadBytes, panel += 4 * kSums) {
    static_assert(kQuadBytes == kStreamStep);
    prefetch_stream<kSums>(w, quad);
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + kQuadBytes / 2);
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      int32_t four;
      memcpy(&four, panel + 4 * i, 4);
      const __m512i q = _mm512_set1_epi32(four);
      dpbusd(first[i], w0, q);
      dpbusd(second[i], w1, q);
    }
  }
  const __m512i none = _mm512_setzero_si512();
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
    const int lo = c * Planes, hi = lo + Planes - 1;
    finish_sums(first[lo], Planes == 1 ? none : first[hi], total[c], scale[c], sums + c * kTile);
    finish_sums(second[lo], Planes == 1 ? none : second[hi], total[c], scale[c], sums + c * kTile + kHalfTile);
  }
}

// Signed bytes of tokens by unsigned bytes of weights.
struct ByteProducts {
  PM_TILES_TARGET static void first() {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  }
  PM_TILES_TARGET static void second() {
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
};

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
// exact [kMaddRows] += sums of rows, two of each.
inline void add_rows(double* exact, I16 sums) {
  const __m512i rows = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
  _mm512_store_pd(exact, _mm512_add_pd(_mm512_load_pd(exact), _mm512_cvtepi32_pd(_mm512_cvtepi64_epi32(rows))));
}
#else
using I16 = __m256i;
constexpr int kMaddRows = 4;
inline I16 load_weights(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I16 broadcast(int64_t q) { return _mm256_set1_epi64x(q); }
inline I16 madd(I16 sum, I16 w, I16 q) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, q)); }
inline void add_rows(double* exact, I16 sums) {
  const __m256i rows = _mm256_add_epi32(sums, _mm256_srli_epi64(sums, 32));
  const __m256i first_four = _mm256_permutevar8x32_epi32(rows, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  const __m256d found = _mm256_cvtepi32_pd(_mm256_castsi256_si128(first_four));
  _mm256_store_pd(exact, _mm256_add_pd(_mm256_load_pd(exact), found));
}
#endif

// Tiles are read in order, each once from memory: rows that find no registers for their sums wait while it is in cache.
template <int C>
__attribute__((noinline)) void madd_dots(const uint8_t* w, int64_t tiles, const int8_t* panel, const float* scale,
                                         const int64_t* total, float* sums) {
  constexpr int R = C == 1 ? kTile / kMaddRows : 4, kRows = R * kMaddRows;  // rows at once: a tile, or half of one
  alignas(64) double exact[C][kTile] = {};
  for (int64_t begin = 0; begin < tiles; begin += kMaddTiles) {
    const int64_t end = begin + kMaddTiles < tiles ? begin + kMaddTiles : tiles;
    for (int row = 0; row < kTile; row += kRows) {
      I16 acc[R][C] = {};
      const int8_t* q = panel + begin * kQuads * 8 * C;
      for (int64_t tile = begin; tile < end; ++tile) {
        const uint8_t* at = w + tile * kTileBytes;
        if (row == 0 && tile % (kPage / kTileBytes) == 0) prefetch_next_page(at);
        at += row * 4;
        for (int quad = 0; quad < kQuads; ++quad, q += 8 * C, at += kQuadBytes) {
          I16 tokens[C];
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) {
            int64_t four;
            memcpy(&four, q + 8 * c, 8);
            tokens[c] = broadcast(four);
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const I16 weights = load_weights(at + r * kMaddRows * 4);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[r][c] = madd(acc[r][c], weights, tokens[c]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) add_rows(exact[c] + row + r * kMaddRows, acc[r][c]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int half = 0; half < kTile; half += kHalfTile)
      finish_sums(exact[c] + half, total[c], scale[c], sums + c * kTile + half);
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

// The product of a packed weight of any number of rows: w [tiles of rows][tiles of columns][kTileBytes].
struct FixedProduct {
  using Tokens = FixedTokens;
  const FixedTokens& tokens;
  const uint8_t* w;

#if defined(__AVX512F__)
  static constexpr int kTaskSums = kTileTaskSums;
  int64_t task_tiles(int64_t tiles) const {
    return on_tiles() ? strips_of_task(tiles, tokens.token_tiles(), tokens.panels.number() * tokens.planes) : 1;
  }
  int64_t task_panels() const { return on_tiles() ? kTaskTokenTiles / tokens.planes : kTaskTokens / tokens.panels.widest; }
#else
  static constexpr int kTaskSums = kTile * kTaskTokens;
  int64_t task_tiles(int64_t) const { return 1; }
  int64_t task_panels() const { return kTaskTokens / tokens.panels.widest; }
#endif

  void multiply(int64_t begin, [[maybe_unused]] int64_t end, int64_t first, int64_t last, float* sums) const {
    const int64_t tiles = FixedTokens::tiles_of(tokens.K);
    const uint8_t* from = w + begin * tiles * kTileBytes;
#if defined(__AVX512F__)
    if (on_tiles()) return multiply_on_tiles(from, end - begin, first, last, sums);
#endif
    const Panels& panels = tokens.panels;
    for (int64_t p = first; p < last; ++p, sums += panels.height() * kTile) {
      const int64_t t = panels.begin(p);
      dots(from, tiles, tokens.panel(p), panels.width(p), tokens.scale + t, tokens.total + t, sums);
    }
  }

 private:
#if defined(__AVX512F__)
  bool on_tiles() const { return tokens.unit == Isa::amx; }

  void multiply_on_tiles(const uint8_t* from, int64_t strips, int64_t first, int64_t last, float* sums) const {
    const TokenTiles tiles = tokens.token_tiles();
    multiply_tiles<ByteProducts>(tiles, first * tokens.planes, last * tokens.planes, from, strips, sums);
    // The integers become sums of the product in place: none is written where a later one is read.
    const float* integers = sums;
    const int plane = tiles.height * kTile;
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t p = first; p < last; ++p, integers += tokens.planes * plane, sums += plane)
        for (int c = 0; c < tokens.panels.width(p) * 2; ++c) {
          const int64_t t = tokens.panels.begin(p) + c / 2;
          const float* lo = integers + c * kHalfTile;
          const __m512i hi = tokens.planes == 1 ? _mm512_setzero_si512() : _mm512_load_si512(lo + plane);
          finish_sums(_mm512_load_si512(lo), hi, tokens.total[t], tokens.scale[t], sums + c * kHalfTile);
        }
  }
#endif

  void dots(const uint8_t* row, int64_t tiles, const int8_t* panel, int width, const float* scale, const int64_t* total,
            float* sums) const {
#if defined(__AVX512F__)
    if (tokens.unit == Isa::avx512_vnni)
      return tokens.planes == 1
                 ? of_width<kVnniPanel>(width, [&](auto C) { vnni_dots<1, C>(row, tiles, panel, scale, total, sums); })
                 : of_width<kVnniPanel / 2>(width, [&](auto C) { vnni_dots<2, C>(row, tiles, panel, scale, total, sums); });
#endif
    of_width<kMaddPanel>(width, [&](auto C) { madd_dots<C>(row, tiles, panel, scale, total, sums); });
  }
};

}  // namespace
}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_MATMUL_INT8_H_
