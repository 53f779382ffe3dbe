// Which experts a token goes to, and which tokens an expert has: include/moe.h.
//
// ORDER       the CPU's: a logit is sixteen partial sums, k mod 16, in increasing k with fused multiply-add, then the fixed
//             tree of vec.h; softmax and choice as cpu/moe.cc has them. So shares and choices are the CPU's bits.
// ROWS        a token's chosen experts in increasing index are its rows token * top_k + 0, 1, ...: a row's place depends on
//             its token alone.
// BUDGET      (estimated, not measured) a block a token; its logits are H / 16 fused multiply-adds after each other in each
//             half warp, with 64 loads of the gate under way: H = 4096, E = 8 reads 128 KB in four rounds of memory's
//             latency.
#ifndef PADDLE_MIXTRAL_CUDA_ROUTE_CUH_
#define PADDLE_MIXTRAL_CUDA_ROUTE_CUH_

#include "grouped.cuh"
#include "tokens.cuh"

namespace pm::cuda {

constexpr int kMostExperts = 64;  // the bits of Routing::chosen
constexpr int kRouteThreads = 256;
constexpr int kGateAhead = 64;  // loads of a lane under way
constexpr int kListThreads = 1024;

struct Routing {
  float* share;      // [T][E], 0 where not chosen
  uint64_t* chosen;  // [T], bit e
  int E, top_k;

  static __device__ __forceinline__ int before(uint64_t chosen, int e) {
    return __popcll(static_cast<unsigned long long>(chosen & ((uint64_t{1} << e) - 1)));
  }
  // The row of a token that chose so, with expert e.
  __device__ int row(int token, uint64_t chosen_, int e) const { return token * top_k + before(chosen_, e); }
};

// The logit of this half warp's expert, in its first lane.
__device__ __forceinline__ float logit(const Activations& x, int64_t token, const float* gate) {
  const int lane = threadIdx.x % 16;
  const int64_t row = token * x.K;
  float sum = 0.0f;
  int64_t k = lane, base = 0;
  for (; base + 16 * kGateAhead <= x.K; base += 16 * kGateAhead, k += 16 * kGateAhead) {
    float w[kGateAhead];
#pragma unroll
    for (int i = 0; i < kGateAhead; ++i) w[i] = __ldg(gate + k + 16 * i);
#pragma unroll
    for (int i = 0; i < kGateAhead; ++i) sum = __fmaf_rn(w[i], load_element(x.data, x.dtype, row + k + 16 * i), sum);
  }
  for (; base < x.K; base += 16, k += 16)
    sum = k < x.K ? __fmaf_rn(gate[k], load_element(x.data, x.dtype, row + k), sum) : __fmaf_rn(0.0f, 0.0f, sum);
  return sum_of_half_warp(sum);
}

// p [E]: logits in, their softmax out. By one warp, whose halves do the same.
__device__ inline void softmax(float* p, int E) {
  constexpr int kEach = kMostExperts / 16;
  const int lane = threadIdx.x % 16;
  float value[kEach], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    value[i] = lane + 16 * i < E ? p[lane + 16 * i] : -INFINITY;
    largest = fmaxf(largest, value[i]);
  }
  for (int step = 8; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    value[i] = lane + 16 * i < E ? exp_as_cpu(value[i] - largest) : 0.0f;
    sum = __fadd_rn(sum, value[i]);
  }
  const float total = __shfl_sync(~0u, sum_of_half_warp(sum), 0);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (threadIdx.x % 32 < 16 && lane + 16 * i < E) p[lane + 16 * i] = __fdiv_rn(value[i], total);
  __syncwarp();
}

// By one thread: the top_k largest of p [E] (the lower index of equal ones), and their shares.
__device__ inline uint64_t choose(const float* p, int E, int top_k, float* share) {
  uint64_t chosen = 0;
  float sum = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    int best = -1;
    for (int e = 0; e < E; ++e)
      if (!(chosen >> e & 1) && (best < 0 || p[e] > p[best])) best = e;
    chosen |= uint64_t{1} << best;
    sum = __fadd_rn(sum, p[best]);
  }
  for (int e = 0; e < E; ++e) share[e] = chosen >> e & 1 ? __fdiv_rn(p[e], sum) : 0.0f;
  return chosen;
}

