// Reading memory as fast as it goes: include/memory.h.
#include "../include/memory.h"

#include <omp.h>

#include "dispatch.h"

namespace pm {
namespace PM_ISA {

int read_memory(const void* x, int64_t bytes, uint64_t* checksum, void*) {
  const uint64_t* words = static_cast<const uint64_t*>(x);
  uint64_t total = 0;
#pragma omp parallel num_threads(pm_num_threads()) reduction(^ : total)
  {
    const int64_t pages = bytes / 4096, threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = pages * thread / threads * 512, last = pages * (thread + 1) / threads * 512;
    uint64_t lanes[32] = {};
    for (int64_t i = first; i < last; i += 32)
      for (int j = 0; j < 32; ++j) lanes[j] ^= words[i + j];
    for (int j = 0; j < 32; ++j) total ^= lanes[j];
  }
  *checksum = total;
  return PM_OK;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(read_memory, (const void* x, int64_t bytes, uint64_t* checksum, void* stream), (x, bytes, checksum, stream))
