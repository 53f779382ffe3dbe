// Reading memory as fast as it goes: include/memory.h.
#include "../include/memory.h"

#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int64_t kPage = 4096, kPiece = 256 * kPage;  // bytes

// The xor of the words of whole pages. Ahead: each line of the next page is asked for; else the processor's own prefetch is
// left to itself.
template <bool Ahead>
uint64_t checksum_of(const uint64_t* words, int64_t bytes) {
  uint64_t lanes[32] = {}, total = 0;
  for (int64_t i = 0; i < bytes / 8; i += 32) {
    if (Ahead)
      for (int line = 0; line < 4; ++line) __builtin_prefetch(words + i + (kPage + line * 64) / 8, 0, 2);
    for (int j = 0; j < 32; ++j) lanes[j] ^= words[i + j];
  }
  for (int j = 0; j < 32; ++j) total ^= lanes[j];
  return total;
}

}  // namespace

int read_memory(const void* x, int64_t bytes, int ahead, uint64_t* checksum, void*) {
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  uint64_t total = 0;
#pragma omp parallel for num_threads(pm_num_threads()) schedule(dynamic) reduction(^ : total)
  for (int64_t i = 0; i < pieces; ++i) {
    const uint64_t* words = static_cast<const uint64_t*>(x) + i * kPiece / 8;
    const int64_t size = bytes - i * kPiece < kPiece ? bytes - i * kPiece : kPiece;
    total ^= ahead ? checksum_of<true>(words, size) : checksum_of<false>(words, size);
  }
  *checksum = total;
  return PM_OK;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(read_memory, (const void* x, int64_t bytes, int ahead, uint64_t* checksum, void* stream),
          (x, bytes, ahead, checksum, stream))
