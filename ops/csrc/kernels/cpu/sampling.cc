// Token sampling: include/sampling.h.
//
// Greedy rows need two passes over the logits: the largest, then the sum of exponentials for the log-probability. The rest
// works on a row's own copy, and sorts only tokens that can be among top_p. Rows that ask for the most probable tokens pay
// one more pass.
#include "../include/sampling.h"

#include <float.h>
#include <stdlib.h>

#include "dispatch.h"

namespace pm {
namespace PM_ISA {
namespace {

constexpr int kBits = 11, kBuckets = 1 << kBits;  // a radix digit: three make a 32-bit key

// A token and its logit as a key whose unsigned order is the decreasing order of logits.
struct Ranked {
  uint32_t key;
  int32_t token;
};

struct Scratch {
  float *logits, *weights;  // [V]
  int32_t* counts;          // [V]
  Ranked *ranked, *sorted;  // [V]
  int32_t* histogram;       // [3, kBuckets]
};

inline F32x16 load_lanes(const float* x, int64_t i, int64_t n, float fill) {
  return i + 16 <= n ? load(x + i) : load_partial(x + i, static_cast<int>(n - i), fill);
}

// False when x[0 .. n-1] holds NaN or +inf, or nothing above -inf.
bool find_largest(const float* x, int64_t n, float* largest) {
  F32x16 most = set1(-INFINITY);
  for (int64_t i = 0; i < n; i += 16) most = max(most, load_lanes(x, i, n, -INFINITY));
  *largest = reduce_max(most);
  int bad = 0;  // a comparison of its own: max() drops a NaN
  for (int64_t i = 0; i < n; ++i) bad |= !(x[i] <= FLT_MAX);
  return !bad && *largest >= -FLT_MAX;
}

int64_t first_equal(const float* x, int64_t n, float value) {
  constexpr int64_t kStep = 64;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    int found = 0;
    for (int64_t j = i; j < i + kStep; ++j) found |= x[j] == value;
    if (found) break;
  }
  while (i < n && x[i] != value) ++i;
  return i;
}

// log(sum exp(x)), the terms of index i summed in float64 in lane i % 16, and the lanes in increasing order.
double log_sum_exp(const float* x, int64_t n, float largest) {
  double lanes[16] = {};
  for (int64_t i = 0; i < n; i += 16) {
    float e[16];
    store(e, exp(sub(load_lanes(x, i, n, -INFINITY), set1(largest))));
    for (int k = 0; k < 16; ++k) lanes[k] += static_cast<double>(e[k]);
  }
  double sum = 0.0;
  for (int k = 0; k < 16; ++k) sum += lanes[k];
  return static_cast<double>(largest) + log(sum);
}

void philox4x32_10(const uint32_t* key, uint32_t* counter) {
  uint32_t k0 = key[0], k1 = key[1];
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

double uniform(int64_t seed, int64_t position) {
  const uint64_t s = static_cast<uint64_t>(seed), p = static_cast<uint64_t>(position);
  const uint32_t key[2] = {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)};
  uint32_t words[4] = {static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), 0, 0};
  philox4x32_10(key, words);
  return static_cast<double>(((uint64_t{words[1]} << 32) | words[0]) >> 11) * 0x1p-53;
}

// Biases and penalties keep a finite logit finite.
inline float finite(float x) { return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x; }

void add_bias(float* logits, const int32_t* ids, const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float& l = logits[ids[i]];
    if (l >= -FLT_MAX) l = values[i] < -FLT_MAX ? -INFINITY : finite(l + values[i]);
  }
}

void penalise(float* logits, int64_t V, const float* floats, const int32_t* history, int64_t seen, int64_t prompt,
              int32_t* counts) {
  memset(counts, 0, static_cast<size_t>(V) * sizeof(int32_t));
  for (int64_t i = prompt; i < seen; ++i) counts[history[i]] += 1;
  for (int64_t i = 0; i < seen; ++i) {
    const int32_t token = history[i], count = counts[token];
    if (count < 0) continue;  // had its turn
    counts[token] = -1;
    float l = logits[token];
    if (l < -FLT_MAX) continue;
    l = finite(l > 0 ? l / floats[PM_REPETITION_PENALTY] : l * floats[PM_REPETITION_PENALTY]);
    if (count > 0)
      l = finite(finite(l - floats[PM_PRESENCE_PENALTY]) - static_cast<float>(count) * floats[PM_FREQUENCY_PENALTY]);
    logits[token] = l;
  }
}

