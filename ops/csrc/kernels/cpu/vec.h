// Sixteen float32 lanes, the same arithmetic on every instruction set.
//
// Kernels are written once on F32x16 and compiled three times (AVX-512: one register; AVX2 with FMA: two; baseline x86-64:
// an array). Every operation is correctly rounded or built from such operations in one fixed order, so that the three give
// the same bits. Compile with -ffp-contract=off: a fused multiply-add is only ever what fma() says.
#ifndef PADDLE_MIXTRAL_VEC_H_
#define PADDLE_MIXTRAL_VEC_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define PM_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define PM_ISA avx2
#else
#define PM_ISA baseline
#define PM_ISA_IS_BASELINE 1
#endif

namespace pm {
namespace PM_ISA {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; a NaN stays a NaN.
static inline bf16 to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) { *p = to_bf16(x); }

#if defined(__AVX512F__)

struct F32x16 {
  __m512 v;
};
static inline F32x16 zero() { return {_mm512_setzero_ps()}; }
static inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline F32x16 load(const bf16* p) {
  const __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
}
// Of sixteen pairs, the elements p[0], p[2], ...
static inline F32x16 load_even(const bf16* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
// The elements p[1], p[3], ...
static inline F32x16 load_odd(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)))};
}
static inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
// The nearest integers, halves to even.
static inline void store_rounded(int32_t* p, F32x16 a) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(a.v)); }
static inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F32x16 round_even(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for integral n in [-126, 127]
static inline F32x16 pow2(F32x16 n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
// ((0+8)+(4+12)) + ((2+10)+(6+14)) + ... : halves are folded onto each other until one lane is left.
static inline float reduce_add(F32x16 a) {
  __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__) && defined(__FMA__)

struct F32x16 {
  __m256 lo, hi;
};
static inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline F32x16 load(const bf16* p) {
  const __m128i* u = reinterpret_cast<const __m128i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(u)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(u + 1)), 16))};
}
static inline F32x16 load_even(const bf16* p) {
  const __m256i* u = reinterpret_cast<const __m256i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(u), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(u + 1), 16))};
}
static inline F32x16 load_odd(const bf16* p) {
  const __m256i* u = reinterpret_cast<const __m256i*>(p);
  const __m256i high = _mm256_set1_epi32(-65536);
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(u), high)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(u + 1), high))};
}
static inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline void store_rounded(int32_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(a.lo));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_cvtps_epi32(a.hi));
}
static inline F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline F32x16 round_even(F32x16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 pow2_8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline F32x16 pow2(F32x16 n) { return {pow2_8(n.lo), pow2_8(n.hi)}; }
static inline float reduce_add(F32x16 a) {
  __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline float reduce_max(F32x16 a) {
  __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

#else

struct F32x16 {
  float v[16];
};
#define PM_LANES for (int i = 0; i < 16; ++i)
static inline F32x16 set1(float x) {
  F32x16 r;
  PM_LANES r.v[i] = x;
  return r;
}
static inline F32x16 zero() { return set1(0.0f); }
template <class T>
static inline F32x16 load(const T* p) {
  F32x16 r;
  PM_LANES r.v[i] = to_float(p[i]);
  return r;
}
static inline F32x16 load_even(const bf16* p) {
  F32x16 r;
  PM_LANES r.v[i] = to_float(p[2 * i]);
  return r;
}
static inline F32x16 load_odd(const bf16* p) {
  F32x16 r;
  PM_LANES r.v[i] = to_float(p[2 * i + 1]);
  return r;
}
static inline void store(float* p, F32x16 a) { memcpy(p, a.v, sizeof a.v); }
static inline void store_rounded(int32_t* p, F32x16 a) { PM_LANES p[i] = static_cast<int32_t>(nearbyintf(a.v[i])); }
#define PM_LANEWISE(name, expression)             \
  static inline F32x16 name(F32x16 a, F32x16 b) { \
    F32x16 r;                                     \
    PM_LANES r.v[i] = expression;                 \
    return r;                                     \
  }
PM_LANEWISE(add, a.v[i] + b.v[i])
PM_LANEWISE(sub, a.v[i] - b.v[i])
PM_LANEWISE(mul, a.v[i] * b.v[i])
PM_LANEWISE(div, a.v[i] / b.v[i])
PM_LANEWISE(max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
PM_LANEWISE(min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
#undef PM_LANEWISE
static inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  F32x16 r;
  PM_LANES r.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}
static inline F32x16 round_even(F32x16 a) {
  F32x16 r;
  PM_LANES r.v[i] = nearbyintf(a.v[i]);
  return r;
}
static inline F32x16 pow2(F32x16 n) {
  F32x16 r;
  PM_LANES {
    const uint32_t u = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    memcpy(&r.v[i], &u, 4);
  }
  return r;
}
static inline float reduce_add(F32x16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  return a.v[0];
}
static inline float reduce_max(F32x16 a) {
  for (int i = 1; i < 16; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
  return a.v[0];
}
#undef PM_LANES

#endif

// The first n (1..16) elements; the other lanes read as `fill`.
template <class T>
static inline F32x16 load_partial(const T* p, int n, float fill = 0.0f) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T>
static inline void store_partial(T* p, F32x16 a, int n) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < n; ++i) put(p + i, lanes[i]);
}
static inline void store(bf16* p, F32x16 a) {
#if defined(__AVX512F__)
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
#else
  store_partial(p, a, 16);
#endif
}

// e^x, within 2 ulp on [-87.3, 88.7]; smaller x give 0, larger ones the value at 88.7. x = n ln 2 + r, |r| <= ln 2 / 2,
// and a polynomial of degree 6 in r (Cephes' coefficients).
static inline F32x16 exp(F32x16 x) {
  const F32x16 lowest = set1(-87.33654f);
  const F32x16 c = min(max(x, lowest), set1(88.7f));
  const F32x16 n = min(round_even(mul(c, set1(1.44269504088896341f))), set1(127.0f));
  F32x16 r = fma(n, set1(-0.693359375f), c);
  r = fma(n, set1(2.12194440e-4f), r);
  F32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  p = mul(p, pow2(n));
#if defined(__AVX512F__)
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, lowest.v, _CMP_NLT_UQ), p.v)};
#elif defined(__AVX2__) && defined(__FMA__)
  return {_mm256_and_ps(p.lo, _mm256_cmp_ps(x.lo, lowest.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(p.hi, _mm256_cmp_ps(x.hi, lowest.hi, _CMP_NLT_UQ))};
#else
  for (int i = 0; i < 16; ++i)
    if (x.v[i] < lowest.v[i]) p.v[i] = 0.0f;
  return p;
#endif
}

}  // namespace PM_ISA
}  // namespace pm
#endif  // PADDLE_MIXTRAL_VEC_H_
