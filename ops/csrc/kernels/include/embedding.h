// Token embedding: rows of a table as the residual stream begins.
//
// SHAPES      ids [T] int32 in 0 .. V-1; table [V, H] in table_dtype (PM_F32, PM_BF16), row-major
//             out [T, H] float32
// DEFINITION  out[t] = table[ids[t]]
// EXAMPLE     Mixtral-8x7B: V = 32000, H = 4096
#ifndef PADDLE_MIXTRAL_EMBEDDING_H_
#define PADDLE_MIXTRAL_EMBEDDING_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_embedding(const int32_t* ids, const void* table, pm_dtype table_dtype, float* out, int64_t T, int64_t V,
                     int64_t H, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_EMBEDDING_H_
