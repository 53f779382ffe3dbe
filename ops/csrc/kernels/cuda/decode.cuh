// Few tokens: weights stream from memory once, as fast as it gives them.
//
// BLOCK       a strip of 32 rows of weights; each of its four warps a quarter of K, with all tokens of the product in groups
//             of eight. Sums of the quarters meet in shared memory and are added in their order.
// RING        every warp has its own: it copies tiles (and its tokens') to shared memory kStages - 1 tiles ahead, and reads
//             none but its own. So the main loop has no barrier of the block, no bank conflict and no registers that wait
//             for memory. It does not stop between the segments of a block (the experts of one strip).
// BUDGET      (counted in machine code, not measured; tests/gpu/PREDICTIONS.md) an H200 brings 4.8 TB/s / (132 processors *
//             1.755 GHz) = 21 bytes a cycle and processor; with a latency of 0.8 us that is 29 KB under way. Each block
//             keeps 4 warps * 7 tiles * 2 KB = 56 KB under way (8 tokens), two blocks to a processor where there are so
//             many. A warp's tile is 115 to 170 instructions with one group of tokens; memory brings one in 390 issue slots
//             of a scheduler. What a warp alone waits for (loads, two products after each other) is about 150 cycles a tile:
//             55 bytes a cycle of the four warps of one block.
#ifndef PADDLE_MIXTRAL_CUDA_DECODE_CUH_
#define PADDLE_MIXTRAL_CUDA_DECODE_CUH_

#include <algorithm>

#include "tile.cuh"
#include "vector.cuh"

namespace pm::cuda {

constexpr int kDecodeThreads = 32 * kQuarters;
constexpr int kDecodeBlocks = 2;   // of a processor
constexpr int kDecodeTokens = 32;  // the most of a product

// Blocks that are on the GPU at once, each with so many bytes of dynamic shared memory, at most `most`.
inline int decode_blocks(size_t shared_bytes, int64_t most, unsigned* blocks) {
  constexpr size_t kBeside = 5 * 1024;  // static, and what the system takes
  int processors, room;
  if (int status = device_attribute(cudaDevAttrMultiProcessorCount, &processors)) return status;
  if (int status = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &room)) return status;
  const bool alone = kDecodeBlocks * (shared_bytes + kBeside) > static_cast<size_t>(room);
  *blocks = static_cast<unsigned>(std::min<int64_t>(most, int64_t{processors} * (alone ? 1 : kDecodeBlocks)));
  return PM_OK;
}

