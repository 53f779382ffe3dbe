// Single values as the CPU's kernels have them (cpu/vec.h): types, exp and the sum of sixteen lanes, to the same bits.
#ifndef PADDLE_MIXTRAL_CUDA_SCALAR_CUH_
#define PADDLE_MIXTRAL_CUDA_SCALAR_CUH_

#include <stdint.h>

#include "launch.cuh"

namespace pm::cuda {

__host__ __device__ inline int64_t equal_parts(int64_t total, int64_t largest) { return (total + largest - 1) / largest; }

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Element i of an array of any type of activations.
__device__ __forceinline__ float load_element(const void* p, pm_dtype dtype, int64_t i) {
  if (dtype == PM_BF16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  if (dtype == PM_F16) return to_float(static_cast<const __half*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

__device__ __forceinline__ void store_element(void* p, pm_dtype dtype, int64_t i, float x) {
  if (dtype == PM_BF16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  else if (dtype == PM_F16)
    static_cast<__half*>(p)[i] = __float2half_rn(x);
  else
    static_cast<float*>(p)[i] = x;
}

// e^x: vec.h's polynomial, operation by operation.
__device__ __forceinline__ float exp_as_cpu(float x) {
  constexpr float kLowest = -87.33654f;
  const float c = fminf(fmaxf(x, kLowest), 88.7f);
  const int n = min(__float2int_rn(c * 1.44269504088896341f), 127);
  const float whole = static_cast<float>(n);
  float r = __fmaf_rn(whole, -0.693359375f, c);
  r = __fmaf_rn(whole, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  p = __fmaf_rn(p, __fmul_rn(r, r), __fadd_rn(r, 1.0f));
  return x < kLowest ? 0.0f : __fmul_rn(p, __int_as_float((n + 127) << 23));
}

// silu(gate) * up
__device__ __forceinline__ float swiglu(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, exp_as_cpu(0.0f - gate))), up);
}

// Of the sixteen lanes of a half warp, for its first lane: vec.h's reduce_add.
__device__ __forceinline__ float sum_of_half_warp(float v) {
  for (int step = 8; step > 0; step /= 2) v = __fadd_rn(v, __shfl_down_sync(~0u, v, step, 16));
  return v;
}

// Arrays of a workspace, each 256-byte aligned; of no workspace, only `used` is meant.
struct Workspace {
  unsigned char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += equal_parts(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return p;
  }
};

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_SCALAR_CUH_