// Block (token, 0): its shares; (token, 1), where there is one: the token as products take it.
template <class Format>
__global__ void __launch_bounds__(kRouteThreads)
    route_kernel(Activations x, const float* gate, Routing routing, int tiles, TokenRows tokens) {
  __shared__ float p[kMostExperts];
  const bool routes = blockIdx.y == 0;
  if (routes) prefetch_floats(gate, routing.E * x.K);
  await_previous();
  const int64_t token = blockIdx.x;
  if (!routes) return prepare_token<Format>(x, token, tiles, tokens);
  for (int first = threadIdx.x / 32 * 2; first < routing.E; first += kRouteThreads / 16) {
    const int e = first + threadIdx.x % 32 / 16;
    const float sum = logit(x, token, gate + min(e, routing.E - 1) * x.K);
    if (threadIdx.x % 16 == 0 && e < routing.E) p[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    softmax(p, routing.E);
    if (threadIdx.x == 0) routing.chosen[token] = choose(p, routing.E, routing.top_k, routing.share + token * routing.E);
  }
}

// Lists of rows [E][T], in increasing token. A block an expert.
static __global__ void __launch_bounds__(kListThreads) list_kernel(Routing routing, int T, int32_t* count, int32_t* rows) {
  __shared__ int found[kListThreads / 32];
  const int e = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0;
  for (int start = 0; start < T; start += kListThreads) {
    const int token = start + threadIdx.x;
    const uint64_t chosen = token < T ? routing.chosen[token] : 0;
    const bool mine = chosen >> e & 1;
    const uint32_t members = __ballot_sync(~0u, mine);
    if (lane == 0) found[warp] = __popc(members);
    __syncthreads();
    int rank = before + __popc(members & ((1u << lane) - 1));
    for (int i = 0; i < kListThreads / 32; ++i) {
      if (i < warp) rank += found[i];
      before += found[i];
    }
    if (mine) rows[e * static_cast<int64_t>(T) + rank] = routing.row(token, chosen, e);
    __syncthreads();
  }
  if (threadIdx.x == 0) count[e] = before;
}

// Groups of grouped.cuh: the rows of each expert.
struct ExpertLists {
  const int32_t *count, *rows;  // [E], [E][T]
  int64_t T;
  int E, top_k;
  int token_rows;  // rows of the result that share a row of tokens: top_k (tokens) or 1 (hidden rows)

  int64_t runs(int tokens) const { return T * top_k / tokens + (E < T * top_k ? E : T * top_k); }
  __device__ Run run(int64_t index, int tokens) const {
    for (int e = 0; e < E; ++e) {
      const int here = (count[e] + tokens - 1) / tokens;
      if (index < here) {
        const int first = static_cast<int>(index) * tokens;
        return {e, first, min(tokens, count[e] - first)};
      }
      index -= here;
    }
    return {0, 0, 0};
  }
  __device__ int result_row(int e, int member) const { return rows[e * T + member]; }
  __device__ int token_row(int row) const { return row / token_rows; }
};

// The experts hit by up to 32 tokens, in increasing index, with their tokens in increasing index.
struct Hits {
  int number, expert[kMostExperts], count[kMostExperts];
  uint8_t token[kMostExperts][32];
  uint64_t chosen[32];
};

// By a whole block, `hits` in its shared memory; ends with a barrier.
__device__ inline void find_hits(const Routing& routing, int T, Hits& hits) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const uint64_t chosen = lane < T ? routing.chosen[lane] : 0;
    int number = 0;
    for (int e = 0; e < routing.E; ++e) {
      const uint32_t members = __ballot_sync(~0u, chosen >> e & 1);
      if (members == 0) continue;
      if (members >> lane & 1) hits.token[number][__popc(members & ((1u << lane) - 1))] = static_cast<uint8_t>(lane);
      if (lane == 0) {
        hits.expert[number] = e;
        hits.count[number] = __popc(members);
      }
      ++number;
    }
    hits.chosen[lane] = chosen;
    if (lane == 0) hits.number = number;
  }
  __syncthreads();
}

}  // namespace pm::cuda
#endif  // PADDLE_MIXTRAL_CUDA_ROUTE_CUH_
