// Weights to int8, and the packed layout the kernels multiply with.
//
// quantize    w [N, K] in w_dtype (PM_F32, PM_BF16, PM_F16), its rows w_stride elements apart -> q [N, K], scale [N]
//             scale[n] = max_k |w[n, k]| / 127 (1 for a row of zeros); q = round_half_even(w / scale). A row with a value
//             that is not finite gets scale NaN and zeros: whoever calls refuses it. This is the canonical form, on disk and
//             off.
// pack        q [N, K], its rows q_stride elements apart, into `packed`: bytes [tiles of rows][tiles of columns][2048].
//             A tile is 32 rows and 64 columns: [16 groups of 4 columns][32 rows][4 columns], each byte q + 128.
//             Row n of q becomes row `first` + n / 16 * `step` * 16 + n % 16 (step 1: as they come; step 2: every other half
//             tile, as gate and up rows share tiles). Rows and columns no q is packed into must hold PM_INT8_ZERO.
#ifndef PADDLE_MIXTRAL_QUANTIZE_H_
#define PADDLE_MIXTRAL_QUANTIZE_H_

#include "common.h"

#define PM_INT8_TILE_ROWS 32
#define PM_INT8_TILE_COLUMNS 64
#define PM_INT8_ZERO 128
#define PM_INT8_LARGEST_K 65536

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_quantize_int8(const void* w, pm_dtype w_dtype, int64_t w_stride, int8_t* q, float* scale, int64_t N, int64_t K,
                         void* stream);

int pm_cpu_pack_int8(const int8_t* q, int64_t q_stride, uint8_t* packed, int64_t first, int64_t step, int64_t N, int64_t K,
                     void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_QUANTIZE_H_
