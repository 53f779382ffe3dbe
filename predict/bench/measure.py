"""The measurement: steps driven one by one, each held against what the machine could do just before and after it.

Tokens are random, from a seed, and never the model's own: a model of random weights may repeat one token for ever, and
then one pair of experts serves every sequence. So each decode step feeds every sequence a fresh random token, which a
real text's variety is nearer to; what the step samples is computed and dropped.

A shared machine's speed changes within seconds. So everything is measured in turns, `repeat` times over; the rates of
memory and matrix unit are measured again around every few steps; and percentages compare a step with the rates around
it, not with the best of the day.

Contexts are real: each sequence's own random prompt, prefilled once. A decode rewinds its sequences to their contexts
and writes its tokens over what came after. A shorter context is the beginning of the same sequence's longer one, in
whose middle it thus leaves up to gen_len other random keys and values, which cost the same to read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np

# By name: NumPy imports its random numbers when they are first used, and an interrupt inside that import is lost.
from numpy.random import Generator, default_rng
from paddle.base.core import Place

from ops.counters import Counters
from predict.bench.ceilings import Ceilings, CpuCeilings, DeviceCeilings
from predict.bench.plan import Decode, Plan
from predict.bench.traffic import Traffic
from predict.engine.batch import Chunk, StepBatch, pack
from predict.engine.request import SamplingParams, Sequence
from predict.parallel import Ranks, barrier

SEED = 0
STEPS_BETWEEN_RATES = 8


_Rates = tuple[float, float | None]  # bytes and operations a second


class Runner(Protocol):
    """Whatever runs a step; what it returns is not looked at."""

    def step(self, batch: StepBatch) -> Any: ...


@dataclass(frozen=True)
class Sample:
    """One decode step, or the prefill of one prompt.

    Attributes:
        seconds: from packing the batch to having the tokens.
        kernel_s: seconds of it in each of the CPU's kernels, by name; nothing of a device's, which are not timed.
        experts_hit: experts with a token, a layer, on average.
        busiest_share: share of the tokens' choices that fell on a layer's busiest expert, on average.
        active_bytes, operations: what had to be read and computed, on this rank.
        memory_rate, matrix_rate: bytes and operations per second the machine was capable of around it; None where that
            could not be measured.
    """

    seconds: float
    kernel_s: dict[str, float]
    experts_hit: float
    busiest_share: float
    active_bytes: int
    operations: int
    memory_rate: float
    matrix_rate: float | None


class Bench:
    """Measures a plan on a runner; every rank of a job does the same at the same time.

    Args:
        runner: has at least plan.num_pages pages.
        ranks: this process among the ranks.
        advance: called with the number of steps done, for a progress bar.
        place: the device the runner runs on; None: the CPU.
    """

    def __init__(
        self, plan: Plan, runner: Runner, ranks: Ranks, advance: Callable[[int], object], place: Place | None = None
    ):
        self.plan, self.runner, self.ranks, self.advance, self.place = plan, runner, ranks, advance, place
        self.traffic = Traffic(plan.config, plan.dtype, plan.quant_type, ranks.world_size)
        self.pages = plan.pages
        self.random: Generator = default_rng(SEED)
        with self._together():
            self.ceilings: Ceilings = CpuCeilings(plan) if place is None else DeviceCeilings(place)

    def run(self) -> dict[int | Decode, list[Sample]]:
        """The samples of each prompt length (one a repetition) and each decode (gen_len a repetition)."""
        plan = self.plan
        measured: list[int | Decode] = [*plan.prompt_lens, *plan.decodes]
        samples: dict[int | Decode, list[Sample]] = {what: [] for what in measured}
        lengths = [tokens for sequences, tokens in plan.contexts for _ in range(sequences)]
        sequences = [self._sequence(n, pages) for n, pages in zip(lengths, self.pages, strict=False)]
        for _ in self._prefill(sequences):
            self.advance(1)
        for _ in range(plan.repeat):
            for prompt_len in plan.prompt_lens:
                samples[prompt_len].append(self._prefill_sample(prompt_len))
            for decode in plan.decodes:
                samples[decode] += self._decode_samples(sequences[: decode.batch_size], decode.context_len)
        with self._together():
            self.ceilings.every_unit()
        return samples

    @staticmethod
    def num_steps(plan: Plan) -> int:
        """Steps a plan takes, for a progress bar."""
        contexts = -(-sum(sequences * tokens for sequences, tokens in plan.contexts) // plan.max_num_batched_tokens)
        prefills = sum(-(-n // plan.max_num_batched_tokens) for n in plan.prompt_lens)
        return contexts + plan.repeat * (prefills + plan.gen_len * len(plan.decodes))

    def _sequence(self, length: int, pages: range) -> Sequence:
        sequence = Sequence(self._tokens(length), SamplingParams(ignore_eos=True))
        sequence.block_ids.extend(pages)
        return sequence

    def _tokens(self, count: int) -> list[int]:
        return self.random.integers(0, self.plan.config.vocab_size, count).tolist()

    def _prefill_sample(self, prompt_len: int) -> Sample:
        sequence = self._sequence(prompt_len, self.pages[-1])
        before, steps = self._rates_now(), []
        for step in self._prefill([sequence]):
            steps.append(step)
            self.advance(1)
        after = self._rates_now()
        return _whole([step.sample(before, after) for step in steps])

    def _prefill(self, sequences: list[Sequence]) -> Iterator["_Step"]:
        """Computes what each sequence has not computed, in order, in as few steps as may be."""
        while pending := [s for s in sequences if s.num_computed < s.num_tokens]:
            chunks, room = [], self.plan.max_num_batched_tokens
            for sequence in pending:
                size = min(sequence.num_tokens - sequence.num_computed, room)
                if size:
                    chunks.append(Chunk(sequence, size))
                    room -= size
            yield self._step(chunks)
            for chunk in chunks:
                chunk.sequence.num_computed += chunk.num_tokens

    def _decode_samples(self, sequences: list[Sequence], context_len: int) -> list[Sample]:
        longest = [(s, s.token_ids) for s in sequences]
        for sequence in sequences:
            sequence.token_ids, sequence.num_computed = sequence.token_ids[:context_len], context_len
        samples: list[Sample] = []
        before = self._rates_now()
        while len(samples) < self.plan.gen_len:
            group = []
            for i in range(min(STEPS_BETWEEN_RATES, self.plan.gen_len - len(samples))):
                for sequence, token in zip(sequences, self._tokens(len(sequences)), strict=True):
                    sequence.token_ids.append(token)
                chunks = [Chunk(sequence, 1) for sequence in sequences]
                if i == 0:  # not counted: it finds the caches full of what the rates were measured on
                    self._step(chunks)
                group.append(self._step(chunks))
                for sequence in sequences:
                    sequence.num_computed += 1
                self.advance(1)
            after = self._rates_now()
            samples += [step.sample(before, after) for step in group]
            before = after
        for sequence, token_ids in longest:
            sequence.token_ids = token_ids
        return samples

    def _step(self, chunks: list[Chunk]) -> "_Step":
        before, started = Counters.read(self.place), perf_counter()
        self.runner.step(pack(chunks))
        seconds = perf_counter() - started
        counted = Counters.read(self.place).since(before)
        spans = [(c.sequence.num_computed, c.num_tokens) for c in chunks]
        rows = sum(c.samples for c in chunks) or 1
        choices = sum(new for _, new in spans) * self.plan.config.num_experts_per_tok
        return _Step(
            seconds,
            counted,
            counted.busiest_tokens / (self.plan.config.num_hidden_layers * choices),
            self.traffic.step_bytes(counted.experts_hit, [context + new for context, new in spans]),
            self.traffic.step_operations(spans, rows),
        )

    def _rates_now(self) -> "_Rates":
        """What the machine is capable of at this moment, all ranks measuring at once."""
        with self._together():
            return self.ceilings.now()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Begins when all ranks are there and ends when all are done, so that no step waits for one still measuring."""
        if self.ranks.world_size > 1:
            barrier()
        yield
        if self.ranks.world_size > 1:
            barrier()


