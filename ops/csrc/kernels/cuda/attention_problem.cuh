// What the launches of append attention share: the arguments of include/attention.h, and what the first tells the others.
#ifndef PADDLE_MIXTRAL_CUDA_ATTENTION_PROBLEM_CUH_
#define PADDLE_MIXTRAL_CUDA_ATTENTION_PROBLEM_CUH_

#include "attention_tile.cuh"

namespace pm::cuda::attention {

constexpr int kMostWidth = 128;                                                // of a head
constexpr int kWarps = 4, kThreads = 32 * kWarps, kTileRows = kRows * kWarps;  // of a block that attends

// Sequences with several new tokens are split over their keys, too, where they have at most so many (64 rows for each
// key/value head are few blocks) and at least so many chunks.
constexpr int kSplitTokens = 32, kSplitChunks = 2;

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
  int32_t* items_to;   // [B + 1]: before sequence b, of split sequences: (chunk, unit) pairs,
  int32_t* parts_to;   // [B + 1]: (chunk, token) pairs,
  int32_t* tiles_to;   // [B + 1]: of the others: tiles of rows
  int32_t* arrived;    // [T, units(1), Hkv]: chunks that are summed up, of unit i of a sequence at its first token's, + i
  Softmax* parts;      // [(chunk, token) pairs, Hq]
  float* part_values;  // [(chunk, token) pairs, Hq, D]
  int split_parts;     // (chunk, token) pairs there is room for beside those of sequences with one new token

  __host__ __device__ int group() const { return Hq / Hkv; }
  // Units of 16 rows, (token, query head) pairs, that `tokens` tokens have for one key/value head.
  __host__ __device__ int units(int tokens) const { return (tokens * group() + kRows - 1) / kRows; }
  __device__ int length(int b) const { return cu_seqlens[b + 1] - cu_seqlens[b]; }
  // Of the positions that a sequence's new tokens see: the first chunk, how many.
  __device__ int first_chunk(int b) const { return first_seen(context_lens[b], window) / kChunk; }
  __device__ int chunks(int b) const { return (context_lens[b] + length(b) - 1) / kChunk - first_chunk(b) + 1; }
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
