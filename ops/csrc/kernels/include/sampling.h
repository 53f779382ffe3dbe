// Token sampling: one token and its log-probability per row of logits.
//
// SHAPES      logits [S, V] float32
//             floats [S, 6] float32: temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty
//             ints [S, 6] int64: seed, position, top_k, forced_token, prompt_len, top_logprobs (0 .. 20)
//             history_ids [at least history_offsets[S]] int32, history_offsets [S + 1] int32: row s has seen the tokens
//             history_ids[history_offsets[s] .. history_offsets[s + 1] - 1], the first prompt_len of which are its prompt
//             (an empty history switches the penalties off)
//             bias_ids int32, bias_values float32 (finite or -inf), both [at least bias_offsets[S]], bias_offsets [S + 1]
//             int32: what row s adds to the logits of tokens bias_ids[bias_offsets[s] .. bias_offsets[s + 1] - 1]
//             next_tokens [S] int32, logprobs [S] float32, top_ids [S, 20] int32, top_logprobs [S, 20] float32. Logits may
//             be -inf (masked). A row that holds NaN or +inf, or nothing above -inf with its bias or without, has no answer:
//             its token is -1 and the call returns PM_NOT_FINITE
// DEFINITION  logprobs = log_softmax(logits)[token] of the logits as given: what the model thinks, whatever the sampler
// does.
//             top_ids, top_logprobs: the row's top_logprobs most probable tokens by the same distribution, in decreasing
//             probability, ties to the lower index; -1 and 0 where none is wanted, or no more tokens are above -inf
//             forced_token >= 0: that token is the answer (scoring). Else, in this order:
//             0 bias: l + value for each of the row's biases, in their order; finite sums stay finite (clamped)
//             1 penalties: every token seen: l > 0 ? l / repetition_penalty : l * repetition_penalty; every token generated
//               (seen after the prompt): l - presence_penalty - count * frequency_penalty; a finite l stays finite (clamped)
//             2 temperature 0: the largest l, ties to the lower index. Else (l - the largest l) / temperature, which is
//               l / temperature up to a constant and cannot overflow
//             3 top_k (0: off): the k largest l, and every l equal to the k-th
//             4 top_p (1: off): of those in decreasing probability, the fewest whose probabilities (renormalised over what
//               is left) reach top_p; ties to the lower index
//             5 min_p (0: off): those with probability >= min_p * the largest probability
//             6 draw: u in [0, 1) from the counter-based generator below; in increasing token index, the first token
//               at which the running sum of exp(l) exceeds u * the total
//             u = (philox4x32_10(key = seed, counter = (position, 0)) as a 64-bit word) >> 11, times 2^-53
// ORDER       exponentials in float32 (vec.h), sums in float64. log_softmax: token i in lane i % 16, in increasing
//             index, then the lanes in increasing order. Totals and the draw: increasing token index. top_p: decreasing l,
//             ties to the lower index. A row's token and logprob depend on its own inputs alone.
// SOURCE      Holtzman et al. (top-p) arXiv:1904.09751; Nguyen et al. (min-p) arXiv:2407.01082; Keskar et al. (repetition
//             penalty) arXiv:1909.05858; Salmon et al. (Philox) doi:10.1145/2063384.2063405
#ifndef PADDLE_MIXTRAL_SAMPLING_H_
#define PADDLE_MIXTRAL_SAMPLING_H_

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  PM_TEMPERATURE,
  PM_TOP_P,
  PM_MIN_P,
  PM_REPETITION_PENALTY,
  PM_PRESENCE_PENALTY,
  PM_FREQUENCY_PENALTY,
  PM_SAMPLING_FLOATS
};
enum { PM_SEED, PM_POSITION, PM_TOP_K, PM_FORCED_TOKEN, PM_PROMPT_LEN, PM_TOP_LOGPROBS, PM_SAMPLING_INTS };
enum { PM_MAX_TOP_LOGPROBS = 20 };

int pm_cpu_sample(const float* logits, const float* floats, const int64_t* ints, const int32_t* history_ids,
                  const int32_t* history_offsets, const int32_t* bias_ids, const float* bias_values,
                  const int32_t* bias_offsets, int32_t* next_tokens, float* logprobs, int32_t* top_ids, float* top_logprobs,
                  int64_t S, int64_t V, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // PADDLE_MIXTRAL_SAMPLING_H_
