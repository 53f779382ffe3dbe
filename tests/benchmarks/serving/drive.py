"""Requests go in, tokens come out with the time they came: straight into an engine, all at once or in groups."""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from predict.engine.engine import Engine
from tests.benchmarks.serving.workload import Request


@dataclass
class Answer:
    """What a client saw of one request.

    Attributes:
        arrived: when it was to be sent, in seconds from the start of the run.
        times: when each token came, on the same clock.
        token_ids, logprobs: of the tokens; empty where a server answered, which sends text.
    """

    arrived: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        """Time to first token, whatever the request waited for before."""
        return self.times[0] - self.arrived

    @property
    def token_s(self) -> float | None:
        """Time per token after the first; None where there is none."""
        later = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / later if later else None


def drive(engine: Engine, requests: Seq[Request]) -> list[Answer]:
    """Runs requests that are all there at once; the answers, in order."""
    began = time.perf_counter()
    answers = [Answer(0.0) for _ in requests]
    for i, request in enumerate(requests):
        engine.add(str(i), request.prompt, request.params)
    while engine.has_work:
        deltas = engine.step()
        elapsed = time.perf_counter() - began
        for delta in deltas:
            answer = answers[int(delta.request_id)]
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs
            answer.times.append(elapsed)
    return answers


def drive_groups(engine: Engine, requests: Seq[Request], size: int) -> list[Answer]:
    """Static batching: requests in groups, each of which begins when the one before is done as a whole.

    Times count from the beginning of a request's group.
    """
    groups = [requests[start : start + size] for start in range(0, len(requests), size)]
    return [answer for group in groups for answer in drive(engine, group)]
