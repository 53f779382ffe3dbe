// RMS normalisation: include/norm.h, with the rows that include/device.h adds.
//
// A block a row. The row is read once, by all threads, and waits in shared memory; one warp sums its squares as the CPU
// does, element i in lane i % 16 and the lanes folded as reduce_add of cpu/vec.h does, so every bit equals the CPU's.
#include "vector.cuh"

namespace pm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostShared = 160 * 1024;  // sm_80 has 163 KB

// Elements are moved four at a time where Four, which needs H % 4 == 0.
template <bool Four>
__global__ void __launch_bounds__(kThreads)
    rms_norm_decode(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
                    void* y, pm_dtype y_dtype, int64_t H, float eps) {
  float* const row = reinterpret_cast<float*>(dynamic_shared());  // [H]
  __shared__ float inverse;
  prefetch_floats(weight, H);
  await_previous();
  const int64_t s = blockIdx.x, from = rows ? rows[s] : s;
  residual += from * H;
  if (delta) delta += from * H;
  if (residual_out) residual_out += s * H;

  if constexpr (Four) {
    for (int64_t i = 4 * threadIdx.x; i < H; i += 4 * kThreads) {
      float4 r = *reinterpret_cast<const float4*>(residual + i);
      if (delta) {
        const float4 d = *reinterpret_cast<const float4*>(delta + i);
        r = make_float4(__fadd_rn(r.x, d.x), __fadd_rn(r.y, d.y), __fadd_rn(r.z, d.z), __fadd_rn(r.w, d.w));
      }
      *reinterpret_cast<float4*>(row + i) = r;
      if (residual_out) *reinterpret_cast<float4*>(residual_out + i) = r;
    }
  } else {
    for (int64_t i = threadIdx.x; i < H; i += kThreads) {
      const float r = delta ? __fadd_rn(residual[i], delta[i]) : residual[i];
      row[i] = r;
      if (residual_out) residual_out[i] = r;
    }
  }
  __syncthreads();

  if (threadIdx.x < 32) {  // lanes 16 .. 31 repeat lanes 0 .. 15
    float squares = 0.0f;
#pragma unroll 8
    for (int64_t i = threadIdx.x % 16; i < H; i += 16) squares = __fmaf_rn(row[i], row[i], squares);
    const float sum = sum_of_half_warp(squares);
    if (threadIdx.x == 0) inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(H)), eps)));
  }
  __syncthreads();

  const float scale = inverse;
  if constexpr (Four) {
    for (int64_t i = 4 * threadIdx.x; i < H; i += 4 * kThreads) {
      const float4 r = *reinterpret_cast<const float4*>(row + i), w = *reinterpret_cast<const float4*>(weight + i);
      store_four(y, y_dtype, s * H + i,
                 make_float4(__fmul_rn(__fmul_rn(r.x, scale), w.x), __fmul_rn(__fmul_rn(r.y, scale), w.y),
                             __fmul_rn(__fmul_rn(r.z, scale), w.z), __fmul_rn(__fmul_rn(r.w, scale), w.w)));
    }
  } else {
    for (int64_t i = threadIdx.x; i < H; i += kThreads)
      store_element(y, y_dtype, s * H + i, __fmul_rn(__fmul_rn(row[i], scale), weight[i]));
  }
}

}  // namespace

int rms_norm(const float* residual, const float* delta, const int32_t* rows, const float* weight, float* residual_out,
             void* y, pm_dtype y_dtype, int64_t S, int64_t H, float eps, void* stream) {
  const int64_t shared = H * static_cast<int64_t>(sizeof(float));
  if (shared > kMostShared)
    return fail(PM_UNSUPPORTED, "rms_norm keeps a row in shared memory, at most %lld elements; hidden size is %lld",
                static_cast<long long>(kMostShared / 4), static_cast<long long>(H));
  return launch(Overlap::previous, H % 4 == 0 ? rms_norm_decode<true> : rms_norm_decode<false>,
                dim3(static_cast<unsigned>(S)), dim3(kThreads), static_cast<size_t>(shared), stream, residual, delta, rows,
                weight, residual_out, y, y_dtype, H, eps);
}

}  // namespace pm::cuda
