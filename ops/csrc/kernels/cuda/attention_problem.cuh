// What the launches of append attention share: the arguments of include/attention.h, and what the first tells the others.
#ifndef PADDLE_MIXTRAL_CUDA_ATTENTION_PROBLEM_CUH_
#define PADDLE_MIXTRAL_CUDA_ATTENTION_PROBLEM_CUH_

#include "attention_tile.cuh"

namespace pm::cuda::attention {

constexpr int kMostWidth = 128;                        // of a head
constexpr int kWarps = 4, kTileRows = kRows * kWarps;  // of a block that takes rows of a longer sequence

template <class Element>
struct Problem {
  const Element* qkv;
  Element *key_cache, *value_cache;
  const int32_t *cu_seqlens, *context_lens, *block_tables;
  Element* out;
  int64_t M;
  int T, B, Hq, Hkv, D, block_size, window;
  float scale;  // times log2(e)
  // workspace
  Element* queries;    // [T, Hq, D], rotated
  int32_t* chunks_to;  // [B + 1]: chunks of decodes before sequence b
  int32_t* tiles_to;   // [B + 1]: tiles of rows of longer sequences before sequence b
  Softmax* parts;      // [chunks, Hq]
  float* part_values;  // [chunks, Hq, D]

  __host__ __device__ int group() const { return Hq / Hkv; }
  // Units of 16 query heads that one key/value head has.
  __host__ __device__ int units() const { return (group() + kRows - 1) / kRows; }
  __device__ int length(int b) const { return cu_seqlens[b + 1] - cu_seqlens[b]; }
  __device__ Pages pages(int b, int kv, int first, int end) const {
    const uint32_t row = static_cast<uint32_t>(D / 8), head = static_cast<uint32_t>(block_size) * row;
    return {block_tables + b * M,
            static_cast<uint32_t>(Hkv) * head,
            static_cast<uint32_t>(kv) * head,
            row,
            block_size,
            first,
            end};
  }
};

// The last b with starts[b] <= x, of starts[0] .. starts[n].
__device__ __forceinline__ int owner(const int32_t* starts, int n, int x) {
  int low = 0;
  for (int high = n; high - low > 1;) {
    const int middle = (low + high) / 2;
    (starts[middle] <= x ? low : high) = middle;
  }
  return low;
}

}  // namespace pm::cuda::attention
#endif  // PADDLE_MIXTRAL_CUDA_ATTENTION_PROBLEM_CUH_