// Unsigned order of the keys = decreasing order of the floats; the two zeros are one.
inline uint32_t rank_key(float x) {
  const float y = x + 0.0f;
  uint32_t u;
  memcpy(&u, &y, 4);
  return (u & 0x80000000u) ? u : ~u & 0x7fffffffu;
}

// The k-th largest of x[0 .. n-1], 1 <= k <= n: its key is found a digit at a time.
uint32_t kth_key(const float* x, int64_t n, int64_t k, int32_t* histogram) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 2 * kBits; shift >= 0; shift -= kBits) {
    memset(histogram, 0, kBuckets * sizeof(int32_t));
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = rank_key(x[i]);
      if ((key & mask) == prefix) histogram[(key >> shift) & (kBuckets - 1)] += 1;
    }
    uint32_t digit = 0;
    while (k > histogram[digit]) k -= histogram[digit++];
    prefix |= digit << shift;
    mask |= static_cast<uint32_t>(kBuckets - 1) << shift;
  }
  return prefix;
}

// Sorts by key, equal keys keeping their order; returns whichever of the two arrays holds the result.
Ranked* sort(Ranked* from, Ranked* to, int64_t n, int32_t* histogram) {
  memset(histogram, 0, 3 * kBuckets * sizeof(int32_t));
  for (int64_t i = 0; i < n; ++i)
    for (int digit = 0; digit < 3; ++digit)
      histogram[digit * kBuckets + ((from[i].key >> (digit * kBits)) & (kBuckets - 1))] += 1;
  for (int digit = 0; digit < 3; ++digit) {
    int32_t* start = histogram + digit * kBuckets;
    int32_t before = 0;
    for (int i = 0; i < kBuckets; ++i) {
      const int32_t count = start[i];
      start[i] = before;
      before += count;
    }
    for (int64_t i = 0; i < n; ++i) to[start[(from[i].key >> (digit * kBits)) & (kBuckets - 1)]++] = from[i];
    Ranked* const swapped = from;
    from = to;
    to = swapped;
  }
  return from;
}

// Zeroes the weights of the tokens that are not among the fewest, in decreasing logit, whose weights reach top_p of all.
void keep_top_p(const float* logits, float* weights, int64_t V, double top_p, const Scratch& scratch) {
  double total = 0.0;
  for (int64_t i = 0; i < V; ++i) total += static_cast<double>(weights[i]);
  // All tokens lighter than this weigh less than 1 - top_p together (and some less, for rounding): they are never reached.
  const double lightest = 0.999 * (1.0 - top_p) * total / static_cast<double>(V);
  int64_t n = 0;
  for (int64_t i = 0; i < V; ++i)
    if (weights[i] > 0.0f && static_cast<double>(weights[i]) >= lightest)
      scratch.ranked[n++] = {rank_key(logits[i]), static_cast<int32_t>(i)};
  const Ranked* sorted = sort(scratch.ranked, scratch.sorted, n, scratch.histogram);
  double sum = 0.0;
  int64_t kept = 0;
  while (kept < n && sum < top_p * total) sum += static_cast<double>(weights[sorted[kept++].token]);
  const Ranked last = sorted[kept - 1];
  for (int64_t i = 0; i < V; ++i) {
    const uint32_t key = rank_key(logits[i]);
    if (key > last.key || (key == last.key && i > last.token)) weights[i] = 0.0f;
  }
}

