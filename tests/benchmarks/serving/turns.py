"""Two ways of doing the same, compared: run in turns, A B A B, and held against each other within a turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from predict.engine.batch import StepBatch, StepResult
from predict.engine.engine import Engine, EngineStats, Runner
from predict.llm import LLM
from tests.benchmarks.serving.drive import Answer


class CountingRunner:
    """Counts the steps of a runner, and the tokens they compute."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.num_blocks, self.block_size, self.vocab_size = runner.num_blocks, runner.block_size, runner.vocab_size
        self.steps = self.tokens = 0

    def step(self, batch: StepBatch) -> StepResult:
        self.steps += 1
        self.tokens += len(batch.token_ids)
        return self.runner.step(batch)


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        seconds: of all of it.
        answers: what came.
        steps, computed_tokens: what the runner was asked for.
        stats: the engine's, at the end.
    """

    seconds: float
    answers: list[Answer]
    steps: int
    computed_tokens: int
    stats: EngineStats

    @property
    def new_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def prompt_tokens_computed(self) -> int:
        """All but the drawn tokens that were fed back: every one of an answer but its last."""
        return self.computed_tokens - (self.new_tokens - len(self.answers))


Way = Callable[[], Outcome]


def way(llm: LLM, run: Callable[[Engine], list[Answer]], prefix_caching: bool = False) -> Way:
    """How a model runs something: on an engine made for it, so with an empty prefix cache."""
    return partial(_run, llm, run, prefix_caching)


def _run(llm: LLM, run: Callable[[Engine], list[Answer]], prefix_caching: bool) -> Outcome:
    runner = CountingRunner(llm.runner)
    llm.prefix_caching = prefix_caching
    engine = llm.new_engine(runner)
    began = time.perf_counter()
    answers = run(engine)
    return Outcome(time.perf_counter() - began, answers, runner.steps, runner.tokens, engine.stats())


def in_turns(ways: Mapping[str, Way], repeat: int, say: Callable[[str], object]) -> dict[str, list[Outcome]]:
    """Each way's outcomes, in turns: A B A B.

    Raises:
        ValueError: a way gave other tokens or log-probabilities than the first run of all; says which request.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in ways}
    first: Outcome | None = None
    for turn in range(repeat):
        for name, run in ways.items():
            outcome = run()
            first = first or outcome
            check_same(name, outcome.answers, first.answers)
            outcomes[name].append(outcome)
            say(f"{name}, turn {turn + 1} of {repeat}: {outcome.seconds:.1f} s")
    return outcomes


def check_same(name: str, answers: list[Answer], expected: list[Answer]) -> None:
    """Refuses a comparison of runs that did not compute the same.

    Raises:
        ValueError: an answer's tokens or log-probabilities are others than expected; says whose.
    """
    for i, (answer, other) in enumerate(zip(answers, expected, strict=True)):
        for what, found, wanted in (
            ("tokens", answer.token_ids, other.token_ids),
            ("log-probabilities", answer.logprobs, other.logprobs),
        ):
            if found != wanted:
                raise ValueError(
                    f"{name}: request {i} has other {what} than in the first run; they may depend on the request and "
                    "the model alone, so this is a bug: report it with this command and machine"
                )


def ratios(outcomes: Mapping[str, list[Outcome]], fast: str, slow: str) -> dict[str, Any]:
    """How many times as fast one way is as another: median, least and greatest over the turns."""
    found = [b.seconds / a.seconds for a, b in zip(outcomes[fast], outcomes[slow], strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "turns": found}


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Medians over the turns, and counts, which are the same in all of them."""
    seconds = [outcome.seconds for outcome in outcomes]
    one = outcomes[0]
    return {
        "seconds": statistics.median(seconds),
        "seconds_turns": seconds,
        "tokens_per_s": one.new_tokens / statistics.median(seconds),
        "steps": one.steps,
        "new_tokens": one.new_tokens,
        "prompt_tokens_computed": one.prompt_tokens_computed,
        "preemptions": one.stats.preemptions,
    }
