// Token sampling: include/sampling.h. A block a row; nothing leaves the device.
//
// Logits, penalties, exponentials and every comparison have the CPU's bits. What is added up has not its order:
//   log_softmax         exponentials in float64, token i in thread i % 1024 in increasing index, then the threads as a tree
//   top_p, the draw     weights as integers, multiples of 2^-43 of the largest (one above 2^-20 of it is one exactly), so
//                       sums are exact and have no order
// So a token may differ from the CPU's only where u * total or top_p * total lies within about V * 2^-44 of a running sum.
#include <float.h>
#include <math.h>

#include "../include/sampling.h"
#include "block.cuh"
#include "scalar.cuh"

namespace pm::cuda {
namespace {

using block::kThreads;

constexpr int64_t kMostTokens = 1 << 20;     // of a vocabulary: the sum of so many weights fits an integer
constexpr float kOne = 0x1p43f;              // a weight of one as an integer
constexpr uint32_t kInPrompt = 0x80000000u;  // in a token's count of appearances among the generated

// Unsigned order of the keys = decreasing order of the floats; the two zeros are one.
__device__ __forceinline__ uint32_t rank_key(float x) {
  const uint32_t u = __float_as_uint(__fadd_rn(x, 0.0f));
  return (u & 0x80000000u) ? u : ~u & 0x7fffffffu;
}
__device__ __forceinline__ float of_rank_key(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) ? key : ~key & 0x7fffffffu);
}
// The least of these is the largest logit, the first of equals.
__device__ __forceinline__ uint64_t ranked(float x, int64_t i) {
  return uint64_t{rank_key(x)} << 32 | static_cast<uint32_t>(i);
}
__device__ __forceinline__ int64_t token_of(uint64_t ranked) { return static_cast<uint32_t>(ranked); }
__device__ __forceinline__ float logit_of(uint64_t ranked) { return of_rank_key(static_cast<uint32_t>(ranked >> 32)); }

__device__ __forceinline__ uint64_t whole(float weight) {
  return static_cast<uint64_t>(__float2ll_rn(__fmul_rn(weight, kOne)));
}

// Biases and penalties keep a finite logit finite.
__device__ __forceinline__ float finite(float x) { return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x; }

__device__ void philox4x32_10(uint32_t k0, uint32_t k1, uint32_t (&counter)[4]) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0], b = uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1;
    counter[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// u * 2^64: the 53 bits of the definition, from the top.
__device__ uint64_t uniform(int64_t seed, int64_t position) {
  const uint64_t s = static_cast<uint64_t>(seed), p = static_cast<uint64_t>(position);
  uint32_t words[4] = {static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), 0, 0};
  philox4x32_10(static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), words);
  return (uint64_t{words[1]} << 32 | words[0]) >> 11 << 11;
}

// One row, as every thread of its block sees it.
struct Row {
  const float *logits, *floats;  // as given
  const int64_t* ints;
  const int32_t* history;
  int64_t seen;
  const int32_t* bias_ids;
  const float* bias_values;
  int64_t biases, V;
  float* changed;    // [V]: the row's own logits
  uint32_t* counts;  // [V], and then
  float* weights;    // [V], the same memory
};

// The largest of x; false when x holds NaN or +inf, or nothing above -inf.
__device__ bool find_largest(block::Scratch& scratch, const float* x, int64_t V, uint64_t* largest) {
  uint64_t best = ~uint64_t{0};
  int bad = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < V; i += kThreads) {
    bad |= !(x[i] <= FLT_MAX);
    best = min(best, ranked(x[i], i));
  }
  *largest = block::least(scratch, best);
  return !__syncthreads_or(bad) && logit_of(*largest) >= -FLT_MAX;
}

// Each token's biases are added by the thread of the first of them, in their order.
__device__ void add_bias(const Row& row) {
  for (int64_t i = threadIdx.x; i < row.biases; i += kThreads) {
    const int32_t token = row.bias_ids[i];
    bool first = true;
    for (int64_t j = 0; j < i && first; ++j) first = row.bias_ids[j] != token;
    if (!first) continue;
    float l = row.changed[token];
    for (int64_t j = i; j < row.biases; ++j) {
      if (row.bias_ids[j] != token || !(l >= -FLT_MAX)) continue;
      const float value = row.bias_values[j];
      l = value < -FLT_MAX ? -INFINITY : finite(__fadd_rn(l, value));
    }
    row.changed[token] = l;
  }
  __syncthreads();
}