// Whole numbers i < total with i % gridDim.x == blockIdx.x.
__device__ __forceinline__ int of_this_block(int total) {
  return (total - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
}

constexpr int kMostStages = 8;  // of a ring

// Resident: the block has its tokens in shared memory; else they come through the ring.
template <class Format, int Groups, bool Resident, int Stages = kMostStages>
struct Stream {
  using Sums = typename Format::Sum[Groups][Format::kPlanes][2][4];

  static constexpr int kPlaneBytes = 32 * 16;  // a group of tokens, a tile
  static constexpr int kStageBytes = kTileBytes + (Resident ? 0 : Groups * Format::kPlanes * kPlaneBytes);
  static constexpr int kRoom = Groups * Format::kPlanes > 4 ? 144 * 1024 : 96 * 1024;  // of one block a processor, or of two
  static constexpr int kFit = kRoom / (kQuarters * kStageBytes);
  static constexpr int kStages = kFit < Stages ? kFit : Stages;
  static constexpr int kRingBytes = kStages * kStageBytes;

  // Sums of the four warps with a group: [warp][plane][token][row], rows padded against bank conflicts.
  static constexpr int kTokens = Groups * kGroupTokens, kRowStride = kTileRows + 4;
  static constexpr int kWarpSums = Format::kPlanes * kGroupTokens * kRowStride;
  static constexpr int kSumBytes = kQuarters * kWarpSums * 4;
  static constexpr int kSharedBytes = kQuarters * kRingBytes + kSumBytes;
  static_assert(kStages >= 3, "a ring that hides no latency");

  // What a segment multiplies: this warp's quarter of a strip (its first tile), and the plane of zero or more tokens that is
  // this lane's (NULL: none), at the quarter's first tile.
  struct Segment {
    const unsigned char* weights;
    const unsigned char* token[Groups];
  };

  unsigned char* ring;           // of this warp
  typename Format::Sum* sums;    // of the block
  int lane, warp, tiles, first;  // of this warp's quarter: its tiles, the first one
  int segments, segment = 0, tile = 0, in = 0, out = 0;
  int64_t stride;  // of the tokens' planes
  Segment from = {};

  __device__ Stream(unsigned char* shared, int tiles_of_k, int segments_, int64_t stride_)
      : segments(segments_), stride(stride_) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    ring = shared + warp * kRingBytes;
    sums = reinterpret_cast<typename Format::Sum*>(shared + kQuarters * kRingBytes);
    const int quarter = quarter_tiles(tiles_of_k);
    first = warp * quarter;
    tiles = max(0, min(quarter, tiles_of_k - first));
  }

  // The lane's chunk of a token of rows: of group n its token `index`.
  __device__ const unsigned char* of_token(const TokenRows& rows, int64_t index) const {
    return rows.data + index * Format::kPlanes * rows.stride + first * kTokenBytes + lane % 4 * 16;
  }

  // locate(i): segment i. Its weights are fetched while the kernel before still runs, its tokens when that one has ended.
  template <class Locate>
  __device__ void start(const Locate& locate) {
    if (tiles == 0) segments = 0;
    if (segments > 0) from = locate(0);
    if constexpr (Resident) {
      for (int i = 0; i < kStages - 1; ++i) {
        push<true, false>(locate);
        cp_async_commit();
      }
      await_previous();
    } else {
      const Segment begin = from;
      for (int i = 0; i < kStages - 1; ++i) push<true, false>(locate);
      await_previous();
      from = begin, segment = tile = in = 0;
      for (int i = 0; i < kStages - 1; ++i) {
        push<false, true>(locate);
        cp_async_commit();
      }
    }
  }

  // Weights, tokens or both of the next tile to where the oldest one was.
  template <bool Weights, bool Tokens, class Locate>
  __device__ __forceinline__ void push(const Locate& locate) {
    if (segment >= segments) return;
    unsigned char* to = ring + in * kStageBytes;
    if constexpr (Weights) {
#pragma unroll
      for (int chunk = lane; chunk < kChunks; chunk += 32) cp_async_16(to + place(chunk), from.weights + chunk * 16, true);
    }
    from.weights += kTileBytes;
#pragma unroll
    for (int n = 0; n < Groups; ++n)
      if (!Resident && from.token[n] != nullptr) {
        if constexpr (Tokens) {
#pragma unroll
          for (int plane = 0; plane < Format::kPlanes; ++plane)
            cp_async_16(to + kTileBytes + (n * Format::kPlanes + plane) * kPlaneBytes + lane * 16,
                        from.token[n] + plane * stride, true);
        }
        from.token[n] += kTokenBytes;
      }
    in = in + 1 == kStages ? 0 : in + 1;
    if (++tile == tiles) {
      tile = 0;
      if (++segment < segments) from = locate(segment);
    }
  }

  // The sums of the next segment's quarter with its first `groups` groups of tokens. resident: this lane's chunks of its
  // token of each group, at the quarter's first tile.
  template <class Locate>
  __device__ __forceinline__ void multiply_segment(Sums& sum, int groups, const unsigned char* const (&resident)[Groups],
                                                   const Locate& locate) {
#pragma unroll
    for (int n = 0; n < Groups; ++n)
#pragma unroll
      for (int plane = 0; plane < Format::kPlanes; ++plane)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[n][plane][i / 4][i % 4] = 0;
    for (int i = 0; i < tiles; ++i) {
      cp_async_wait<kStages - 2>();
      __syncwarp();
      push<true, !Resident>(locate);
      cp_async_commit();
      const unsigned char* at = ring + out * kStageBytes;
      out = out + 1 == kStages ? 0 : out + 1;
      const TileFragment w = load_tile(at, lane);
#pragma unroll
      for (int n = 0; n < Groups; ++n)
        if (n < groups) {
#pragma unroll
          for (int plane = 0; plane < Format::kPlanes; ++plane) {
            const unsigned char* tokens = Resident
                                              ? resident[n] + plane * stride + i * kTokenBytes
                                              : at + kTileBytes + (n * Format::kPlanes + plane) * kPlaneBytes + lane * 16;
            multiply<Format>(sum[n][plane], w, *reinterpret_cast<const uint4*>(tokens));
          }
        }
    }
  }

  // The warps give each other their sums, a group of tokens at a time: take(n), by all threads, has those of group n in
  // total().
  template <class Take>
  __device__ __forceinline__ void share(const Sums& sum, int groups, const Take& take) const {
    const int group = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < Groups; ++n)
      if (n < groups) {
        __syncthreads();  // the last ones have been read
#pragma unroll
        for (int plane = 0; plane < Format::kPlanes; ++plane)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              const int at = warp * kWarpSums + (plane * kGroupTokens + 2 * t + i) * kRowStride;
              const auto& of = sum[n][plane][m];
              store_pair(sums + at + 16 * m + 2 * group, of[i], of[2 + i]);
            }
        __syncthreads();
        take(n);
      }
  }

  // The product of a row with token 0 .. 7 of the group.
  __device__ float total(int token, int row, float scale, int32_t token_total) const {
    typename Format::Sum sum[Format::kPlanes];
#pragma unroll
    for (int plane = 0; plane < Format::kPlanes; ++plane) {
      sum[plane] = 0;
#pragma unroll
      for (int quarter = 0; quarter < kQuarters; ++quarter)
        sum[plane] += sums[quarter * kWarpSums + (plane * kGroupTokens + token) * kRowStride + row];
    }
    return product<Format>(sum, scale, token_total);
  }
};

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_DECODE_CUH_
