// Kernels for tests/ops/test_cuda_emulation.py, some of them wrong on purpose. Each entry returns a launch's status.
#include <stdarg.h>
#include <stdio.h>

#include "../../../ops/csrc/kernels/cuda/ptx.cuh"

using pm::cuda::launch;

namespace pm::cuda {
static thread_local char error_text[512] = "none";
int fail(pm_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof(error_text), format, arguments);
  va_end(arguments);
  return status;
}
}  // namespace pm::cuda

namespace {

// out[block] = the sum of x over the block's share, by shuffles, then through shared memory.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_kernel(const float* x, float* out, int n) {
  __shared__ float partial[kThreads / 32];
  float sum = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) sum += x[i];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(~0u, sum, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = static_cast<int>(threadIdx.x) < kThreads / 32 ? partial[threadIdx.x] : 0;
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(~0u, sum, delta);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// out[k] of 32 lanes: shuffles and votes as the Programming Guide defines them.
__global__ void warp_kernel(const int* x, int* out) {
  const int lane = threadIdx.x, v = x[lane];
  out[lane] = __shfl_sync(~0u, v, 3 * lane);
  out[32 + lane] = __shfl_up_sync(~0u, v, 3);
  out[64 + lane] = __shfl_down_sync(~0u, v, 5, 16);
  out[96 + lane] = __shfl_xor_sync(~0u, v, 9);
  out[128 + lane] = static_cast<int>(__ballot_sync(~0u, v & 1));
  out[160 + lane] = __any_sync(~0u, v == x[7]);
  out[192 + lane] = __all_sync(~0u, v == x[7]);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out[224 + lane] = lane < 16 ? __shfl_sync(half, v, 1) : __shfl_sync(half, v, 17) + 1;
  out[256 + lane] = static_cast<int>(__match_any_sync(~0u, v & 3));
}

__global__ void block_kernel(int* out) {
  const int me = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int odd = __syncthreads_count(me % 3 == 0);
  const int any = __syncthreads_or(me == 5), all = __syncthreads_and(me != 5);
  if (me == 0) {
    int* mine = out + 4 * block;
    mine[0] = odd, mine[1] = any, mine[2] = all, mine[3] = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  }
}

// C [16, 8] = A [16, K] B [8, K]^T from fragments by hand, as PTX says where elements are.
template <typename Element>
__global__ void mma_16_kernel(const uint16_t* a, const uint16_t* b, float* c, int K) {
  const int group = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4] = {0, 0, 0, 0};
  for (int k = 0; k < K; k += 16) {
    uint32_t fa[4], fb[2];
    for (int r = 0; r < 4; ++r) memcpy(&fa[r], a + (group + r % 2 * 8) * K + k + 2 * t + r / 2 * 8, 4);
    for (int r = 0; r < 2; ++r) memcpy(&fb[r], b + group * K + k + 2 * t + r * 8, 4);
    pm::cuda::mma_m16n8k16<Element>(sum, fa, fb, sum);
  }
  for (int r = 0; r < 4; ++r) c[(group + r / 2 * 8) * 8 + 2 * t + r % 2] = sum[r];
}

__global__ void mma_8_kernel(const uint8_t* a, const int8_t* b, int32_t* c, int K) {
  const int group = threadIdx.x / 4, t = threadIdx.x % 4;
  int32_t sum[4] = {0, 0, 0, 0};
  for (int k = 0; k < K; k += 32) {
    uint32_t fa[4], fb[2];
    for (int r = 0; r < 4; ++r) memcpy(&fa[r], a + (group + r % 2 * 8) * K + k + 4 * t + r / 2 * 16, 4);
    for (int r = 0; r < 2; ++r) memcpy(&fb[r], b + group * K + k + 4 * t + r * 16, 4);
    pm::cuda::mma_m16n8k32_u8s8(sum, fa, fb);
  }
  for (int r = 0; r < 4; ++r) c[(group + r / 2 * 8) * 8 + 2 * t + r % 2] = sum[r];
}

