// How every kernel of this library is launched, and its dynamic shared memory.
//
// Plain C++ on the runtime's API, without <<<>>>: the same sources are compiled for GPUs by nvcc and, to be tested on any
// machine, by g++ against tests/ops/cuda_emulation.
#ifndef PADDLE_MIXTRAL_CUDA_LAUNCH_CUH_
#define PADDLE_MIXTRAL_CUDA_LAUNCH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <tuple>

#include "kernels.h"

namespace pm::cuda {

// A block's dynamic shared memory, 128-byte aligned: the only `extern __shared__` of the library.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef PM_EMULATE
  return simt::dynamic_shared();
#else
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#endif
}

// PM_OK, or PM_LAUNCH_FAILED with the runtime's text: `if (int status = check(cudaMemsetAsync(...), "memset")) return
// status;`
inline int check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return PM_OK;
  return fail(PM_LAUNCH_FAILED, "%s: %s", what, cudaGetErrorString(error));
}

// Of the GPU in use.
inline int device_attribute(cudaDeviceAttr attribute, int* value) {
  int device;
  if (const int status = check(cudaGetDevice(&device), "which GPU")) return status;
  return check(cudaDeviceGetAttribute(value, attribute, device), "an attribute of the GPU");
}

template <typename Tuple, size_t... I>
void collect_addresses(Tuple& values, void** addresses, std::index_sequence<I...>) {
  ((addresses[I] = &std::get<I>(values)), ...);
}

// Enqueues `kernel` on `stream`, with the arguments converted to its parameters' types. A grid with no blocks is no work.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return PM_OK;
  if (shared_bytes > kWithoutAsking) {
    const int bytes = static_cast<int>(shared_bytes);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
      return fail(PM_LAUNCH_FAILED, "%d bytes of shared memory: %s", bytes, cudaGetErrorString(error));
    }
  }
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  void* addresses[sizeof...(Parameters) + 1];
  collect_addresses(values, addresses, std::index_sequence_for<Parameters...>());
  return check(cudaLaunchKernel(kernel, grid, block, addresses, shared_bytes, static_cast<cudaStream_t>(stream)), "launch");
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_LAUNCH_CUH_
