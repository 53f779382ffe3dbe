"""Token sampling: one token and its log-probability per row of logits."""

import paddle

from ops.library import run

FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INT_COLUMNS = ("seed", "position", "top_k", "forced_token", "prompt_len", "top_logprobs")
MAX_TOP_LOGPROBS = 20  # PM_MAX_TOP_LOGPROBS of ops/csrc/kernels/include/sampling.h


def sample(
    logits: paddle.Tensor,
    floats: paddle.Tensor,
    ints: paddle.Tensor,
    history_ids: paddle.Tensor,
    history_offsets: paddle.Tensor,
    bias_ids: paddle.Tensor,
    bias_values: paddle.Tensor,
    bias_offsets: paddle.Tensor,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Draws each row's next token; greedy where its temperature is 0, ``forced_token`` where that is not negative.

    Biases, penalties on the tokens seen, then temperature, top_k, top_p and min_p, in this order, then a draw whose
    random number is a function of (seed, position) alone: a row's token depends on the row, not on its batch. The
    log-probabilities are those of the logits as given, whatever the sampler does. The formulas are in
    ops/csrc/kernels/include/sampling.h.

    Args:
        logits: [S, V] float32; -inf masks a token.
        floats: [S, 6] float32, columns FLOAT_COLUMNS. Off: top_p 1, min_p 0, repetition_penalty 1, the others 0.
        ints: [S, 6] int64, columns INT_COLUMNS. Off: top_k 0, forced_token -1, top_logprobs 0.
        history_ids: int32: the tokens rows have seen, one row after the other; the first ``prompt_len`` of a row are
            its prompt. A row without history has no penalties.
        history_offsets: [S + 1] int32: row s has seen ``history_ids[history_offsets[s]:history_offsets[s + 1]]``.
        bias_ids, bias_values: int32 and float32 (finite, or -inf: never): what rows add to the logits of these tokens,
            one row after the other.
        bias_offsets: [S + 1] int32: row s adds ``bias_values[bias_offsets[s]:bias_offsets[s + 1]]``.

    Returns:
        (next_tokens [S] int32, logprobs [S] float32, top_ids [S, 20] int32, top_logprobs [S, 20] float32): the last two
        hold the ``top_logprobs`` most probable tokens of the rows that ask, -1 and 0 elsewhere.

    Raises:
        ValueError: a shape, dtype, device or value other than the above; a row of logits that holds NaN or +inf, or
            nothing but -inf, its bias added.

    Source: Holtzman et al. (top-p) arXiv:1904.09751; Nguyen et al. (min-p) arXiv:2407.01082; Keskar et al. (repetition
    penalty) arXiv:1909.05858; Salmon et al. (Philox) doi:10.1145/2063384.2063405.
    """
    next_tokens, logprobs, top_ids, top_logprobs = run(
        "pm_sample", logits, floats, ints, history_ids, history_offsets, bias_ids, bias_values, bias_offsets
    )
    return next_tokens, logprobs, top_ids, top_logprobs
