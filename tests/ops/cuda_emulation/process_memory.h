// The runtime's memory that one process shares with others: cudaMalloc gives a file in memory (memfd) mapped here, and a
// handle says where in /proc another process finds the file to map it, too.
#ifndef CUDA_EMULATION_PROCESS_MEMORY_H_
#define CUDA_EMULATION_PROCESS_MEMORY_H_

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct cudaIpcMemHandle_t {
  char reserved[64];
};
enum { cudaIpcMemLazyEnablePeerAccess = 1, cudaHostAllocMapped = 2 };

namespace simt {
struct Mapping {
  int file;
  size_t bytes;
};
inline std::map<void*, Mapping>& mappings() {
  static std::map<void*, Mapping> all;
  return all;
}
inline cudaError_t map_file(void** p, int file) {
  struct stat info;
  if (file < 0 || fstat(file, &info) != 0) return cudaErrorInvalidValue;
  void* memory = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
  mappings()[memory] = {file, static_cast<size_t>(info.st_size)};
  *p = memory;
  return cudaSuccess;
}
}  // namespace simt

inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  simt::count_wait();
  const int file = memfd_create("device memory", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return cudaErrorMemoryAllocation;
  return simt::map_file(p, file);
}
inline cudaError_t cudaFree(void* p) {
  simt::count_wait();
  const auto found = simt::mappings().find(p);
  if (found == simt::mappings().end()) return p ? cudaErrorInvalidValue : cudaSuccess;
  munmap(p, found->second.bytes);
  close(found->second.file);
  simt::mappings().erase(found);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
inline cudaError_t cudaHostGetDevicePointer(void** on_device, void* p, unsigned) {
  *on_device = p;
  return cudaSuccess;
}

inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* p) {
  const auto found = simt::mappings().find(p);
  if (found == simt::mappings().end()) return cudaErrorInvalidValue;
  *handle = {};
  snprintf(handle->reserved, sizeof(handle->reserved), "/proc/%d/fd/%d", getpid(), found->second.file);
  return cudaSuccess;
}
// With CUDA_EMULATION_PEER_ACCESS set to "none" no GPU maps another's memory; to "feigned", what one writes there is never
// seen; to "partial", what is not in the first pages is not.
inline cudaError_t cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t handle, unsigned) {
  const std::string access = getenv("CUDA_EMULATION_PEER_ACCESS") ? getenv("CUDA_EMULATION_PEER_ACCESS") : "";
  if (access == "none") return cudaErrorPeerAccessUnsupported;
  const cudaError_t error = simt::map_file(p, open(handle.reserved, O_RDWR | O_CLOEXEC));
  if (error != cudaSuccess || access.empty()) return error;
  const size_t shared = access == "partial" ? 5 * 4096 : 0;
  mmap(static_cast<char*>(*p) + shared, simt::mappings()[*p].bytes - shared, PROT_READ | PROT_WRITE,
       MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return cudaSuccess;
}
inline cudaError_t cudaIpcCloseMemHandle(void* p) { return cudaFree(p); }

#endif  // CUDA_EMULATION_PROCESS_MEMORY_H_
