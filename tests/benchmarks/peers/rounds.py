"""A B C, A B C: every engine once a round, so that what changes on the machine changes for all of them."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.benchmarks.peers.process import ProcessFailed
from tests.benchmarks.peers.protocol import Answer


@dataclass(frozen=True)
class Run:
    """One process of one engine.

    Attributes:
        bandwidth: bytes per second the memory was read at, mean of just before and just after.
        busy: share of the processors' time that others used just before.
    """

    entry: str
    round: int
    answer: Answer
    bandwidth: float
    busy: float

    def rate(self, case: str) -> float | None:
        """Tokens per second of a case, median of its repetitions."""
        rates = self.answer.rates.get(case)
        return statistics.median(rates) if rates else None


@dataclass
class Results:
    """All that ran, in order, and why the others did not."""

    runs: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, entry: str) -> list[Run]:
        return [run for run in self.runs if run.entry == entry]

    def rates(self, entry: str, case: str) -> list[float]:
        """One for each round the case ran in."""
        return [rate for run in self.of(entry) if (rate := run.rate(case)) is not None]

    def shares(self, entry: str, case: str, active_bytes: int) -> list[float]:
        """Of the read bandwidth around each run, the part that reading ``active_bytes`` a token makes."""
        runs = [(run.rate(case), run.bandwidth) for run in self.of(entry)]
        return [rate * active_bytes / bandwidth for rate, bandwidth in runs if rate is not None]

    def ratios(self, entry: str, other: str, case: str) -> list[float]:
        """The rate of ``entry`` over that of ``other``, round by round."""
        theirs = {run.round: run.rate(case) for run in self.of(other)}
        pairs = [(run.rate(case), theirs.get(run.round)) for run in self.of(entry)]
        return [mine / their for mine, their in pairs if mine is not None and their is not None]

    def why_not(self, entry: str, case: str) -> str | None:
        """Why a case of an engine that ran has no rate."""
        reasons = [run.answer.failed[case] for run in self.of(entry) if case in run.answer.failed]
        return reasons[0] if reasons else None


def interleave(
    results: Results,
    entries: list[str],
    rounds: int,
    run: Callable[[str, int], Answer],
    bandwidth: Callable[[], float],
    busy: Callable[[], float],
) -> Iterator[Run | str]:
    """Runs and notes every engine in every round; yields each run, or the key of an engine that failed.

    An engine that fails is noted with its reason and left out of the rounds to come; what it gave before stays.
    """
    before = bandwidth()
    for number in range(rounds):
        for entry in entries:
            if entry in results.failed:
                continue
            in_use = busy()
            try:
                answer = run(entry, number)
            except ProcessFailed as failure:
                results.failed[entry] = str(failure)
                before = bandwidth()
                yield entry
                continue
            after = bandwidth()
            done = Run(entry, number, answer, (before + after) / 2, in_use)
            results.runs.append(done)
            before = after
            yield done