__device__ void penalise(const Row& row) {
  for (int64_t i = threadIdx.x; i < row.V; i += kThreads) row.counts[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < row.seen; i += kThreads) {
    uint32_t* const count = row.counts + row.history[i];
    if (i < row.ints[PM_PROMPT_LEN])
      atomicOr(count, kInPrompt);
    else
      atomicAdd(count, 1u);
  }
  __syncthreads();
  const float repetition = row.floats[PM_REPETITION_PENALTY], presence = row.floats[PM_PRESENCE_PENALTY];
  const float frequency = row.floats[PM_FREQUENCY_PENALTY];
  for (int64_t i = threadIdx.x; i < row.V; i += kThreads) {
    const uint32_t count = row.counts[i];
    float l = row.changed[i];
    if (count == 0 || l < -FLT_MAX) continue;
    l = finite(l > 0 ? __fdiv_rn(l, repetition) : __fmul_rn(l, repetition));
    if (const uint32_t generated = count & ~kInPrompt)
      l = finite(__fsub_rn(finite(__fsub_rn(l, presence)), __fmul_rn(static_cast<float>(generated), frequency)));
    row.changed[i] = l;
  }
  __syncthreads();
}

// The token drawn from row.changed, the largest of which is `largest`.
__device__ int64_t draw(block::Scratch& scratch, const Row& row, float largest) {
  const float temperature = row.floats[PM_TEMPERATURE], min_p = row.floats[PM_MIN_P];
  float* const scaled = row.changed;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < row.V; i += kThreads) {
    const float l = __fdiv_rn(__fsub_rn(scaled[i], largest), temperature);
    scaled[i] = l;
    row.weights[i] = exp_as_cpu(l);
  }
  __syncthreads();
  // Kept are the tokens up to this one, in decreasing logit and increasing index.
  uint64_t last = ~uint64_t{0};
  const auto key = [&](int64_t i) { return rank_key(scaled[i]); };
  const auto mass = [&](int64_t i) { return ranked(scaled[i], i) <= last ? whole(row.weights[i]) : 0; };

  const int64_t top_k = row.ints[PM_TOP_K];
  if (top_k > 0 && top_k < row.V) {
    const auto one = [](int64_t) { return uint64_t{1}; };
    last = uint64_t{block::select(scratch, row.V, key, one, static_cast<uint64_t>(top_k)).key} << 32 | ~0u;
  }
  const double top_p = row.floats[PM_TOP_P];
  if (top_p < 1.0) {
    uint64_t mine = 0;
    for (int64_t i = threadIdx.x; i < row.V; i += kThreads) mine += mass(i);
    const uint64_t total = block::sum(scratch, mine);
    const uint64_t target = max(uint64_t{1}, static_cast<uint64_t>(ceil(top_p * static_cast<double>(total))));
    const block::Selected at = block::select(scratch, row.V, key, mass, target);
    // Of the tokens with this logit, so many of the first.
    const uint64_t each = whole(exp_as_cpu(of_rank_key(at.key))), needed = (target - at.before + each - 1) / each;
    const int64_t token = block::locate(
        scratch, row.V, [&](int64_t i) { return uint64_t{key(i) == at.key}; }, [&](uint64_t) { return needed - 1; });
    last = uint64_t{at.key} << 32 | static_cast<uint32_t>(token);
  }
  const uint64_t u = uniform(row.ints[PM_SEED], row.ints[PM_POSITION]);
  return block::locate(
      scratch, row.V, [&](int64_t i) { return row.weights[i] >= min_p ? mass(i) : 0; },
      [&](uint64_t total) { return __umul64hi(u, total); });
}

// The row's token; -1 when its bias leaves none.
__device__ int64_t choose(block::Scratch& scratch, const Row& row, uint64_t largest) {
  const float* const floats = row.floats;
  const bool penalised = row.seen > 0 && (floats[PM_REPETITION_PENALTY] != 1.0f || floats[PM_PRESENCE_PENALTY] != 0.0f ||
                                          floats[PM_FREQUENCY_PENALTY] != 0.0f);
  const bool greedy = floats[PM_TEMPERATURE] == 0.0f, changed = penalised || row.biases > 0;
  if (greedy && !changed) return token_of(largest);
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < row.V; i += kThreads) row.changed[i] = row.logits[i];
  __syncthreads();
  if (row.biases > 0) add_bias(row);
  if (penalised) penalise(row);
  if (changed && !find_largest(scratch, row.changed, row.V, &largest)) return -1;
  return greedy ? token_of(largest) : draw(scratch, row, logit_of(largest));
}

// log(sum of exp(logits))
__device__ double log_sum_exp(block::Scratch& scratch, const Row& row, float largest) {
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < row.V; i += kThreads)
    sum = __dadd_rn(sum, static_cast<double>(exp_as_cpu(__fsub_rn(row.logits[i], largest))));
  return __dadd_rn(static_cast<double>(largest), log(block::sum(scratch, sum)));
}

__device__ __forceinline__ float log_probability(float logit, double log_sum) {
  return static_cast<float>(__dsub_rn(static_cast<double>(logit), log_sum));
}

