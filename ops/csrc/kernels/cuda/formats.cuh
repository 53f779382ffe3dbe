// From the types of a call to the format of its products (tile.cuh).
#ifndef PADDLE_MIXTRAL_CUDA_FORMATS_CUH_
#define PADDLE_MIXTRAL_CUDA_FORMATS_CUH_

#include "../include/quantize.h"
#include "tile.cuh"

namespace pm::cuda {

inline const char* name_of(pm_dtype dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8"};
  return dtype >= PM_F32 && dtype <= PM_I8 ? kNames[dtype] : "an unknown type";
}

// run(format), or PM_UNSUPPORTED. columns: the largest K of the products.
template <class Run>
int with_format(const char* name, pm_dtype x_dtype, pm_dtype w_dtype, int activation_bits, int64_t columns, Run run) {
  if (x_dtype != PM_BF16 && x_dtype != PM_F16)
    return fail(PM_UNSUPPORTED, "%s: activations are %s, a GPU needs bfloat16 or float16", name, name_of(x_dtype));
  if (w_dtype == PM_I8) {
    if (columns > PM_INT8_LARGEST_K)
      return fail(PM_UNSUPPORTED, "%s: int8 rows of %lld columns, needs at most %d", name, static_cast<long long>(columns),
                  PM_INT8_LARGEST_K);
    if (activation_bits == 16) return run(FixedPoint<2>());
    if (activation_bits == 8) return run(FixedPoint<1>());
    return fail(PM_UNSUPPORTED, "%s: activation_bits is %d, needs 16 or 8", name, activation_bits);
  }
  if (w_dtype != x_dtype)
    return fail(PM_UNSUPPORTED, "%s: weights are %s, needs int8 or the activations' %s", name, name_of(w_dtype),
                name_of(x_dtype));
  return x_dtype == PM_BF16 ? run(Floating<__nv_bfloat16>()) : run(Floating<__half>());
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_FORMATS_CUH_