int64_t draw(const float* weights, int64_t V, double u) {
  double total = 0.0;
  for (int64_t i = 0; i < V; ++i) total += static_cast<double>(weights[i]);
  double sum = 0.0;
  int64_t last = 0;
  for (int64_t i = 0; i < V; ++i) {
    sum += static_cast<double>(weights[i]);
    if (weights[i] > 0.0f) last = i;
    if (sum > u * total) return i;
  }
  return last;  // not reached for u < 1: the last sum is the total
}

// One row's token, drawn from scratch.logits (already biased and penalised), the largest of which is `largest`.
int64_t draw_row(const Scratch& scratch, int64_t V, const float* floats, const int64_t* ints, float largest) {
  float *logits = scratch.logits, *weights = scratch.weights;
  const F32x16 most = set1(largest), temperature = set1(floats[PM_TEMPERATURE]);
  for (int64_t i = 0; i < V; i += 16) {
    const int n = static_cast<int>(V - i < 16 ? V - i : 16);
    const F32x16 l = div(sub(load_lanes(logits, i, V, -INFINITY), most), temperature);
    const F32x16 w = exp(l);
    n == 16 ? store(logits + i, l) : store_partial(logits + i, l, n);
    n == 16 ? store(weights + i, w) : store_partial(weights + i, w, n);
  }
  const int64_t top_k = ints[PM_TOP_K];
  if (top_k > 0 && top_k < V) {
    const uint32_t limit = kth_key(logits, V, top_k, scratch.histogram);
    for (int64_t i = 0; i < V; ++i)
      if (rank_key(logits[i]) > limit) weights[i] = 0.0f;
  }
  if (floats[PM_TOP_P] < 1.0f) keep_top_p(logits, weights, V, floats[PM_TOP_P], scratch);
  // The largest logit was never dropped, and its weight is exp(0) = 1.
  for (int64_t i = 0; i < V; ++i) weights[i] = weights[i] >= floats[PM_MIN_P] ? weights[i] : 0.0f;
  return draw(weights, V, uniform(ints[PM_SEED], ints[PM_POSITION]));
}

inline float log_probability(float logit, double log_sum) {
  return static_cast<float>(static_cast<double>(logit) - log_sum);
}

// The `wanted` largest logits above -inf, in decreasing order, equals in increasing index; -1 and 0 where there are no more.
void find_top(const float* logits, int64_t V, int wanted, double log_sum, int32_t* ids, float* logprobs) {
  constexpr int64_t kStep = 64;
  float top[PM_MAX_TOP_LOGPROBS];
  int found = 0;
  for (int64_t begin = 0; begin < V && wanted > 0; begin += kStep) {
    const int64_t end = V - begin < kStep ? V : begin + kStep;
    const float limit = found < wanted ? -INFINITY : top[wanted - 1];
    int enters = 0;
    for (int64_t i = begin; i < end; ++i) enters |= logits[i] > limit;
    if (!enters) continue;
    for (int64_t i = begin; i < end; ++i) {
      const float l = logits[i];
      if (!(l > (found < wanted ? -INFINITY : top[wanted - 1]))) continue;
      int place = found < wanted ? found++ : wanted - 1;
      for (; place > 0 && top[place - 1] < l; --place) {
        top[place] = top[place - 1];
        ids[place] = ids[place - 1];
      }
      top[place] = l;
      ids[place] = static_cast<int32_t>(i);
    }
  }
  for (int i = 0; i < PM_MAX_TOP_LOGPROBS; ++i) {
    logprobs[i] = i < found ? log_probability(top[i], log_sum) : 0.0f;
    if (i >= found) ids[i] = -1;
  }
}

// What one row is asked and answers.
struct Row {
  const float *logits, *floats;
  const int64_t* ints;
  const int32_t* history;
  int64_t seen;
  const int32_t* bias_ids;
  const float* bias_values;
  int64_t biases;
  int32_t* next_token;
  float* logprob;
  int32_t* top_ids;
  float* top_logprobs;
};

