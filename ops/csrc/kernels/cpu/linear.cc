// Linear layers and weight quantisation: include/linear.h.
#include "../include/linear.h"

#include "matmul.h"

namespace pm {
namespace PM_ISA {
namespace {

template <class X, class W, class Y>
int linear_typed(const X* x, const W* w, const float* scale, Y* y, int64_t T, int64_t N, int64_t K) {
  const int64_t blocks = equal_parts(T, block_tokens(K));
  const Scratch panels(equal_parts(T, blocks) * vectors_of(K) * 16);
  if (!panels.data) return PM_OUT_OF_MEMORY;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t origin = block * T / blocks, count = (block + 1) * T / blocks - origin;
    const Tokens tokens = {panels.data, count, vectors_of(K)};
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (count * K > kWorthThreads)
    for (int64_t t = 0; t < count; ++t) pack_token(tokens, t, x + (origin + t) * K, K);
    matmul(
        tokens, K, equal_parts(N, kTile), [&](int64_t i) { return consecutive_tile(w, N, K, i); },
        [&](int64_t i, int64_t t, const float* sums) {
          for (int64_t n = i * kTile; n < N && n < (i + 1) * kTile; n += 16) {
            F32x16 sum = load(sums + n - i * kTile);
            if (scale) sum = mul(sum, load_upto(scale + n, N - n));
            store_upto(y + (origin + t) * N + n, sum, N - n);
          }
        });
  }
  return PM_OK;
}

template <class X, class W>
int linear_out(const X* x, const W* w, const float* scale, void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K) {
  return y_dtype == PM_BF16 ? linear_typed(x, w, scale, static_cast<bf16*>(y), T, N, K)
                            : linear_typed(x, w, scale, static_cast<float*>(y), T, N, K);
}

template <class X>
int linear_weight(const X* x, const void* w, pm_dtype w_dtype, const float* scale, void* y, pm_dtype y_dtype, int64_t T,
                  int64_t N, int64_t K) {
  switch (w_dtype) {
    case PM_I8:
      return linear_out(x, static_cast<const int8_t*>(w), scale, y, y_dtype, T, N, K);
    case PM_BF16:
      return linear_out(x, static_cast<const bf16*>(w), nullptr, y, y_dtype, T, N, K);
    default:
      return linear_out(x, static_cast<const float*>(w), nullptr, y, y_dtype, T, N, K);
  }
}

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

}  // namespace

int linear(const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, void* y, pm_dtype y_dtype,
           int64_t T, int64_t N, int64_t K, void*) {
  return x_dtype == PM_BF16 ? linear_weight(static_cast<const bf16*>(x), w, w_dtype, scale, y, y_dtype, T, N, K)
                            : linear_weight(static_cast<const float*>(x), w, w_dtype, scale, y, y_dtype, T, N, K);
}

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

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(linear,
          (const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, void* y, pm_dtype y_dtype,
           int64_t T, int64_t N, int64_t K, void* stream),
          (x, x_dtype, w, w_dtype, scale, y, y_dtype, T, N, K, stream))
PM_EXPORT(quantize_int8,
          (const void* w, pm_dtype w_dtype, int64_t w_stride, int8_t* q, float* scale, int64_t N, int64_t K, void* stream),
          (w, w_dtype, w_stride, q, scale, N, K, stream))
