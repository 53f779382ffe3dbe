// Weights to int8 and into tiles: include/quantize.h.
#include "../include/quantize.h"

#include "matmul.h"

namespace pm {
namespace PM_ISA {
namespace {

struct f16 {
  uint16_t bits;
};

inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shifting the 15 bits into place divides by 2^112; a subnormal needs no other care. Infinity and NaN get their exponent.
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t u = magnitude << 13;
  float f;
  memcpy(&f, &u, 4);
  f *= 0x1p112f;
  memcpy(&u, &f, 4);
  if (magnitude >= 0x7c00u) u |= 0x7f800000u;
  u |= static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  memcpy(&f, &u, 4);
  return f;
#endif
}
inline F32x16 load(const f16* p) {
#if defined(__AVX512F__)
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#else
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = to_float(p[i]);
  return PM_ISA::load(lanes);
#endif
}
inline F32x16 load_upto(const f16* p, int64_t n) {
  if (n >= 16) return load(p);
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < n ? to_float(p[i]) : 0.0f;
  return PM_ISA::load(lanes);
}

template <class W>
void quantize_row(const W* w, int8_t* q, float* scale, int64_t K) {
  F32x16 largest = zero(), finite = zero();  // finite: w - w, 0 or NaN
  for (int64_t k = 0; k < K; k += 16) {
    const F32x16 v = load_upto(w + k, K - k);
    largest = max(largest, max(v, sub(zero(), v)));
    finite = add(finite, sub(v, v));
  }
  if (reduce_add(finite) != 0.0f) {
    *scale = NAN;
    memset(q, 0, static_cast<size_t>(K));
    return;
  }
  *scale = reduce_max(largest) / 127.0f;
  if (*scale == 0.0f) *scale = 1.0f;
  for (int64_t k = 0; k < K; k += 16) {
    // |w / scale| passes 127 only where the scale is a subnormal number, which has few digits.
    const F32x16 ratio = round_even(div(load_upto(w + k, K - k), set1(*scale)));
    float lanes[16];
    store(lanes, min(max(ratio, set1(-127.0f)), set1(127.0f)));
    int8_t rounded[16];
    for (int i = 0; i < 16; ++i) rounded[i] = static_cast<int8_t>(lanes[i]);
    memcpy(q + k, rounded, static_cast<size_t>(K - k < 16 ? K - k : 16));
  }
}

template <class W>
void quantize_rows(const W* w, int64_t w_stride, int8_t* q, float* scale, int64_t N, int64_t K) {
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (N * K > kWorthThreads)
  for (int64_t n = 0; n < N; ++n) quantize_row(w + n * w_stride, q + n * K, scale + n, K);
}

// stored(w): an element as the tile holds it.
template <class W, class Stored>
void pack_rows(const W* w, int64_t w_stride, uint8_t* packed, int64_t first, int64_t step, int64_t N, int64_t K,
               Stored stored) {
  constexpr int64_t kInWord = 4 / sizeof(W), kColumns = PM_TILE_WORDS * kInWord;
  const int64_t tiles = equal_parts(K, kColumns), runs = equal_parts(N, 16);
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (N * K > kWorthThreads)
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t n = run * 16; n < N && n < (run + 1) * 16; ++n) {
        const int64_t row = first + run * step * 16 + n % 16;
        uint8_t* to = packed + (row / kTile * tiles + tile) * PM_TILE_BYTES + row % kTile * 4;
        const W* from = w + n * w_stride + tile * kColumns;
        const int64_t left = K - tile * kColumns, count = left < kColumns ? left : kColumns;
        decltype(stored(W())) columns[kColumns];
        for (int64_t k = 0; k < count; ++k) columns[k] = stored(from[k]);
        for (int64_t k = count; k < kColumns; ++k) columns[k] = stored(W());
        for (int64_t word = 0; word < PM_TILE_WORDS; ++word) memcpy(to + word * (kTile * 4), columns + word * kInWord, 4);
      }
}

}  // namespace

int quantize_int8(const void* w, pm_dtype w_dtype, int64_t w_stride, int8_t* q, float* scale, int64_t N, int64_t K, void*) {
  switch (w_dtype) {
    case PM_BF16:
      quantize_rows(static_cast<const bf16*>(w), w_stride, q, scale, N, K);
      break;
    case PM_F16:
      quantize_rows(static_cast<const f16*>(w), w_stride, q, scale, N, K);
      break;
    default:
      quantize_rows(static_cast<const float*>(w), w_stride, q, scale, N, K);
  }
  return PM_OK;
}

int pack(const void* w, pm_dtype w_dtype, int64_t w_stride, void* packed, int64_t first, int64_t step, int64_t N, int64_t K,
         void*) {
  uint8_t* to = static_cast<uint8_t*>(packed);
  if (w_dtype == PM_I8)
    pack_rows(static_cast<const int8_t*>(w), w_stride, to, first, step, N, K,
              [](int8_t q) { return static_cast<uint8_t>(q + PM_INT8_ZERO); });
  else
    pack_rows(static_cast<const uint16_t*>(w), w_stride, to, first, step, N, K, [](uint16_t bits) { return bits; });
  return PM_OK;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(quantize_int8,
          (const void* w, pm_dtype w_dtype, int64_t w_stride, int8_t* q, float* scale, int64_t N, int64_t K, void* stream),
          (w, w_dtype, w_stride, q, scale, N, K, stream))
PM_EXPORT(pack,
          (const void* w, pm_dtype w_dtype, int64_t w_stride, void* packed, int64_t first, int64_t step, int64_t N,
           int64_t K, void* stream),
          (w, w_dtype, w_stride, packed, first, step, N, K, stream))
