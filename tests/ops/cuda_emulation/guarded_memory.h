// Memory whose ends are pages that nothing may touch, so that to go beyond them is a fault.
#ifndef CUDA_EMULATION_GUARDED_MEMORY_H_
#define CUDA_EMULATION_GUARDED_MEMORY_H_

#include <stddef.h>

namespace simt {

constexpr size_t kPage = 4096;
inline size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// The first of whole_pages(bytes) bytes between two such pages. Where there is no memory, the process ends.
unsigned char* between_guards(size_t bytes);

// The upper end of a thread's stack, which has such a page below it.
unsigned char* stack_top(unsigned thread);

// Fills it with kPoison (simt.h).
void poison(unsigned char* from, unsigned char* to);

}  // namespace simt
#endif  // CUDA_EMULATION_GUARDED_MEMORY_H_
