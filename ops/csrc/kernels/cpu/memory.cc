// Reading memory as fast as it goes: include/memory.h.
#include "../include/memory.h"

#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int64_t kPiece = 1 << 20;  // bytes

#if defined(__AVX512F__)
constexpr int kVector = 64;  // bytes of a register
#elif defined(__AVX2__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
typedef uint64_t Vector __attribute__((vector_size(kVector), aligned(8), may_alias));

// The xor of the words of whole pages, read in order. (Two nested loops over an array of sums gcc 12 jams, so that they read
// two places in turns: a core then reads at less than half its rate.)
uint64_t checksum_of(const uint8_t* x, int64_t bytes) {
  Vector a = {}, b = {}, c = {}, d = {};
  for (const uint8_t* end = x + bytes; x < end; x += 4 * kVector) {
    const Vector* vectors = reinterpret_cast<const Vector*>(x);
    a ^= vectors[0];
    b ^= vectors[1];
    c ^= vectors[2];
    d ^= vectors[3];
  }
  const Vector all = a ^ b ^ c ^ d;
  uint64_t total = 0;
  for (int i = 0; i < kVector / 8; ++i) total ^= all[i];
  return total;
}

}  // namespace

int read_memory(const void* x, int64_t bytes, uint64_t* checksum, void*) {
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  uint64_t total = 0;
#pragma omp parallel for num_threads(pm_num_threads()) schedule(dynamic) reduction(^ : total)
  for (int64_t i = 0; i < pieces; ++i) {
    const uint8_t* piece = static_cast<const uint8_t*>(x) + i * kPiece;
    const int64_t size = bytes - i * kPiece < kPiece ? bytes - i * kPiece : kPiece;
    total ^= checksum_of(piece, size);
  }
  *checksum = total;
  return PM_OK;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(read_memory, (const void* x, int64_t bytes, uint64_t* checksum, void* stream), (x, bytes, checksum, stream))
