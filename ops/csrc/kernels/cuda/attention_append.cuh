// Append attention's first launch: queries are rotated into the workspace, keys into their pages, values copied, and the
// work of the second is planned.
#ifndef PADDLE_MIXTRAL_CUDA_ATTENTION_APPEND_CUH_
#define PADDLE_MIXTRAL_CUDA_ATTENTION_APPEND_CUH_

#include "attention_problem.cuh"

namespace pm::cuda::attention {

constexpr int kAppendThreads = 128;

struct InverseFrequencies {
  float of[kMostWidth / 2];
};

// Sums of lanes 0 .. this one.
__device__ __forceinline__ int running_sum(int value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// One warp: which sequences are split, and the work before each sequence. Of those with several new tokens as many are split
// as there is room for.
template <class Element>
__device__ void plan(const Problem<Element>& p) {
  const int lane = static_cast<int>(threadIdx.x);
  int items_before = 0, parts_before = 0, tiles_before = 0, asked_before = 0;
  for (int base = 0; base < p.B; base += 32) {
    const int b = base + lane, length = b < p.B ? p.length(b) : 0, chunks = length > 0 ? p.chunks(b) : 0;
    const bool asks = length > 1 && length <= kSplitTokens && chunks >= kSplitChunks;
    const int asked = asked_before + running_sum(asks ? length * chunks : 0);
    const bool split = length == 1 || (asks && asked <= p.split_parts);
    const int tiles = static_cast<int>((int64_t{length} * p.group() + kTileRows - 1) / kTileRows);
    const int items_to = items_before + running_sum(split ? chunks * p.units(length) : 0);
    const int parts_to = parts_before + running_sum(split ? chunks * length : 0);
    const int tiles_to = tiles_before + running_sum(split ? 0 : tiles);
    if (b < p.B) {
      p.items_to[b + 1] = items_to;
      p.parts_to[b + 1] = parts_to;
      p.tiles_to[b + 1] = tiles_to;
    }
    items_before = __shfl_sync(~0u, items_to, 31);
    parts_before = __shfl_sync(~0u, parts_to, 31);
    tiles_before = __shfl_sync(~0u, tiles_to, 31);
    asked_before = __shfl_sync(~0u, asked, 31);
  }
  if (lane == 0) p.items_to[0] = p.parts_to[0] = p.tiles_to[0] = 0;
}

// NeoX rotation of elements i .. i + 3 and their partners of one head.
template <class Element>
__device__ __forceinline__ void rotate(const Element* x, const float* cosines, const float* sines, Element* y, int half,
                                       int i) {
  const float4 a = load_four(x + i), b = load_four(x + half + i);
  const float4 c = load_four(cosines + i), s = load_four(sines + i);
  const auto first = [](float a, float b, float c, float s) { return __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s)); };
  const auto second = [](float a, float b, float c, float s) { return __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s)); };
  store_four(y + i, make_float4(first(a.x, b.x, c.x, s.x), first(a.y, b.y, c.y, s.y), first(a.z, b.z, c.z, s.z),
                                first(a.w, b.w, c.w, s.w)));
  store_four(y + half + i, make_float4(second(a.x, b.x, c.x, s.x), second(a.y, b.y, c.y, s.y), second(a.z, b.z, c.z, s.z),
                                       second(a.w, b.w, c.w, s.w)));
}

// Block x: token x; the last block plans. Its heads are dealt to the blocks y.
template <class Element>
__global__ void __launch_bounds__(kAppendThreads) append_decode(const Problem<Element> p, const InverseFrequencies inverse) {
  __shared__ float cosines[kMostWidth / 2], sines[kMostWidth / 2];
  await_previous();
  const int t = static_cast<int>(blockIdx.x), half = p.D / 2, group = p.group();
  if (t == p.T) {
    if (blockIdx.y == 0 && threadIdx.x < 32) plan(p);
    return;
  }
  const int b = owner(p.cu_seqlens, p.B, t), position = p.context_lens[b] + t - p.cu_seqlens[b];
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kAppendThreads) {
    const double angle = __fmul_rn(static_cast<float>(position), inverse.of[i]);
    cosines[i] = static_cast<float>(cos(angle));
    sines[i] = static_cast<float>(sin(angle));
  }
  __syncthreads();
  const Element* const row = p.qkv + int64_t{t} * (p.Hq + 2 * p.Hkv) * p.D;
  const Pages pages = p.pages(b, 0, position, position + 1);
  const int64_t slot = int64_t{pages.offset(position)} * 8;
  const int quads = half / 4;  // a head's fours of pairs
  for (int kv = static_cast<int>(blockIdx.y); kv < p.Hkv; kv += static_cast<int>(gridDim.y)) {
    const int64_t cached = slot + int64_t{kv} * p.block_size * p.D;
    const int units = p.units(1), unit = static_cast<int>(threadIdx.x);
    if (unit < units) p.arrived[(int64_t{t} * units + unit) * p.Hkv + kv] = 0;
    for (int n = static_cast<int>(threadIdx.x); n < (group + 2) * quads; n += kAppendThreads) {
      const int head = n / quads, i = n % quads * 4;
      if (head < group) {
        const int64_t at = int64_t{kv * group + head} * p.D;
        rotate(row + at, cosines, sines, p.queries + int64_t{t} * p.Hq * p.D + at, half, i);
      } else if (head == group) {
        rotate(row + int64_t{p.Hq + kv} * p.D, cosines, sines, p.key_cache + cached, half, i);
      } else {
        const Element* const value = row + int64_t{p.Hq + p.Hkv + kv} * p.D;
        for (int d = 2 * i; d < 2 * i + 8; d += 4)
          *reinterpret_cast<uint2*>(p.value_cache + cached + d) = *reinterpret_cast<const uint2*>(value + d);
      }
    }
  }
}

}  // namespace pm::cuda::attention
#endif  // PADDLE_MIXTRAL_CUDA_ATTENTION_APPEND_CUH_
