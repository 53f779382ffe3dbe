// Sixteen rows of sixteen 32-bit words turned into columns, and the two bfloat16 a word holds. Bits move, nothing is
// computed.
#ifndef PADDLE_MIXTRAL_TRANSPOSE_H_
#define PADDLE_MIXTRAL_TRANSPOSE_H_

#include "vec.h"

namespace pm {
namespace PM_ISA {

// The first n (1..16) 32-bit words at p, whatever they stand for; the other lanes are zero.
static inline F32x16 load_words(const void* p, int n) {
  float lanes[16] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * 4);
  return load(lanes);
}

#if defined(__AVX512F__)

static inline F32x16 load_words(const void* p) { return {_mm512_loadu_ps(p)}; }
// Each word's lower and upper half as bfloat16: the elements at even and at odd indices of the row it came from.
static inline F32x16 lower_bf16(F32x16 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))}; }
static inline F32x16 upper_bf16(F32x16 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(-65536)))};
}
static inline void transpose(F32x16* r) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  // b[4 g + c]: columns c, c + 4, c + 8, c + 12 of rows 4 g .. 4 g + 3, one in each 128-bit quarter.
  for (int g = 0; g < 16; g += 4) {
    const __m512d lo0 = _mm512_castps_pd(a[g]), lo1 = _mm512_castps_pd(a[g + 2]);
    const __m512d hi0 = _mm512_castps_pd(a[g + 1]), hi1 = _mm512_castps_pd(a[g + 3]);
    b[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo0, lo1));
    b[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo0, lo1));
    b[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi0, hi1));
    b[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi0, hi1));
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0x88), odd0 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0x88),
                 odd1 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(even0, even1, 0x88);
    r[c + 4].v = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    r[c + 8].v = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    r[c + 12].v = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}

#elif defined(__AVX2__) && defined(__FMA__)

static inline F32x16 load_words(const void* p) { return load(static_cast<const float*>(p)); }
static inline __m256 lower_bf16(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 16)); }
static inline __m256 upper_bf16(__m256 a) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(-65536)));
}
static inline F32x16 lower_bf16(F32x16 a) { return {lower_bf16(a.lo), lower_bf16(a.hi)}; }
static inline F32x16 upper_bf16(F32x16 a) { return {upper_bf16(a.lo), upper_bf16(a.hi)}; }
static inline void transpose8(__m256* r) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int g = 0; g < 8; g += 4) {
    b[g] = _mm256_shuffle_ps(a[g], a[g + 2], 0x44);
    b[g + 1] = _mm256_shuffle_ps(a[g], a[g + 2], 0xee);
    b[g + 2] = _mm256_shuffle_ps(a[g + 1], a[g + 3], 0x44);
    b[g + 3] = _mm256_shuffle_ps(a[g + 1], a[g + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
    r[c + 4] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
  }
}
static inline void transpose(F32x16* r) {
  __m256 quarter[2][2][8];  // [rows 8 i ..][columns 8 j ..]
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 8; ++k) {
      quarter[i][0][k] = r[8 * i + k].lo;
      quarter[i][1][k] = r[8 * i + k].hi;
    }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) transpose8(quarter[i][j]);
  for (int j = 0; j < 2; ++j)
    for (int k = 0; k < 8; ++k) r[8 * j + k] = {quarter[0][j][k], quarter[1][j][k]};
}

#else

static inline F32x16 load_words(const void* p) { return load_words(p, 16); }
static inline F32x16 half_bf16(F32x16 a, int shift) {
  for (int i = 0; i < 16; ++i) {
    uint32_t u;
    memcpy(&u, &a.v[i], 4);
    u = u >> shift << 16;
    memcpy(&a.v[i], &u, 4);
  }
  return a;
}
static inline F32x16 lower_bf16(F32x16 a) { return half_bf16(a, 0); }
static inline F32x16 upper_bf16(F32x16 a) { return half_bf16(a, 16); }
static inline void transpose(F32x16* r) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const float word = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = word;
    }
}

#endif

// f(d, column) for d = 0 .. D - 1: element d of sixteen rows. Meanwhile the rows `ahead` are fetched into the second-level
// cache, a line of theirs for each that is read.
template <class F>
static inline void use_columns(const float*, int64_t d, F32x16 word, F f) {
  f(d, word);
}
template <class F>
static inline void use_columns(const bf16*, int64_t d, F32x16 word, F f) {
  f(d, lower_bf16(word));
  f(d + 1, upper_bf16(word));
}
template <class E, class F>
static inline void for_columns(const E* const* rows, const E* const* ahead, int64_t D, F f) {
  constexpr int64_t kPerWord = 4 / sizeof(E);
  F32x16 words[16];
  int64_t d = 0;
  for (; d + 16 * kPerWord <= D; d += 16 * kPerWord) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      words[i] = load_words(rows[i] + d);
      __builtin_prefetch(ahead[i] + d, 0, 2);
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) use_columns(rows[0], d + i * kPerWord, words[i], f);
  }
  if (d == D) return;
  const int rest = static_cast<int>((D - d) / kPerWord);
  for (int i = 0; i < 16; ++i) words[i] = load_words(rows[i] + d, rest);
  transpose(words);
  for (int i = 0; i < rest; ++i) use_columns(rows[0], d + i * kPerWord, words[i], f);
}

}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_TRANSPOSE_H_