// The same product as the widest kernels do it: cp.async in two stages, A by ldmatrix, B [K, 8 of 16] by ldmatrix.trans.
// What a wrong kernel of this kind does: 1 waits for one group too few, 2 lacks the barrier after the wait, 3 lacks the
// barrier before a stage is filled again.
template <int kWrong>
__global__ void pipeline_kernel(const uint16_t* a, const uint16_t* b, float* c, int K) {
  unsigned char* shared = pm::cuda::dynamic_shared();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, t = lane % 4;
  const int stages = K / 16;
  auto fill = [&](int stage) {  // A: 16 rows of 32 bytes; B: 16 rows of k of 32 bytes. Both by 64 threads of 16 bytes
    unsigned char* to = shared + stage % 2 * 1024 + threadIdx.x * 16;
    const int i = threadIdx.x % 32, row = i / 2, half = i % 2;
    const uint16_t* from = warp == 0 ? a + row * K + stage * 16 + half * 8 : b + (stage * 16 + row) * 16 + half * 8;
    pm::cuda::cp_async_16(to, from, true);
    pm::cuda::cp_async_commit();
  };
  float sum[4] = {0, 0, 0, 0};  // warp w has columns 8 w of 16
  fill(0);
  for (int stage = 0; stage < stages; ++stage) {
    if (kWrong != 3) __syncthreads();
    if (stage + 1 < stages)
      fill(stage + 1);
    else
      pm::cuda::cp_async_commit();
    pm::cuda::cp_async_wait<kWrong == 1 ? 2 : 1>();
    if (kWrong != 2) __syncthreads();
    const unsigned char* here = shared + stage % 2 * 1024;
    uint32_t fa[4], fb4[4];
    pm::cuda::ldmatrix_x4(fa, here + lane % 16 * 32 + lane / 16 * 16);
    pm::cuda::ldmatrix_x4_trans(fb4, here + 512 + lane % 16 * 32 + lane / 16 * 16);
    const uint32_t fb[2] = {fb4[2 * warp], fb4[2 * warp + 1]};
    pm::cuda::mma_m16n8k16<__nv_bfloat16>(sum, fa, fb, sum);
  }
  for (int r = 0; r < 4; ++r) c[(group + r / 2 * 8) * 16 + warp * 8 + 2 * t + r % 2] = sum[r];
}

