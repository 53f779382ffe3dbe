#include "guarded_memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "simt.h"

namespace simt {
namespace {

constexpr size_t kStack = 64 * 1024;

unsigned char* map(size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("CUDA emulation: mmap");
    abort();
  }
  return static_cast<unsigned char*>(memory);
}

}  // namespace

unsigned char* between_guards(size_t bytes) {
  unsigned char* const memory = map(whole_pages(bytes) + 2 * kPage, PROT_NONE) + kPage;
  mprotect(memory, whole_pages(bytes), PROT_READ | PROT_WRITE);
  return memory;
}

unsigned char* stack_top(unsigned thread) {
  static unsigned char* stacks = [] {
    unsigned char* memory = map(kMostThreads * (kPage + kStack), PROT_READ | PROT_WRITE);
    for (unsigned i = 0; i < kMostThreads; ++i) mprotect(memory + i * (kPage + kStack), kPage, PROT_NONE);
    return memory;
  }();
  return stacks + (thread + 1) * (kPage + kStack);
}

void poison(unsigned char* from, unsigned char* to) {
  for (; from + 4 <= to; from += 4) memcpy(from, &kPoison, 4);
}

}  // namespace simt

extern "C" {

// `bytes` of "device" memory that end, up to 15 bytes, at a page nothing may touch; filled with kPoison.
__attribute__((visibility("default"))) void* pm_emulation_allocate(uint64_t bytes) {
  const size_t rounded = (bytes + 15) / 16 * 16, pages = simt::whole_pages(rounded);
  unsigned char* const memory = simt::between_guards(rounded);
  simt::poison(memory, memory + pages);
  return memory + pages - rounded;
}

__attribute__((visibility("default"))) void pm_emulation_free(void* memory, uint64_t bytes) {
  const size_t rounded = (bytes + 15) / 16 * 16, pages = simt::whole_pages(rounded);
  munmap(static_cast<unsigned char*>(memory) + rounded - pages - simt::kPage, pages + 2 * simt::kPage);
}
}