@dataclass(frozen=True)
class _Step:
    """A step, before the rates after it are known."""

    seconds: float
    counted: Counters
    busiest_share: float
    active_bytes: int
    operations: int

    def sample(self, before: _Rates, after: _Rates) -> Sample:
        memory_rate = (before[0] + after[0]) / 2
        matrix_rate = None if before[1] is None or after[1] is None else (before[1] + after[1]) / 2
        return Sample(
            self.seconds,
            self.counted.kernel_s,
            self.counted.experts_hit / self.counted.moe_calls,
            self.busiest_share,
            self.active_bytes,
            self.operations,
            memory_rate,
            matrix_rate,
        )


def _whole(chunks: list[Sample]) -> Sample:
    """One sample of a prompt that was prefilled in chunks."""
    rates = [c.matrix_rate for c in chunks if c.matrix_rate is not None]
    names = {name for chunk in chunks for name in chunk.kernel_s}
    return Sample(
        sum(c.seconds for c in chunks),
        {name: sum(c.kernel_s.get(name, 0.0) for c in chunks) for name in sorted(names)},
        float(np.mean([c.experts_hit for c in chunks])),
        float(np.mean([c.busiest_share for c in chunks])),
        sum(c.active_bytes for c in chunks),
        sum(c.operations for c in chunks),
        float(np.mean([c.memory_rate for c in chunks])),
        float(np.mean(rates)) if len(rates) == len(chunks) else None,
    )
