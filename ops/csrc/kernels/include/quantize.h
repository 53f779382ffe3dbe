// Weights to int8, and the packed layouts the kernels multiply with.
//
// quantize    w [N, K] in w_dtype (PM_F32, PM_BF16, PM_F16), its rows w_stride elements apart -> q [N, K], scale [N]
//             scale[n] = max_k |w[n, k]| / 127 (1 for a row of zeros); q = round_half_even(w / scale). A row with a value
//             that is not finite gets scale NaN and zeros: whoever calls refuses it. This is the canonical form, on disk and
//             off.
// pack        w [N, K] in w_dtype, its rows w_stride elements apart, into `packed`: [tiles of rows][tiles of columns] of
// 2048
//             bytes, [16 words of a row][32 rows][4 bytes]. A word is
//               PM_I8           4 columns, each q + 128     "tile32x64"
//               PM_BF16, PM_F16 2 columns, as they are      "tile32x32"
//             Row n of w becomes row `first` + n / 16 * `step` * 16 + n % 16 (step 1: as they come; step 2: every other half
//             tile, as gate and up rows share tiles). Rows and columns no w is packed into must hold zeros: PM_INT8_ZERO, or
//             0.0.
#ifndef PADDLE_MIXTRAL_QUANTIZE_H_
#define PADDLE_MIXTRAL_QUANTIZE_H_

#include "common.h"

#define PM_TILE_ROWS 32
#define PM_TILE_WORDS 16  // of a row
#define PM_TILE_BYTES (PM_TILE_ROWS * PM_TILE_WORDS * 4)
#define PM_INT8_TILE_COLUMNS (PM_TILE_WORDS * 4)
#define PM_BF16_TILE_COLUMNS (PM_TILE_WORDS * 2)
#define PM_INT8_ZERO 128
#define PM_INT8_LARGEST_K 65536

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_quantize_int8(const void* w, pm_dtype w_dtype, int64_t w_stride, int8_t* q, float* scale, int64_t N, int64_t K,
                         void* stream);

int pm_cpu_pack(const void* w, pm_dtype w_dtype, int64_t w_stride, void* packed, int64_t first, int64_t step, int64_t N,
                int64_t K, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_QUANTIZE_H_
