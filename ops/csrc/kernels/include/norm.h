// RMS normalisation with the residual add.
//
// SHAPES      residual, delta [T, H] float32; rows [S] int32 in 0 .. T-1, or NULL: all of them in order, S = T
//             weight [H] float32; residual_out [S, H] float32; y [S, H] in y_dtype (PM_F32 or PM_BF16)
// DEFINITION  r[s] = residual[rows[s]] + delta[rows[s]]   (delta may be NULL: r = residual)
//             residual_out = r              (may be NULL; without rows also the same memory as residual)
//             y = r / sqrt(mean(r * r) + eps) * weight
// SOURCE      Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467
// EXAMPLE     Mixtral-8x7B: H = 4096, eps = 1e-5
#ifndef PADDLE_MIXTRAL_NORM_H_
#define PADDLE_MIXTRAL_NORM_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_rms_norm(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
                    void* y, pm_dtype y_dtype, int64_t S, int64_t H, float eps, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_NORM_H_
