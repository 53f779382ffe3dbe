// How fast this machine reads memory: the ceiling of everything memory-bound, measured with the threads kernels use.
//
// DEFINITION  checksum = xor of the 8-byte words of x; bytes is a multiple of 4096. Threads take pieces of 1 MiB as kernels
//             take work: one that is held up elsewhere keeps none waiting.
// EXAMPLE     a 1 GiB buffer, far larger than any cache; bandwidth = bytes / the time this takes
#ifndef PADDLE_MIXTRAL_MEMORY_H_
#define PADDLE_MIXTRAL_MEMORY_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

int pm_cpu_read_memory(const void* x, int64_t bytes, uint64_t* checksum, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_MEMORY_H_
