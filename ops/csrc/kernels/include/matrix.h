// How fast this machine multiplies and adds: the ceiling of everything compute-bound, measured with the threads kernels use.
//
// DEFINITION  every thread runs `rounds` rounds of independent chains of s += a * b whose operands never leave registers;
//             operations = multiplications and additions of all threads together; rate = operations / the time this takes
// UNITS       float32      fused multiply-add of the kernels' instruction set (avx512, avx2, or scalar for the baseline)
//             avx512_bf16  vdpbf16ps: bfloat16 pairs into float32
//             avx512_vnni  vpdpbusd: bytes, by fours, into int32
//             amx_bf16, amx_int8  tiles 16 x 32 bfloat16 (16 x 64 bytes) into 16 x 16
//             An instruction set in use (pm_cpu_isa) has those up to its own: avx512 has no avx512_vnni, say.
#ifndef PADDLE_MIXTRAL_MATRIX_H_
#define PADDLE_MIXTRAL_MATRIX_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  PM_UNIT_FLOAT32 = 0,
  PM_UNIT_AVX512_BF16 = 1,
  PM_UNIT_AVX512_VNNI = 2,
  PM_UNIT_AMX_BF16 = 3,
  PM_UNIT_AMX_INT8 = 4,
} pm_matrix_unit;

// 1 where the processor, its operating system and the instruction set in use have the unit, else 0.
int pm_cpu_has_matrix_unit(int unit);

// The unit must be there. *operations receives the number done.
int pm_cpu_run_matrix_unit(int unit, int64_t rounds, int64_t* operations, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_MATRIX_H_
