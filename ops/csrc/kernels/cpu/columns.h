// Rows of float32 or bfloat16 as vectors: element d of sixteen rows in the lanes of one (a column), or 32 elements of one
// row in two. Bits move, nothing is computed.
#ifndef PADDLE_MIXTRAL_COLUMNS_H_
#define PADDLE_MIXTRAL_COLUMNS_H_

#include "vec.h"

namespace pm {
namespace PM_ISA {

// load_quarters: the four 32-bit words at each of four places, one place a quarter of the vector.
// transpose_quarters: word j of quarter i of vector k goes to word k of quarter i of vector j.
// lower_bf16, upper_bf16: each word's halves as bfloat16: the elements at even and at odd indices of the row it came from.
#if defined(__AVX512F__)

static inline F32x16 load_words(const void* p) { return {_mm512_loadu_ps(p)}; }
static inline F32x16 load_quarters(const void* a, const void* b, const void* c, const void* d) {
  const auto at = [](const void* p) { return _mm_loadu_ps(static_cast<const float*>(p)); };
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(at(a)), at(b), 1);
  return {_mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps256_ps512(low), at(c), 2), at(d), 3)};
}
static inline F32x16 lower_bf16(F32x16 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))}; }
static inline F32x16 upper_bf16(F32x16 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(-65536)))};
}
static inline void transpose_quarters(F32x16* r) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0].v, r[1].v)),
                b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0].v, r[1].v));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2].v, r[3].v)),
                d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2].v, r[3].v));
  r[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  r[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  r[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  r[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

#elif defined(__AVX2__) && defined(__FMA__)

static inline F32x16 load_words(const void* p) { return load(static_cast<const float*>(p)); }
static inline F32x16 load_quarters(const void* a, const void* b, const void* c, const void* d) {
  const auto pair = [](const void* low, const void* high) {
    const __m256 half = _mm256_castps128_ps256(_mm_loadu_ps(static_cast<const float*>(low)));
    return _mm256_insertf128_ps(half, _mm_loadu_ps(static_cast<const float*>(high)), 1);
  };
  return {pair(a, b), pair(c, d)};
}
static inline __m256 lower_bf16(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 16)); }
static inline __m256 upper_bf16(__m256 a) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(-65536)));
}
static inline F32x16 lower_bf16(F32x16 a) { return {lower_bf16(a.lo), lower_bf16(a.hi)}; }
static inline F32x16 upper_bf16(F32x16 a) { return {upper_bf16(a.lo), upper_bf16(a.hi)}; }
static inline void transpose_quarters(__m256& r0, __m256& r1, __m256& r2, __m256& r3) {
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)), b = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)), d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
  r0 = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
  r1 = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  r2 = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
  r3 = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}
static inline void transpose_quarters(F32x16* r) {
  transpose_quarters(r[0].lo, r[1].lo, r[2].lo, r[3].lo);
  transpose_quarters(r[0].hi, r[1].hi, r[2].hi, r[3].hi);
}

#else

static inline F32x16 load_words(const void* p) {
  F32x16 r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
static inline F32x16 load_quarters(const void* a, const void* b, const void* c, const void* d) {
  F32x16 r;
  memcpy(r.v, a, 16);
  memcpy(r.v + 4, b, 16);
  memcpy(r.v + 8, c, 16);
  memcpy(r.v + 12, d, 16);
  return r;
}
static inline F32x16 half_bf16(F32x16 a, int shift) {
  uint32_t words[16];
  memcpy(words, a.v, sizeof words);
  for (int i = 0; i < 16; ++i) words[i] = words[i] >> shift << 16;
  memcpy(a.v, words, sizeof words);
  return a;
}
static inline F32x16 lower_bf16(F32x16 a) { return half_bf16(a, 0); }
static inline F32x16 upper_bf16(F32x16 a) { return half_bf16(a, 16); }
static inline void transpose_quarters(F32x16* r) {
  uint32_t from[4][16], to[4][16];
  for (int k = 0; k < 4; ++k) memcpy(from[k], r[k].v, sizeof from[k]);
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 4; ++k) to[j][4 * i + k] = from[k][4 * i + j];
  for (int k = 0; k < 4; ++k) memcpy(r[k].v, to[k], sizeof to[k]);
}

#endif

// Where a pointer comes from is hidden from gcc 12, which would keep sixteen multiples of a stride in memory.
template <class T>
static inline void hide(T*& p) {
  asm("" : "+r"(p));
}

// sum + x * column, x in memory: gcc 12 would load x once for two columns, and keep what it has no register for in memory.
static inline F32x16 fma_scalar(const float* x, F32x16 column, F32x16 sum) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(column.v), "m"(*x));
  return sum;
#else
  return fma(set1(*x), column, sum);
#endif
}

// Elements in four words.
template <class E>
constexpr int kFourWords = 16 / sizeof(E);

// columns[i] = element i of sixteen rows, `stride` elements apart, for the elements of four words.
static inline void split_words(const float*, const F32x16* words, F32x16* columns) {
  for (int i = 0; i < 4; ++i) columns[i] = words[i];
}
static inline void split_words(const bf16*, const F32x16* words, F32x16* columns) {
  for (int i = 0; i < 4; ++i) {
    columns[2 * i] = lower_bf16(words[i]);
    columns[2 * i + 1] = upper_bf16(words[i]);
  }
}
template <class E>
static inline void load_columns(const E* rows, int64_t stride, F32x16 (&columns)[kFourWords<E>]) {
  const E* quarters[4] = {rows, rows + 4 * stride, rows + 8 * stride, rows + 12 * stride};
  for (const E*& quarter : quarters) hide(quarter);
  F32x16 words[4];
  for (int k = 0; k < 4; ++k)
    words[k] = load_quarters(quarters[0] + k * stride, quarters[1] + k * stride, quarters[2] + k * stride,
                             quarters[3] + k * stride);
  transpose_quarters(words);
  split_words(rows, words, columns);
}

// 32 elements of a row: of float32 the first sixteen and the others, of bfloat16 those at even and those at odd indices.
static inline void load_pair(const float* p, F32x16* v) {
  v[0] = load(p);
  v[1] = load(p + 16);
}
static inline void load_pair(const bf16* p, F32x16* v) {
  const F32x16 words = load_words(p);
  v[0] = lower_bf16(words);
  v[1] = upper_bf16(words);
}
static inline void store_pair(float* p, const F32x16* v) {
  store(p, v[0]);
  store(p + 16, v[1]);
}
static inline void store_pair(bf16* p, const F32x16* v) {
  bf16 even[16], odd[16];
  store(even, v[0]);
  store(odd, v[1]);
#if defined(__AVX512F__)
  const auto words = [](const bf16* half) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
  };
  _mm512_storeu_si512(p, _mm512_or_si512(words(even), _mm512_slli_epi32(words(odd), 16)));
#else
  for (int i = 0; i < 16; ++i) {
    p[2 * i] = even[i];
    p[2 * i + 1] = odd[i];
  }
#endif
}

}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_COLUMNS_H_
