// What the 1024 threads of a block find out together, in an order that is fixed or does not matter.
#ifndef PADDLE_MIXTRAL_CUDA_BLOCK_CUH_
#define PADDLE_MIXTRAL_CUDA_BLOCK_CUH_

#include <stdint.h>

#include "launch.cuh"

namespace pm::cuda::block {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
static_assert(kWarps == 32, "one warp combines what all warps have");

// Shared memory of the functions below; free again when they return.
struct Scratch {
  static constexpr int kDigits = 256, kCopies = 16;
  uint64_t warps[kWarps];
  uint64_t found[2];
  uint32_t low[kDigits * kCopies], high[kDigits * kCopies];  // a histogram of 64-bit masses
};

// All threads' values combined, in each of them: neighbours first, then warps. T has 8 bytes.
template <class T, class Combine>
__device__ T all(Scratch& scratch, T value, Combine combine) {
  static_assert(sizeof(T) == sizeof(uint64_t), "a place of Scratch::warps");
  T* const warps = reinterpret_cast<T*>(scratch.warps);
  for (int step = 1; step < 32; step *= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[threadIdx.x % 32];
  for (int step = 1; step < 32; step *= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
  __syncthreads();
  return value;
}

template <class T>
__device__ T sum(Scratch& scratch, T value) {
  return all(scratch, value, [](T a, T b) { return a + b; });
}
__device__ inline uint64_t least(Scratch& scratch, uint64_t value) {
  return all(scratch, value, [](uint64_t a, uint64_t b) { return a < b ? a : b; });
}

// Sums of lanes 0 .. this one.
__device__ __forceinline__ uint64_t running_sum(uint64_t value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t before = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// The first lane whose running sum exceeds `limit`; there must be one.
__device__ __forceinline__ int first_above(uint64_t running, uint64_t limit) {
  return __ffs(static_cast<int>(__ballot_sync(~0u, running > limit))) - 1;
}

// The first i of 0 .. n-1 at which mass(0) + ... + mass(i) exceeds limit(mass(0) + ... + mass(n-1)); there must be one.
template <class Mass, class Limit>
__device__ int64_t locate(Scratch& scratch, int64_t n, Mass mass, Limit limit_of) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  int64_t share = (n + kWarps - 1) / kWarps;  // of a warp, contiguous
  int64_t begin = warp * share, end = min(n, begin + share);
  uint64_t mine = 0;
  for (int64_t i = begin + lane; i < end; i += 32) mine += mass(i);
  mine = running_sum(mine);
  if (lane == 31) scratch.warps[warp] = mine;
  __syncthreads();
  uint64_t running = running_sum(scratch.warps[lane]);
  uint64_t limit = limit_of(__shfl_sync(~0u, running, 31));
  const int winner = first_above(running, limit);
  const uint64_t before = __shfl_sync(~0u, running, max(winner - 1, 0));
  if (warp == winner) {
    if (winner > 0) limit -= before;
    while (share > 1) {  // the warp's share is cut into 32, again and again
      share = (share + 31) / 32;
      const int64_t from = begin + lane * share, to = min(end, from + share);
      mine = 0;
      for (int64_t i = from; i < to; ++i) mine += mass(i);
      running = running_sum(mine);
      const int part = first_above(running, limit);
      const uint64_t less = __shfl_sync(~0u, running, max(part - 1, 0));
      if (part > 0) limit -= less;
      begin += part * share;
      end = min(end, begin + share);
    }
    if (lane == 0) scratch.found[0] = static_cast<uint64_t>(begin);
  }
  __syncthreads();
  const int64_t found = static_cast<int64_t>(scratch.found[0]);
  __syncthreads();
  return found;
}

struct Selected {
  uint32_t key;
  uint64_t before;  // mass of smaller keys
};

// The smallest key at which the mass of the keys up to it reaches `target`, which the mass of all must. A radix digit at a
// time; masses are integers, so the order in which they are added does not matter.
template <class Key, class Mass>
__device__ Selected select(Scratch& scratch, int64_t n, Key key, Mass mass, uint64_t target) {
  constexpr int kDigits = Scratch::kDigits, kCopies = Scratch::kCopies, kEach = kDigits / 32;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  Selected found = {0, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t above = shift == 24 ? 0 : ~0u << (shift + 8);
    for (int i = thread; i < kDigits * kCopies; i += kThreads) scratch.low[i] = scratch.high[i] = 0;
    __syncthreads();
    for (int64_t i = thread; i < n; i += kThreads) {
      const uint32_t k = key(i);
      if ((k & above) != found.key) continue;
      const uint64_t m = mass(i);
      if (m == 0) continue;
      const uint32_t low = static_cast<uint32_t>(m), at = (k >> shift) % kDigits * kCopies + lane % kCopies;
      const uint32_t old = atomicAdd(&scratch.low[at], low);
      const uint32_t high = static_cast<uint32_t>(m >> 32) + (old + low < low ? 1 : 0);
      if (high) atomicAdd(&scratch.high[at], high);
    }
    __syncthreads();
    if (thread < kDigits) {
      uint64_t sum = 0;
      for (int i = 0; i < kCopies; ++i) {
        const int copy = thread * kCopies + (i + thread) % kCopies;
        sum += (uint64_t{scratch.high[copy]} << 32) + scratch.low[copy];
      }
      scratch.low[thread * kCopies] = static_cast<uint32_t>(sum);
      scratch.high[thread * kCopies] = static_cast<uint32_t>(sum >> 32);
    }
    __syncthreads();
    if (thread < 32) {
      const auto of = [&](int digit) {
        return (uint64_t{scratch.high[digit * kCopies]} << 32) + scratch.low[digit * kCopies];
      };
      uint64_t mine = 0;
      for (int i = 0; i < kEach; ++i) mine += of(lane * kEach + i);
      const uint64_t running = running_sum(mine);
      if (lane == first_above(running, target - 1 - found.before)) {
        uint64_t before = found.before + running - mine;
        int digit = lane * kEach;
        while (before + of(digit) < target) before += of(digit++);
        scratch.found[0] = found.key | static_cast<uint32_t>(digit) << shift;
        scratch.found[1] = before;
      }
    }
    __syncthreads();
    found = {static_cast<uint32_t>(scratch.found[0]), scratch.found[1]};
  }
  __syncthreads();
  return found;
}

}  // namespace pm::cuda::block
#endif  // PADDLE_MIXTRAL_CUDA_BLOCK_CUH_
