"""The requests of a run and when they arrive, all from seeds."""

from dataclasses import dataclass

import numpy as np

from predict.engine.request import SamplingParams

SEED = 0
FIRST_TOKEN = 3  # after unk, begin and end of sequence
PROMPT_MEDIAN, OUTPUT_MEDIAN = 64, 48
SIGMA = 1.0  # of the lengths' logarithms: the longest hundredth is ten times the median
OWN_TOKENS = 32  # of each request with a shared prompt, after what it shares
SHARED_OUTPUT = 16


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, and how it is continued."""

    prompt: list[int]
    params: SamplingParams


def mixed(count: int, vocab_size: int, longest: int, variant: int = 0) -> list[Request]:
    """Prompts of random tokens; lengths of prompts and of answers are log-normal, independent, longest // 2 at most.

    Variants have other tokens of the same lengths: a prefix cache that has seen one does not know another.

    Answers are sampled, each with a seed of its own: a model of random weights that is greedy repeats one token, and
    then one pair of experts has all the work.
    """
    rng = np.random.default_rng(SEED)
    prompts, outputs = (_lengths(rng, count, median, longest // 2) for median in (PROMPT_MEDIAN, OUTPUT_MEDIAN))
    rng = np.random.default_rng((SEED, variant))
    return [
        Request(_tokens(rng, prompt, vocab_size), _params(i, output))
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def shared(count: int, vocab_size: int, shared_tokens: int) -> list[Request]:
    """Requests whose prompts begin with the same tokens and go on with some of their own."""
    rng = np.random.default_rng(SEED)
    system = _tokens(rng, shared_tokens, vocab_size)
    return [Request(system + _tokens(rng, OWN_TOKENS, vocab_size), _params(i, SHARED_OUTPUT)) for i in range(count)]


def poisson(count: int, rate: float) -> list[float]:
    """Seconds at which requests arrive, ``rate`` a second on average and independent of each other; the first at 0."""
    gaps = np.random.default_rng(SEED).exponential(1 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def _lengths(rng: np.random.Generator, count: int, median: int, most: int) -> list[int]:
    return np.clip(np.rint(rng.lognormal(np.log(median), SIGMA, count)), 1, most).astype(int).tolist()


def _tokens(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    return rng.integers(FIRST_TOKEN, vocab_size, count).tolist()


def _params(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed, ignore_eos=True)