// The `wanted` largest logits above -inf. Every thread knows the best of its tokens after those found.
__device__ void find_top(block::Scratch& scratch, const Row& row, int wanted, double log_sum, int32_t* ids,
                         float* logprobs) {
  uint64_t found = 0, mine = ~uint64_t{0};
  int n = 0;
  bool stale = true;
  for (; n < wanted; ++n) {
    if (stale) {
      mine = ~uint64_t{0};
      for (int64_t i = threadIdx.x; i < row.V; i += kThreads) {
        const uint64_t candidate = ranked(row.logits[i], i);
        if (candidate < mine && (n == 0 || candidate > found)) mine = candidate;
      }
    }
    found = block::least(scratch, mine);
    if (found == ~uint64_t{0} || logit_of(found) < -FLT_MAX) break;
    stale = found == mine;
    if (threadIdx.x == 0) {
      ids[n] = static_cast<int32_t>(token_of(found));
      logprobs[n] = log_probability(row.logits[token_of(found)], log_sum);
    }
  }
  for (int i = n + static_cast<int>(threadIdx.x); i < PM_MAX_TOP_LOGPROBS; i += kThreads) {
    ids[i] = -1;
    logprobs[i] = 0.0f;
  }
}

// Block s: row s. `changed` is [S, V], or null where a row's own logits fit shared memory.
__global__ void __launch_bounds__(kThreads)
    sample_decode(const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
                  const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values,
                  const int32_t* bias_offsets, int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs,
                  int64_t V, float* weights, float* changed) {
  block::Scratch& scratch = *reinterpret_cast<block::Scratch*>(dynamic_shared());
  const int64_t s = blockIdx.x, seen = history_offsets[s], bias = bias_offsets[s];
  Row row;
  row.logits = logits + s * V;
  row.floats = floats + s * PM_SAMPLING_FLOATS;
  row.ints = ints + s * PM_SAMPLING_INTS;
  row.history = history_ids + seen;
  row.seen = history_offsets[s + 1] - seen;
  row.bias_ids = bias_ids + bias;
  row.bias_values = bias_values + bias;
  row.biases = bias_offsets[s + 1] - bias;
  row.V = V;
  row.changed = changed ? changed + s * V : reinterpret_cast<float*>(dynamic_shared() + sizeof(block::Scratch));
  row.weights = weights + s * V;
  row.counts = reinterpret_cast<uint32_t*>(row.weights);

  uint64_t largest;
  int64_t token = -1;
  if (find_largest(scratch, row.logits, V, &largest))
    token = row.ints[PM_FORCED_TOKEN] >= 0 ? row.ints[PM_FORCED_TOKEN] : choose(scratch, row, largest);
  const double log_sum = token < 0 ? 0.0 : log_sum_exp(scratch, row, logit_of(largest));
  if (threadIdx.x == 0) {
    next_tokens[s] = static_cast<int32_t>(token);
    logprobs[s] = token < 0 ? NAN : log_probability(row.logits[token], log_sum);
  }
  find_top(scratch, row, token < 0 ? 0 : static_cast<int>(row.ints[PM_TOP_LOGPROBS]), log_sum,
           top_ids + s * PM_MAX_TOP_LOGPROBS, top_logprobs + s * PM_MAX_TOP_LOGPROBS);
}

struct Layout {
  float *weights, *changed;
  int64_t bytes;
  Layout(void* workspace, int64_t S, int64_t V) {
    Workspace space{static_cast<unsigned char*>(workspace)};
    weights = space.take<float>(S * V);
    changed = space.take<float>(S * V);
    bytes = space.used;
  }
};

}  // namespace

int64_t sample_workspace(int64_t S, int64_t V) { return Layout(nullptr, S, V).bytes; }

int sample(const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
           const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values, const int32_t* bias_offsets,
           int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs, int64_t S, int64_t V,
           void* workspace, void* stream) {
  if (V > kMostTokens)
    return fail(PM_UNSUPPORTED, "sample on a GPU takes at most %lld tokens of a vocabulary; there are %lld",
                static_cast<long long>(kMostTokens), static_cast<long long>(V));
  const Layout layout(workspace, S, V);
  int most_shared;
  if (const int status = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most_shared)) return status;
  const int64_t scratch = sizeof(block::Scratch), with_logits = scratch + V * static_cast<int64_t>(sizeof(float));
  const bool fits = with_logits <= most_shared;
  return launch(sample_decode, dim3(static_cast<unsigned>(S)), dim3(kThreads), fits ? with_logits : scratch, stream, logits,
                floats, ints, history_ids, history_offsets, bias_ids, bias_values, bias_offsets, next_tokens, logprobs,
                top_ids, top_logprobs, V, layout.weights, fits ? nullptr : layout.changed);
}

}  // namespace pm::cuda