// y[i] = x[n - 1 - i] through shared memory; wrong when no barrier is between.
template <bool kBarrier>
__global__ void turn_round_kernel(const float* x, float* y) {
  __shared__ float all[128];
  all[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = all[blockDim.x - 1 - threadIdx.x];
}

template <bool kBarrier>
__global__ void turn_round_warp_kernel(const float* x, float* y) {
  __shared__ float all[32];
  all[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncwarp();
  y[threadIdx.x] = all[31 - threadIdx.x];
}

// Reads what no thread has written.
__global__ void unwritten_kernel(float* y) {
  __shared__ float all[64];
  if (threadIdx.x < 32) all[threadIdx.x] = 1;
  __syncthreads();
  const float* dynamic = reinterpret_cast<const float*>(pm::cuda::dynamic_shared());
  y[threadIdx.x] = all[threadIdx.x];
  y[64 + threadIdx.x] = dynamic[threadIdx.x];
}

__global__ void faulty_kernel(int which, float* y) {
  const int me = threadIdx.x;
  unsigned char* shared = pm::cuda::dynamic_shared();
  float v = 1;
  if (which != 11 || me != 9) pm::cuda::await_previous();
  switch (which) {
    case 0:  // a thread ends, the others wait for it
      if (me == 5) return;
      __syncthreads();
      break;
    case 1:  // two barriers
      if (me < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 2:  // a shuffle in a branch that one lane does not take
      if (me != 7) v = __shfl_sync(~0u, v, 0);
      __syncthreads();
      break;
    case 3:  // lanes of one warp at two instructions
      v = me % 2 ? __shfl_sync(~0u, v, 0) : __shfl_xor_sync(~0u, v, 1);
      break;
    case 4:
      v = __shfl_sync(1u, v, 0);
      break;
    case 5:
      v = shared[256 + me];
      break;  // 256 bytes are there
    case 6:
      v = y[1 << 24];
      break;
    case 7:
      pm::cuda::cp_async_16(shared + 8, y, true);
      break;
    case 8:
      pm::cuda::cp_async_16(y, y, true);
      break;
    case 9: {
      uint32_t r[4];
      pm::cuda::ldmatrix_x4(r, shared + 2);
      break;
    }
    case 10:
      __trap();
      break;
    case 11:
      break;  // without having awaited anything
    default:
      v = *reinterpret_cast<volatile float*>(reinterpret_cast<char*>(y) + 2);
      break;  // half way
  }
  y[me] = v;
}

__global__ void half_kernel(const float* x, __half* y, const __half* z, float* w, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    y[i] = __float2half_rn(x[i]);
    w[i] = __half2float(z[i]);
  }
}

__global__ void atomic_kernel(int* out) {
  atomicAdd(out, 1);
  atomicMax(out + 1, static_cast<int>(blockIdx.x));
  if (threadIdx.x == 0) out[2 + atomicAdd(out + 2 + gridDim.x, 1)] = static_cast<int>(blockIdx.x);  // the order of blocks
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) int

extern "C" __attribute__((visibility("default"))) const char* last_error() { return pm::cuda::error_text; }
ENTRY sums(const float* x, float* out, int n, int blocks) {
  return launch(sum_kernel<96>, dim3(blocks), dim3(96), 0, nullptr, x, out, n);
}
ENTRY warp(const int* x, int* out) { return launch(warp_kernel, dim3(1), dim3(32), 0, nullptr, x, out); }
ENTRY block(int* out) { return launch(block_kernel, dim3(2, 3, 2), dim3(4, 5, 2), 0, nullptr, out); }
ENTRY mma_bf16(const uint16_t* a, const uint16_t* b, float* c, int K) {
  return launch(mma_16_kernel<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr, a, b, c, K);
}
ENTRY mma_f16(const uint16_t* a, const uint16_t* b, float* c, int K) {
  return launch(mma_16_kernel<__half>, dim3(1), dim3(32), 0, nullptr, a, b, c, K);
}
ENTRY mma_u8s8(const uint8_t* a, const int8_t* b, int32_t* c, int K) {
  return launch(mma_8_kernel, dim3(1), dim3(32), 0, nullptr, a, b, c, K);
}
ENTRY pipeline(int wrong, const uint16_t* a, const uint16_t* b, float* c, int K) {
  auto* kernel = wrong == 0   ? pipeline_kernel<0>
                 : wrong == 1 ? pipeline_kernel<1>
                 : wrong == 2 ? pipeline_kernel<2>
                              : pipeline_kernel<3>;
  return launch(kernel, dim3(1), dim3(64), 2048, nullptr, a, b, c, K);
}
ENTRY turn_round(int barrier, const float* x, float* y) {
  return launch(barrier ? turn_round_kernel<true> : turn_round_kernel<false>, dim3(1), dim3(128), 0, nullptr, x, y);
}
ENTRY turn_round_warp(int barrier, const float* x, float* y) {
  return launch(barrier ? turn_round_warp_kernel<true> : turn_round_warp_kernel<false>, dim3(1), dim3(32), 0, nullptr, x, y);
}
ENTRY unwritten(float* y, int bytes) { return launch(unwritten_kernel, dim3(1), dim3(64), bytes, nullptr, y); }
ENTRY faulty(int which, float* y) {
  return launch(pm::cuda::Overlap::previous, faulty_kernel, dim3(1), dim3(64), 256, nullptr, which, y);
}
ENTRY no_threads() { return launch(unwritten_kernel, dim3(1), dim3(0), 256, nullptr, nullptr); }
ENTRY halves(const float* x, __half* y, const __half* z, float* w, int n) {
  return launch(half_kernel, dim3(1), dim3(32), 0, nullptr, x, y, z, w, n);
}
ENTRY atomics(int* out, int blocks) { return launch(atomic_kernel, dim3(blocks), dim3(64), 0, nullptr, out); }
