// Tokens from rows of activations: rounded to fixed point, or padded to whole tiles (TokenRows of tile.cuh).
//
// DEFINITION  include/linear.h: s = max |x| / Q with Q = 32639 (two planes) or 127 (one), q = round_half_even(x * (Q / max
//             |x|)); all below 2^-100: zeros; not finite: s is NaN. The CPU's bits: a maximum and sums of integers do not
//             depend on their order.
// BUDGET      (counted in machine code, not measured) twice through a row, the second time from the cache: 12 instructions
//             an element, four loads of each thread under way. h of Mixtral-8x7B, 14,336 elements in a block of 512 threads:
//             about 350 instructions a thread.
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
};

// Eight elements of a row.
template <class Element>
struct Eight {
  uint32_t word[kRun * sizeof(Element) / 4];

  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(Element) == 4)
      return __uint_as_float(word[i]);
    else
      return unpack<Element>(word[i / 2], i % 2);
  }
  // The larger of `bits` and of |elements|, as bits: those of 16 bits in a word's upper half.
  __device__ __forceinline__ uint32_t largest(uint32_t bits) const {
    for (const uint32_t two : word) {
      if constexpr (sizeof(Element) == 2) bits = max(bits, two << 16 & 0x7fff0000u);
      bits = max(bits, two & (sizeof(Element) == 2 ? 0x7fff0000u : 0x7fffffffu));
    }
    return bits;
  }
  // The value of such bits.
  static __device__ __forceinline__ float of_bits(uint32_t bits) {
    if constexpr (sizeof(Element) == 4)
      return __uint_as_float(bits);
    else
      return unpack<Element>(bits, 1);
  }
};

// take(run, elements) of this thread's share of a row, zeros beyond K. Rows of whole runs are 16-byte aligned.
template <class Element, class Take>
__device__ __forceinline__ void for_each_run(const Element* row, int64_t K, int runs, const Take& take) {
  constexpr int kAtOnce = 4, kWords = kRun * sizeof(Element) / 16;
  const int whole = K % kRun == 0 ? static_cast<int>(K / kRun) : 0;
  const int step = blockDim.x;
#pragma unroll 1
  for (int first = threadIdx.x; first < whole; first += kAtOnce * step) {
    Eight<Element> elements[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const uint4* const from = reinterpret_cast<const uint4*>(row) + min(first + j * step, whole - 1) * kWords;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4 words = from[i];
        uint32_t* const to = elements[j].word + 4 * i;
        to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * step < whole) take(first + j * step, elements[j]);
  }
#pragma unroll 1
  for (int run = whole + threadIdx.x; run < runs; run += blockDim.x) {
    Element of[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) of[i] = run * kRun + i < K ? row[run * kRun + i] : Element(0.0f);
    Eight<Element> elements;
    memcpy(elements.word, of, sizeof(of));
    take(run, elements);
  }
}

constexpr int kBlockWarps = 16;  // of the largest block that prepares tokens

// The largest and the sum over a block's threads, `Tokens` of each at once.
template <int Tokens>
struct TokenScratch {
  uint32_t largest[Tokens][kBlockWarps];  // bits of |x| in float32
  int32_t total[Tokens][kBlockWarps];
};

// round_tokens of rows of Element.
template <int Planes, class Element, int Tokens>
__device__ void round_rows(const Element* x, int64_t K, int count, int tiles, TokenRows to, TokenScratch<Tokens>& scratch) {
  constexpr float kLargestQ = Planes == 2 ? 32639.0f : 127.0f;
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: v added, rounded, has v's integer (halves to even) in its lower bits
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int runs = tiles * (FixedPoint<Planes>::kColumns / kRun);
#pragma unroll 2
  for (int token = 0; token < count; ++token) {
    uint32_t bits = 0;
    for_each_run(x + token * K, K, runs, [&](int, const Eight<Element>& run) { bits = run.largest(bits); });
    bits = __reduce_max_sync(~0u, __float_as_uint(Eight<Element>::of_bits(bits)));
    if (lane == 0) scratch.largest[token][warp] = bits;
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
    unsigned char* const row = to.data + token * Planes * to.stride;
    int total[2] = {0, 0};  // of planes
    for_each_run(x + token * K, K, runs, [&](int run, const Eight<Element>& elements) {
      uint32_t plane[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t q[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          q[i] = __float_as_uint(__fadd_rn(__fmul_rn(elements.value(4 * half + i), inverse), kWhole));
        const auto bytes = [&](uint32_t selector, uint32_t add) {
          const uint32_t low = __byte_perm(q[0] + add, q[1] + add, selector);
          return nothing ? 0u : __byte_perm(low, __byte_perm(q[2] + add, q[3] + add, selector), 0x5410);
        };
        plane[0][half] = bytes(0x0040, 0);
        plane[1][half] = Planes == 2 ? bytes(0x0051, 128) : 0;  // q = lo + 256 hi, lo signed
#pragma unroll
        for (int i = 0; i < Planes; ++i) total[i] = __dp4a(static_cast<int>(plane[i][half]), 0x01010101, total[i]);
      }
#pragma unroll
      for (int i = 0; i < Planes; ++i)
        *reinterpret_cast<uint2*>(row + i * to.stride + run * kRun) = make_uint2(plane[i][0], plane[i][1]);
    });
    const int32_t sum = __reduce_add_sync(~0u, total[0] + 256 * total[1]);
    if (lane == 0) scratch.total[token][warp] = sum;
  }
  __syncthreads();
  for (int token = threadIdx.x; token < count; token += blockDim.x) {
    int32_t total = 0;
    for (int i = 0; i < warps; ++i) total += scratch.total[token][i];
    to.total[token] = total;
  }
  __syncthreads();
}

// Rounds tokens first .. first + count - 1 (count <= Tokens) to fixed point, by the whole block, to rows 0 .. count - 1;
// `tiles` of K. to.scale and to.total are written by the first threads of the block; ends with a barrier.
template <int Planes, int Tokens>
__device__ void round_tokens(const Activations& x, int64_t first, int count, int tiles, TokenRows to,
                             TokenScratch<Tokens>& scratch) {
  const auto round = [&](auto of) {
    using Element = decltype(of);
    round_rows<Planes>(static_cast<const Element*>(x.data) + first * x.K, x.K, count, tiles, to, scratch);
  };
  if (x.dtype == PM_BF16)
    round(__nv_bfloat16());
  else if (x.dtype == PM_F16)
    round(__half());
  else
    round(0.0f);
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
  await_previous();
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
