// How every kernel of this library is launched, and its dynamic shared memory.
//
// Plain C++ on the runtime's API, without <<<>>>: the same sources are compiled for GPUs by nvcc and, to be tested on any
// machine, by g++ against tests/ops/cuda_emulation.
#ifndef PADDLE_MIXTRAL_CUDA_LAUNCH_CUH_
#define PADDLE_MIXTRAL_CUDA_LAUNCH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdlib.h>
#include <string.h>

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

// More than 48 KB of dynamic shared memory must be asked for.
template <typename Kernel>
int allow_shared(Kernel* kernel, size_t shared_bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes <= kWithoutAsking) return PM_OK;
  const int bytes = static_cast<int>(shared_bytes);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) return PM_OK;
  return fail(PM_LAUNCH_FAILED, "%d bytes of shared memory: %s", bytes, cudaGetErrorString(error));
}

enum class Overlap { none, previous };

// PADDLE_MIXTRAL_CUDA_OVERLAP=1: kernels that may (below) begin before the one before them has ended.
inline int asked_to_overlap(bool* overlap) {
  static const char* const asked = getenv("PADDLE_MIXTRAL_CUDA_OVERLAP");
  if (asked != nullptr && strcmp(asked, "") != 0 && strcmp(asked, "0") != 0 && strcmp(asked, "1") != 0)
    return fail(PM_UNSUPPORTED, "PADDLE_MIXTRAL_CUDA_OVERLAP is '%s', needs 0 or 1", asked);
#ifdef PM_EMULATE
  *overlap = true;  // the emulation checks that it could be
#else
  *overlap = asked != nullptr && strcmp(asked, "1") == 0;
#endif
  return PM_OK;
}

#ifdef PM_EMULATE
// A stream does everything at once; that the kernel's threads await the previous one is checked.
inline cudaError_t launch_over_previous(const void*, dim3, dim3, size_t, cudaStream_t, void**, bool* launched) {
  simt::expect_await();
  *launched = false;
  return cudaSuccess;
}
#else
// Where the kernel was compiled for a GPU that has this (sm_90): other code of it would not wait.
inline cudaError_t launch_over_previous(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                                        void** arguments, bool* launched) {
  cudaFuncAttributes compiled;
  const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  *launched = error == cudaSuccess && compiled.ptxVersion >= 90;
  if (!*launched) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = grid;
  configuration.blockDim = block;
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = 1;
  return cudaLaunchKernelExC(&configuration, kernel, arguments);
}
#endif

// Enqueues `kernel` on `stream`, with the arguments converted to its parameters' types. A grid with no blocks is no work.
//
// Overlap::previous: the kernel may begin while the one before it on the stream still runs (programmatic dependent launch).
// For that each of its threads calls await_previous() (ptx.cuh) before it reads or writes global memory, but for weights, or
// leaves: then all kernels before have ended, and only then may the next one begin. What no kernel on the stream writes any
// more, as weights, may be read before.
template <typename... Parameters, typename... Arguments>
int launch(Overlap overlap, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return PM_OK;
  if (const int status = allow_shared(kernel, shared_bytes)) return status;
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  void* addresses[sizeof...(Parameters) + 1];
  collect_addresses(values, addresses, std::index_sequence_for<Parameters...>());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (overlap == Overlap::previous) {
    bool asked = false, launched = false;
    if (const int status = asked_to_overlap(&asked)) return status;
    if (asked) {
      const auto* function = reinterpret_cast<const void*>(kernel);
      const int status =
          check(launch_over_previous(function, grid, block, shared_bytes, cuda_stream, addresses, &launched), "launch");
      if (launched || status != PM_OK) return status;
    }
  }
  return check(cudaLaunchKernel(kernel, grid, block, addresses, shared_bytes, cuda_stream), "launch");
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Arguments... arguments) {
  return launch(Overlap::none, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_LAUNCH_CUH_
