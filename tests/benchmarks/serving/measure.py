"""The comparisons of a loaded model; each returns what it found as the JSON has it (see report.py)."""

import statistics
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np

from predict.llm import LLM
from tests.benchmarks.serving.drive import Answer, drive, drive_groups
from tests.benchmarks.serving.http_load import send, serving
from tests.benchmarks.serving.turns import Outcome, Way, in_turns, ratios, summary, way
from tests.benchmarks.serving.workload import OWN_TOKENS, SHARED_OUTPUT, Request, mixed, poisson, shared

LONGEST = 1024  # tokens of a request, or less where the model is shorter
SHARED_REQUESTS = 64
WARM_UP_REQUESTS = 8
SHARES_OF_CAPACITY = (0.5, 0.8, 1.2)  # the rates, unless they are given
Say = Callable[[str], object]


def longest(llm: LLM) -> int:
    """Tokens of a request at the most, prompt and answer.

    Raises:
        ValueError: the model is too short for a shared prompt, what follows it and an answer.
    """
    needed = 2 * (OWN_TOKENS + SHARED_OUTPUT)  # what is shared takes the other half
    if llm.total_max_length < needed:
        raise ValueError(
            f"the model has {llm.total_max_length} tokens at the most, the measurements need {needed}; use another one"
        )
    return min(LONGEST, llm.total_max_length)


def workload(llm: LLM, count: int, variant: int = 0) -> list[Request]:
    """The mixed requests of every measurement but that of the prefix cache."""
    return mixed(count, llm.tokenizer.vocab_size, longest(llm), variant)


def warm_up(llm: LLM) -> None:
    """Runs a few requests, whose times nobody reads."""
    requests = workload(llm, WARM_UP_REQUESTS)
    way(llm, lambda engine: drive_groups(engine, requests, llm.max_num_seqs))()


def at_once(llm: LLM, requests: Seq[Request]) -> Way:
    """All requests at once, by continuous batching."""
    return way(llm, partial(drive, requests=requests))


def batching(llm: LLM, requests: Seq[Request], repeat: int, say: Say) -> dict[str, Any]:
    """Continuous against static batching of the same requests by the same engine."""
    static = way(llm, partial(drive_groups, requests=requests, size=llm.max_num_seqs))
    found = in_turns({"continuous": at_once(llm, requests), "static batches": static}, repeat, say)
    return {
        "max_num_seqs": llm.max_num_seqs,
        "continuous": summary(found["continuous"]),
        "static": summary(found["static batches"]),
        "ratio": ratios(found, "continuous", "static batches"),
    }


def modes(dynamic: LLM, static: LLM, requests: Seq[Request], repeat: int, say: Say) -> dict[str, Any]:
    """The static program against the dynamic graph: the same requests, by continuous batching."""
    found = in_turns(
        {"dynamic graph": at_once(dynamic, requests), "static program": at_once(static, requests)}, repeat, say
    )
    return {
        "dynamic": summary(found["dynamic graph"]),
        "static": summary(found["static program"]),
        "ratio": ratios(found, "static program", "dynamic graph"),
    }


def prefix(llm: LLM, repeat: int, say: Say) -> dict[str, Any]:
    """Requests with a shared system prompt, all at once, with the prefix cache and without; it is empty at first."""
    shared_tokens = longest(llm) // 2
    requests = shared(SHARED_REQUESTS, llm.tokenizer.vocab_size, shared_tokens)
    run = partial(drive, requests=requests)
    found = in_turns({"prefix cache": way(llm, run, True), "no prefix cache": way(llm, run)}, repeat, say)
    return {
        "requests": len(requests),
        "shared_tokens": shared_tokens,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "with": _prefix_summary(found["prefix cache"]),
        "without": _prefix_summary(found["no prefix cache"]),
        "ratio": ratios(found, "prefix cache", "no prefix cache"),
    }


def _prefix_summary(outcomes: list[Outcome]) -> dict[str, Any]:
    firsts = [percentiles([answer.first_token_s for answer in outcome.answers]) for outcome in outcomes]
    stats = outcomes[0].stats
    return {
        **summary(outcomes),
        "hit_rate": stats.prefix_hit_tokens / stats.prefix_queried_tokens,
        "first_token_s": {p: statistics.median(first[p] for first in firsts) for p in firsts[0]},
    }


def arrivals(llm: LLM, flags: Seq[str], count: int, rates: Seq[float] | None, say: Say) -> dict[str, Any]:
    """Times to first token and per token of a server while requests arrive at given rates, however busy it is.

    Args:
        llm: the model, for the requests' sake.
        flags: the server's.
        count: requests at each rate.
        rates: requests a second; None is some shares of the capacity.
    """
    with serving(flags) as url:
        send(url, workload(llm, WARM_UP_REQUESTS), [0.0] * WARM_UP_REQUESTS)
        capacity = served(send(url, workload(llm, count, variant=1), [0.0] * count))["answered_per_s"]
        say(f"all at once: {capacity:.2f} requests/s")
        found = []
        for variant, rate in enumerate(rates or [share * capacity for share in SHARES_OF_CAPACITY], start=2):
            seen = served(send(url, workload(llm, count, variant), poisson(count, rate)))
            found.append({"rate": rate, "beyond_capacity": rate > capacity, **seen})
            say(f"{rate:.2f} requests/s: {seen['answered_per_s']:.2f} answered")
    return {"capacity": capacity, "rates": found}


def served(answers: Seq[Answer]) -> dict[str, Any]:
    """What clients saw of requests that arrived one by one.

    Returns:
        arrived_per_s, the rate of the very arrivals; answered_per_s, answers over the time to the last one; unfinished
        at the last arrival; p50 and p99 of first_token_s and of token_s, a request's time per token after its first.
    """
    last, end = answers[-1].arrived, max(answer.times[-1] for answer in answers)
    return {
        "requests": len(answers),
        "arrived_per_s": (len(answers) - 1) / last if last else None,
        "answered_per_s": len(answers) / end,
        "unfinished_at_last_arrival": sum(answer.times[-1] > last for answer in answers),
        "first_token_s": percentiles([answer.first_token_s for answer in answers]),
        "token_s": percentiles([s for answer in answers if (s := answer.token_s) is not None]),
    }


def percentiles(values: Seq[float]) -> dict[str, float | None]:
    """p50 and p99, between the nearest two values; None of nothing."""
    return {f"p{p}": float(np.percentile(values, p)) if len(values) else None for p in (50, 99)}
