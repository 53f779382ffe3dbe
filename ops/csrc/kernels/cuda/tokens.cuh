// Tokens from rows of activations: rounded to fixed point, or padded to whole tiles (TokenRows of tile.cuh).
//
// DEFINITION  include/linear.h: s = max |x| / Q with Q = 32639 (two planes) or 127 (one), q = round_half_even(x * (Q / max
//             |x|)); all below 2^-100: zeros; not finite: s is NaN. The CPU's bits: a maximum and sums of integers do not
//             depend on their order.
// BUDGET      (estimated, not measured) a block a row, twice through it: of 14,336 elements (h of Mixtral-8x7B) four runs of
//             eight a thread, the second time from the cache; about two latencies of memory and 500 instructions.
#ifndef PADDLE_MIXTRAL_CUDA_TOKENS_CUH_
#define PADDLE_MIXTRAL_CUDA_TOKENS_CUH_

#include "tile.cuh"
#include "vector.cuh"

namespace pm::cuda {

constexpr int kRun = 8;  // elements a thread takes at a time

// Rows [tokens][K] of activations.
struct Activations {
  const void* data;
  pm_dtype dtype;
  int64_t K;

  // Elements k .. k + 7 of a row, zeros beyond K. Rows of whole runs are 16-byte aligned as `data` is.
  __device__ __forceinline__ void load(int64_t token, int64_t k, float (&v)[kRun]) const {
    const int64_t at = token * K + k;
    if (K % kRun == 0 && k < K) {
      if (dtype == PM_F32) {
        const float* from = static_cast<const float*>(data) + at;
        const float4 a = load_four(from), b = load_four(from + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        return;
      }
      const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        v[i] = dtype == PM_BF16 ? unpack<__nv_bfloat16>(word[i / 2], i % 2) : unpack<__half>(word[i / 2], i % 2);
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[i] = k + i < K ? load_element(data, dtype, at + i) : 0.0f;
  }
};

constexpr int kBlockWarps = 16;  // of the largest block that prepares tokens

// The largest and the sum over a block's threads, `Tokens` of each at once.
template <int Tokens>
struct TokenScratch {
  uint32_t largest[Tokens][kBlockWarps];  // bits of |x|
  int32_t total[Tokens][kBlockWarps];
};

// Rounds tokens 0 .. count - 1 (count <= Tokens) to fixed point, by the whole block; `tiles` of K. to.scale and to.total are
// written by the first threads of the block; ends with a barrier.
template <int Planes, int Tokens>
__device__ void round_tokens(const Activations& x, int64_t first, int count, int tiles, TokenRows to,
                             TokenScratch<Tokens>& scratch) {
  constexpr float kLargestQ = Planes == 2 ? 32639.0f : 127.0f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int runs = tiles * (FixedPoint<Planes>::kColumns / kRun);
  for (int token = 0; token < count; ++token) {
    uint32_t largest = 0;
#pragma unroll 4
    for (int run = threadIdx.x; run < runs; run += blockDim.x) {
      float v[kRun];
      x.load(first + token, static_cast<int64_t>(run) * kRun, v);
#pragma unroll
      for (int i = 0; i < kRun; ++i) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
    }
    for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    if (lane == 0) scratch.largest[token][warp] = largest;
  }
  __syncthreads();
  for (int token = 0; token < count; ++token) {
    uint32_t bits = 0;
    for (int i = 0; i < warps; ++i) bits = max(bits, scratch.largest[token][i]);
    const float largest = __uint_as_float(bits);
    const bool usable = bits < 0x7f800000u, nothing = !usable || largest < 0x1p-100f;
    const float inverse = nothing ? 0.0f : __fdiv_rn(kLargestQ, largest);
    if (threadIdx.x == 0)
      to.scale[token] = !usable ? __uint_as_float(0x7fc00000u) : nothing ? 0.0f : __fdiv_rn(largest, kLargestQ);
    unsigned char* row = to.data + token * Planes * to.stride;
    int32_t total = 0;
#pragma unroll 4
    for (int run = threadIdx.x; run < runs; run += blockDim.x) {
      float v[kRun];
      x.load(first + token, static_cast<int64_t>(run) * kRun, v);
      uint32_t lo[2] = {0, 0}, hi[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int32_t q = nothing ? 0 : __float2int_rn(__fmul_rn(v[i], inverse));
        const int32_t upper = (q + 128) >> 8;  // 0 of 8 bits
        total += q;
        lo[i / 4] |= (static_cast<uint32_t>(q) & 255u) << (i % 4 * 8);
        hi[i / 4] |= (static_cast<uint32_t>(upper) & 255u) << (i % 4 * 8);
      }
      *reinterpret_cast<uint2*>(row + run * kRun) = make_uint2(lo[0], lo[1]);
      if (Planes == 2) *reinterpret_cast<uint2*>(row + to.stride + run * kRun) = make_uint2(hi[0], hi[1]);
    }
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    if (lane == 0) scratch.total[token][warp] = total;
  }
  __syncthreads();
  for (int token = threadIdx.x; token < count; token += blockDim.x) {
    int32_t total = 0;
    for (int i = 0; i < warps; ++i) total += scratch.total[token][i];
    to.total[token] = total;
  }
  __syncthreads();
}

// Token `token` of x to row `token` of `to`, by the whole block: as Format takes it.
template <class Format>
__device__ void prepare_token(const Activations& x, int64_t token, int tiles, TokenRows to) {
  to.data += token * Format::kPlanes * to.stride;
  if constexpr (Format::kFixed) {
    __shared__ TokenScratch<1> scratch;
    to.scale += token;
    to.total += token;
    round_tokens<Format::kPlanes>(x, token, 1, tiles, to, scratch);
  } else {
    for (int k = threadIdx.x; k < tiles * Format::kColumns; k += blockDim.x) {
      const uint16_t* row = static_cast<const uint16_t*>(x.data) + token * x.K;
      reinterpret_cast<uint16_t*>(to.data)[k] = k < x.K ? row[k] : uint16_t{0};
    }
  }
}

constexpr int kPrepareThreads = 32 * kBlockWarps;

// A block a token.
template <class Format>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(Activations x, int tiles, TokenRows to) {
  prepare_token<Format>(x, blockIdx.x, tiles, to);
}

// Whether rows of x are what products take, as they are.
template <class Format>
bool taken_as_they_are(int64_t K) {
  return !Format::kFixed && K % Format::kColumns == 0;
}

// Room for `tokens` tokens of K columns.
template <class Format>
TokenRows take_tokens(Workspace& workspace, int64_t tokens, int64_t K) {
  const int64_t stride = equal_parts(K, Format::kColumns) * kTokenBytes;
  TokenRows rows{workspace.take<unsigned char>(tokens * Format::kPlanes * stride), stride, nullptr, nullptr};
  if (Format::kFixed) {
    rows.scale = workspace.take<float>(tokens);
    rows.total = workspace.take<int32_t>(tokens);
  }
  return rows;
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_TOKENS_CUH_
