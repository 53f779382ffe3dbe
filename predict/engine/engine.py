"""Static batching: a list of sequences, prefilled in packed chunks, then decoded together until each is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from predict.engine.batch import Chunk, StepBatch, pack
from predict.engine.block_manager import BlockManager
from predict.engine.request import Sequence


class Runner(Protocol):
    """Whatever runs a step; predict.runner has the two there are."""

    num_blocks: int
    block_size: int

    def step(self, batch: StepBatch) -> tuple[np.ndarray, np.ndarray]:
        """next_tokens [S] int32 and logprobs [S] float32 of the batch's sample_rows."""
        ...


class Engine:
    """Runs batches of sequences on a runner.

    Args:
        runner: runs one step.
        eos_token_ids: tokens that end a sequence.
        total_max_length: tokens of a sequence at the most, prompt included; it then finishes with "length".
        max_num_batched_tokens: new tokens a step computes at the most; longer prompts are prefilled in chunks.
    """

    def __init__(
        self, runner: Runner, eos_token_ids: tuple[int, ...], total_max_length: int, max_num_batched_tokens: int = 2048
    ):
        self.runner = runner
        self.eos_token_ids = frozenset(eos_token_ids)
        self.total_max_length = total_max_length
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_manager = BlockManager(runner.num_blocks, runner.block_size)

    def generate(
        self, sequences: list[Sequence], on_token: Callable[[Sequence, int], None] = lambda sequence, token: None
    ) -> None:
        """Runs all sequences as one static batch until each has a finish_reason; ``on_token`` sees every new token."""
        with self._pages(sequences, self._longest):
            for sequence in sequences:
                if sequence.num_tokens >= self.total_max_length:
                    sequence.finish_reason = "length"
            while running := [s for s in sequences if s.finish_reason is None]:
                chunks = self._schedule(running)
                tokens, logprobs = self.runner.step(pack(chunks))
                results = iter(zip(tokens.tolist(), logprobs.tolist(), strict=True))
                for chunk in chunks:
                    sequence, samples = chunk.sequence, chunk.samples
                    sequence.num_computed += chunk.num_tokens
                    if samples:
                        token, logprob = next(results)
                        self._append(sequence, token, logprob)
                        on_token(sequence, token)

    def score(self, sequence: Sequence) -> None:
        """Fills ``sequence.logprobs``: the log-probability of each token but the first, given those before it."""
        with self._pages([sequence], lambda s: s.num_tokens):
            while sequence.num_computed < sequence.num_tokens - 1:
                left = sequence.num_tokens - 1 - sequence.num_computed
                chunk = Chunk(sequence, min(left, self.max_num_batched_tokens), score=True)
                _, logprobs = self.runner.step(pack([chunk]))
                sequence.logprobs += logprobs.tolist()
                sequence.num_computed += chunk.num_tokens

    @contextmanager
    def _pages(self, sequences: list[Sequence], longest: Callable[[Sequence], int]) -> Iterator[None]:
        """Pages for every sequence up to the length ``longest`` gives, taken back however the block ends."""
        try:
            for sequence in sequences:
                sequence.block_ids = self.block_manager.allocate(longest(sequence))
            yield
        finally:
            for sequence in sequences:
                self.block_manager.free(sequence.block_ids)
                sequence.block_ids = []

    def _longest(self, sequence: Sequence) -> int:
        """Tokens the sequence can reach."""
        return min(sequence.prompt_len + sequence.params.max_tokens, max(self.total_max_length, sequence.prompt_len))

    def _schedule(self, running: list[Sequence]) -> list[Chunk]:
        """The next chunk of each sequence, in order, as far as the step's budget of tokens goes."""
        chunks, budget = [], self.max_num_batched_tokens
        for sequence in running:
            size = min(sequence.num_tokens - sequence.num_computed, budget)
            if size > 0:
                chunks.append(Chunk(sequence, size))
                budget -= size
        return chunks

    def _append(self, sequence: Sequence, token: int, logprob: float) -> None:
        sequence.token_ids.append(token)
        sequence.logprobs.append(logprob)
        if token in self.eos_token_ids and not sequence.params.ignore_eos:
            sequence.finish_reason = "stop"
        elif (
            sequence.num_tokens - sequence.prompt_len >= sequence.params.max_tokens
            or sequence.num_tokens >= self.total_max_length
        ):
            sequence.finish_reason = "length"


def batches(items: list, size: int) -> Iterator[list]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
