// RMS normalisation: include/norm.h.
#include "../include/norm.h"

#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

template <class Out>
void rms_norm_row(const float* residual, const float* delta, const float* weight, float* residual_out, Out* y, int64_t H,
                  float eps) {
  const int64_t full = H & ~int64_t{15};
  const int rest = static_cast<int>(H - full);
  F32x16 squares = zero();
  for (int64_t i = 0; i < H; i += 16) {
    const int n = i < full ? 16 : rest;
    F32x16 r = n == 16 ? load(residual + i) : load_partial(residual + i, n);
    if (delta) r = add(r, n == 16 ? load(delta + i) : load_partial(delta + i, n));
    if (residual_out) n == 16 ? store(residual_out + i, r) : store_partial(residual_out + i, r, n);
    squares = fma(r, r, squares);
  }
  const F32x16 inverse = set1(1.0f / sqrtf(reduce_add(squares) / static_cast<float>(H) + eps));
  for (int64_t i = 0; i < H; i += 16) {
    const int n = i < full ? 16 : rest;
    F32x16 r = n == 16 ? load(residual + i) : load_partial(residual + i, n);
    // residual_out may be the memory of residual, which then already holds the sum.
    if (delta && residual_out != residual) r = add(r, n == 16 ? load(delta + i) : load_partial(delta + i, n));
    const F32x16 w = n == 16 ? load(weight + i) : load_partial(weight + i, n);
    const F32x16 normed = mul(mul(r, inverse), w);
    n == 16 ? store(y + i, normed) : store_partial(y + i, normed, n);
  }
}

template <class Out>
void rms_norm_rows(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
                   Out* y, int64_t S, int64_t H, float eps) {
#pragma omp parallel for num_threads(pm_num_threads()) schedule(static) if (S > 1)
  for (int64_t s = 0; s < S; ++s) {
    const int64_t from = (rows ? rows[s] : s) * H;
    rms_norm_row(residual + from, delta ? delta + from : nullptr, weight, residual_out ? residual_out + s * H : nullptr,
                 y + s * H, H, eps);
  }
}

}  // namespace

int rms_norm(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
             void* y, pm_dtype y_dtype, int64_t S, int64_t H, float eps, void*) {
  if (y_dtype == PM_BF16)
    rms_norm_rows(residual, delta, rows, weight, residual_out, static_cast<bf16*>(y), S, H, eps);
  else
    rms_norm_rows(residual, delta, rows, weight, residual_out, static_cast<float*>(y), S, H, eps);
  return PM_OK;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(rms_norm,
          (const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out, void* y,
           pm_dtype y_dtype, int64_t S, int64_t H, float eps, void* stream),
          (residual, delta, rows, weight, residual_out, y, y_dtype, S, H, eps, stream))
