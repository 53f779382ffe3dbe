// Linear layers: plain (float32 / bfloat16 weights) and weight-only int8.
//
// SHAPES      x [T, K] in x_dtype (PM_F32, PM_BF16); w in w_dtype: PM_F32 [N, K] row-major, or PM_BF16 or PM_I8 as
// quantize.h
//             packs it, K <= 65,536 for PM_I8; scale [N] float32 for PM_I8, else NULL; activation_bits 16 or 8 for PM_I8,
//             else without meaning; y [T, N] in y_dtype (PM_F32, PM_BF16)
// DEFINITION  y[t, n] = scale[n] * sum_k x[t, k] * w[n, k]      (scale = 1 where there is none), sums in float32
//             With PM_BF16 weights x is first rounded to bfloat16 (nearest, halves to even), and denormals, of operands or
//             sums, count as zeros.
//             With PM_I8 x is first rounded to fixed point of activation_bits: s[t] = max_k |x[t, k]| / Q with Q = 32639
//             (16) or 127 (8), q = round_half_even(x * (Q / max_k |x[t, k]|)), and y[t, n] = (float)(sum_k q[t, k] *
//             w[n, k]) * s[t] * scale[n], the sum exact. A token whose elements are all below 2^-100 counts as zeros; one
//             that is not finite gives NaN.
// ORDER       PM_F32: sixteen partial sums, k mod 16, in increasing k with fused multiply-add, then the fixed tree of vec.h.
//             PM_BF16: one sum by fused multiply-add over k = 1, 0, 3, 2, 5, 4, ...; on the tile unit (amx_bf16) of every
//             32 columns two sums by fused multiply-add, of the even k and the odd, which are added and then added to y.
//             y[t, n] never depends on T, N, the number of threads or, but for that unit, the instruction set.
// REGULARITIES T = 1..64 in decode, up to thousands in prefill; K and N usually multiples of 64, every size works
// EXAMPLE     Mixtral-8x7B: qkv N=6144 K=4096, o N=4096 K=4096, lm_head N=32000 K=4096

#ifndef PADDLE_MIXTRAL_LINEAR_H_
#define PADDLE_MIXTRAL_LINEAR_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_linear(const void* x, pm_dtype x_dtype, const void* w, pm_dtype w_dtype, const float* scale, int activation_bits,
                  void* y, pm_dtype y_dtype, int64_t T, int64_t N, int64_t K, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_LINEAR_H_
