// The runtime's host functions. Device memory is the host's; a stream does everything at once.
#ifndef CUDA_EMULATION_HOST_RUNTIME_H_
#define CUDA_EMULATION_HOST_RUNTIME_H_

#include <map>
#include <string>
#include <tuple>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorPeerAccessUnsupported = 217,
  cudaErrorLaunchFailure = 719
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace simt {
inline std::string& launch_error() {
  static std::string text;
  return text;
}
// By kernel: bytes of dynamic shared memory it may have, where it asked for more than 48 KB.
inline std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}
}  // namespace simt

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return simt::launch_error().c_str();
  if (error == cudaErrorPeerAccessUnsupported) return "peer access is not supported between these two devices";
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "out of memory";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  memmove(to, from, bytes);
  return cudaSuccess;
}
template <typename Symbol>
cudaError_t cudaMemcpyFromSymbol(void* to, const Symbol& symbol, size_t bytes) {
  simt::count_wait();
  memcpy(to, &symbol, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  simt::count_wait();
  return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  simt::count_wait();
  return cudaMemsetAsync(p, value, bytes);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  simt::count_wait();
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  simt::count_wait();
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int most_shared = static_cast<int>(simt::most_shared());
  *value = attribute == cudaDevAttrMultiProcessorCount            ? simt::multiprocessors()
           : attribute == cudaDevAttrComputeCapabilityMajor       ? simt::capability()
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? most_shared
                                                                  : most_shared + 1024;  // a processor has for its system
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > simt::most_shared()) return cudaErrorInvalidValue;
  simt::shared_limits()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

namespace simt {
template <typename... Parameters, size_t... I>
const char* run_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                       std::index_sequence<I...>) {
  auto call = [&] { kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[I])...); };
  return run(grid, block, shared_bytes, [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
}
}  // namespace simt

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const auto limit = simt::shared_limits().find(reinterpret_cast<const void*>(kernel));
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (shared_bytes > (limit == simt::shared_limits().end() ? 48 * 1024 : limit->second)) return cudaErrorInvalidValue;
  if (threads == 0 || threads > simt::kMostThreads || block.z > 64) return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidValue;
  }
  const char* error =
      simt::run_kernel(kernel, grid, block, arguments, shared_bytes, std::index_sequence_for<Parameters...>());
  if (!error) return cudaSuccess;
  simt::launch_error() = error;
  return cudaErrorLaunchFailure;
}

#include "process_memory.h"

#endif  // CUDA_EMULATION_HOST_RUNTIME_H_