// The row's token; -1 when its bias leaves none.
int64_t choose(const Row& row, int64_t V, float largest, const Scratch& scratch) {
  const float* const floats = row.floats;
  const bool penalised = row.seen > 0 && (floats[PM_REPETITION_PENALTY] != 1.0f || floats[PM_PRESENCE_PENALTY] != 0.0f ||
                                          floats[PM_FREQUENCY_PENALTY] != 0.0f);
  const bool greedy = floats[PM_TEMPERATURE] == 0.0f;
  if (greedy && !penalised && row.biases == 0) return first_equal(row.logits, V, largest);
  memcpy(scratch.logits, row.logits, static_cast<size_t>(V) * sizeof(float));
  add_bias(scratch.logits, row.bias_ids, row.bias_values, row.biases);
  if (penalised) penalise(scratch.logits, V, floats, row.history, row.seen, row.ints[PM_PROMPT_LEN], scratch.counts);
  float most;
  if (!find_largest(scratch.logits, V, &most)) return -1;
  return greedy ? first_equal(scratch.logits, V, most) : draw_row(scratch, V, floats, row.ints, most);
}

// False when the row holds no distribution (find_largest).
bool sample_row(const Row& row, int64_t V, const Scratch& scratch) {
  float largest;
  int64_t token = -1;
  if (find_largest(row.logits, V, &largest))
    token = row.ints[PM_FORCED_TOKEN] >= 0 ? row.ints[PM_FORCED_TOKEN] : choose(row, V, largest, scratch);
  *row.next_token = static_cast<int32_t>(token);
  if (token < 0) return false;
  const double log_sum = log_sum_exp(row.logits, V, largest);
  *row.logprob = log_probability(row.logits[token], log_sum);
  find_top(row.logits, V, static_cast<int>(row.ints[PM_TOP_LOGPROBS]), log_sum, row.top_ids, row.top_logprobs);
  return true;
}

}  // namespace

int sample(const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
           const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values, const int32_t* bias_offsets,
           int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs, int64_t S, int64_t V, void*) {
  int status = PM_OK;
#pragma omp parallel num_threads(pm_num_threads()) if (S > 1)
  {
    // One block a thread; the parts that plain greedy rows do not touch cost nothing.
    const size_t v = static_cast<size_t>(V + 15) / 16 * 16;
    char* memory = static_cast<char*>(malloc(v * (2 * sizeof(Ranked) + 3 * 4) + 3 * kBuckets * 4));
    Scratch scratch = {};
    if (memory) {
      scratch.ranked = reinterpret_cast<Ranked*>(memory);
      scratch.sorted = scratch.ranked + v;
      scratch.logits = reinterpret_cast<float*>(scratch.sorted + v);
      scratch.weights = scratch.logits + v;
      scratch.counts = reinterpret_cast<int32_t*>(scratch.weights + v);
      scratch.histogram = scratch.counts + v;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t seen = history_offsets[s], bias = bias_offsets[s];
      const Row row = {.logits = logits + s * V,
                       .floats = floats + s * PM_SAMPLING_FLOATS,
                       .ints = ints + s * PM_SAMPLING_INTS,
                       .history = history_ids + seen,
                       .seen = history_offsets[s + 1] - seen,
                       .bias_ids = bias_ids + bias,
                       .bias_values = bias_values + bias,
                       .biases = bias_offsets[s + 1] - bias,
                       .next_token = next_tokens + s,
                       .logprob = logprobs + s,
                       .top_ids = top_ids + s * PM_MAX_TOP_LOGPROBS,
                       .top_logprobs = top_logprobs + s * PM_MAX_TOP_LOGPROBS};
      if (!memory || !sample_row(row, V, scratch)) {
#pragma omp atomic write
        status = memory ? PM_NOT_FINITE : PM_OUT_OF_MEMORY;
      }
    }
    free(memory);
  }
  return status;
}

}  // namespace PM_ISA
}  // namespace pm

PM_EXPORT(sample,
          (const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
           const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values, const int32_t* bias_offsets,
           int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs, int64_t S, int64_t V, void* stream),
          (logits, floats, ints, history_ids, history_offsets, bias_ids, bias_values, bias_offsets, next_tokens, logprobs,
           top_ids, top_logprobs, S, V, stream))
