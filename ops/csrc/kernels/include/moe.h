// Sparse mixture of experts as Mixtral has it.
//
// SHAPES      x [T, H] in x_dtype (PM_F32, PM_BF16); gate [E, H] float32
//             w13 [E, 2I, H]: rows 0..I-1 are w1 (gate projection), rows I..2I-1 are w3 (up projection)
//             w2 [E, H, I]; both in w_dtype: PM_F32 row-major, or PM_BF16 or PM_I8, each expert as quantize.h packs it,
//             w13 with gate rows 16i..16i+15 and up rows 16i..16i+15 as the halves of tile i; H, I <= 65,536 for PM_I8
//             w13_scale [E, 2I], w2_scale [E, H] float32 for PM_I8, else NULL; activation_bits 16 or 8 for PM_I8, else
//             without meaning
//             y [T, H] float32
// DEFINITION  p = softmax(x gate^T) in float32; the top_k experts of largest p (ties: the lower index), in decreasing p;
//             their p renormalised to sum 1; for each chosen expert e:
//             h = silu(w13_scale * (w1 x)) * (w13_scale * (w3 x)) in float32;   y = sum over chosen e, in increasing
//             expert index, of p_e * (w2_scale * (w2 h))
//             What enters a product with w13 or w2, x or h, is first rounded as linear.h says: to bfloat16 with PM_BF16
//             weights, to fixed point of activation_bits with PM_I8.
// ORDER       every product as linear.h says; y[t] never depends on the other tokens or threads, nor on the instruction set
//             where linear.h's sums do not.
// SOURCE      Jiang et al., Mixtral of Experts, arXiv:2401.04088
// REGULARITIES T = 1..64 in decode, thousands in prefill; E = 8, top_k = 2; experts unevenly loaded, some not at all
// EXAMPLE     Mixtral-8x7B: H = 4096, I = 14336; 8x22B: H = 6144, I = 16384; under tensor parallelism I is the rank's share
#ifndef PADDLE_MIXTRAL_MOE_H_
#define PADDLE_MIXTRAL_MOE_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_fused_moe(const void* x, pm_dtype x_dtype, const float* gate, const void* w13, const void* w2, pm_dtype w_dtype,
                     const float* w13_scale, const float* w2_scale, int activation_bits, float* y, int64_t T, int64_t H,
                     int64_t I, int64_t E, int64_t top_k, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_MOE_H_
