"""Continuous batching: requests come and go at any time, and every step is as full as its budget allows."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from predict.engine.batch import StepBatch, StepResult, pack, pack_scoring
from predict.engine.block_manager import BlockManager
from predict.engine.request import SamplingParams, Sequence
from predict.engine.scheduler import Scheduler
from predict.engine.text import Detokenizer, StoppedText

DEFAULT_MAX_NUM_SEQS = 64
# Enough for experts to multiply at full speed (128 tokens each of 8), and other sequences wait no longer than need be
# while a long prompt is computed.
DEFAULT_MAX_NUM_BATCHED_TOKENS = 512


class Runner(Protocol):
    """Whatever runs a step; predict.runner has the two there are."""

    num_blocks: int
    block_size: int
    vocab_size: int

    def step(self, batch: StepBatch) -> StepResult: ...


@dataclass(slots=True)  # not frozen, which would take eight times as long to make, for every token
class Delta:
    """What a step added to one sample of a request.

    Attributes:
        request_id, index: the request, and which of its samples (0 to n - 1).
        token_ids, logprobs: the new tokens and the model's log-probabilities of them.
        top_logprobs: for each new token the (id, log-probability) of the most probable ones, most probable first; None
            unless SamplingParams.logprobs asks.
        text: what can be shown now: it lags behind the tokens while a character is incomplete, or while a stop string
            may be under way.
        finish_reason: None while it runs; then "stop" (an end-of-sequence or stop token, or a stop string), "length"
            (max_tokens, or the engine's max_model_len) or "abort".
        stop_reason: the stop string or stop token that ended it; None for the end-of-sequence token.
        num_prompt_tokens, num_cached_tokens: tokens of the prompt, and how many of them were found in the cache.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] | None
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment, and since it was made.

    Attributes:
        waiting, running: sequences (each sample of a request is one).
        blocks_total: pages of the KV cache. Those neither free nor cached are held by running sequences.
        blocks_free: pages without known content.
        blocks_cached: pages nobody holds whose content may be found again.
        prefix_hit_tokens, prefix_queried_tokens: tokens of prompts found in the cache, of all that were looked up (once
            a request, when it first runs).
        preemptions: times a running sequence lost its pages.
        generated_tokens: tokens drawn.
    """

    waiting: int
    running: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    prefix_hit_tokens: int
    prefix_queried_tokens: int
    preemptions: int
    generated_tokens: int


class Engine:
    """Runs requests on a runner. Not for several threads at once.

    Args:
        runner: runs one step.
        eos_token_ids: tokens that end a sequence.
        max_model_len: tokens of a sequence at the most, prompt included; it then finishes with "length".
        max_num_batched_tokens: new tokens a step computes at the most; longer prompts are prefilled in chunks.
        max_num_seqs: sequences that run together at the most; the others wait.
        prefix_caching: find the beginning of a prompt in the pages of earlier requests.
        new_detokenizer: makes what turns the tokens after a prompt into text; without, there is no text.
    """

    def __init__(
        self,
        runner: Runner,
        eos_token_ids: Seq[int],
        max_model_len: int,
        *,
        max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        prefix_caching: bool = True,
        new_detokenizer: Callable[[Seq[int]], Detokenizer] | None = None,
    ):
        for name, value in (("max_num_batched_tokens", max_num_batched_tokens), ("max_num_seqs", max_num_seqs)):
            if value < 1:
                raise ValueError(f"{name} is {value}, needs at least 1")
        self.runner = runner
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len
        self.block_manager = BlockManager(runner.num_blocks, runner.block_size, prefix_caching)
        self.scheduler = Scheduler(self.block_manager, max_num_seqs, max_num_batched_tokens)
        self._new_detokenizer = new_detokenizer
        self._unfinished: dict[str, list[Sequence]] = {}
        self._aborted: list[Delta] = []
        self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether another step is needed."""
        return bool(self._unfinished or self._aborted)

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        scheduler, manager = self.scheduler, self.block_manager
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            blocks_total=manager.num_blocks,
            blocks_free=manager.num_free,
            blocks_cached=manager.num_cached,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_queried_tokens=scheduler.prefix_queried_tokens,
            preemptions=scheduler.num_preemptions,
            generated_tokens=self._generated_tokens,
        )

    def check(self, prompt_ids: Seq[int], params: SamplingParams) -> None:
        """Refuses a request that could never run here.

        Raises:
            ValueError: the prompt is empty, too long, or holds a token outside the vocabulary; a parameter names such a
                token, asks for stop strings where there is no text, or leaves no token to draw; or the pool of pages is
                too small. Says the numbers.
        """
        last = self.runner.vocab_size - 1
        if not prompt_ids:
            raise ValueError("the prompt is empty; needs at least one token")
        if len(prompt_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, total_max_length is {self.max_model_len}: no room for an "
                "answer; shorten it or raise total_max_length"
            )
        for name, ids in (
            ("the prompt", prompt_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            for token in (min(ids, default=0), max(ids, default=0)):
                if not 0 <= token <= last:
                    raise ValueError(f"{name} holds token {token}, needs ids from 0 to {last}")
        if params.stop and self._new_detokenizer is None:
            raise ValueError("stop needs text, and this engine was made without a detokenizer; use stop_token_ids")
        if params.min_tokens and len(self._stop_token_ids(params)) > last:
            raise ValueError(
                f"min_tokens is {params.min_tokens}, but stop_token_ids holds every token: none is left to draw"
            )
        longest = self._max_length(prompt_ids, params)
        needed, manager = self.block_manager.blocks_for(longest - 1), self.block_manager
        if needed > manager.num_blocks:
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens and up to {longest - len(prompt_ids)} new ones need {needed} KV "
                f"cache blocks of {manager.block_size} tokens, there are {manager.num_blocks}; shorten the prompt or "
                "max_tokens, or raise --kv_cache_memory"
            )

    def add(self, request_id: str, prompt_ids: Seq[int], params: SamplingParams, *, chat: bool = False) -> None:
        """Queues a request; its Deltas come out of later steps.

        Args:
            request_id: not that of an unfinished request.
            prompt_ids: tokens to continue.
            params: how.
            chat: the text is an answer of its own, not the prompt's continuation: its leading space is dropped.

        Raises:
            ValueError: as :meth:`check` does, at once; or the id is taken.
        """
        if request_id in self._unfinished:
            raise ValueError(f"request {request_id!r} has not finished; give every request an id of its own")
        self.check(prompt_ids, params)
        stop_token_ids, max_length = self._stop_token_ids(params), self._max_length(prompt_ids, params)
        sequences: list[Sequence] = []
        for index in range(params.n):
            sequence = Sequence(
                prompt_ids, params, request_id, index, stop_token_ids, max_length, sequences[0] if index else None
            )
            if self._new_detokenizer is not None:
                shown = () if chat else sequence.token_ids[: sequence.prompt_len]
                sequence.text = StoppedText(partial(self._new_detokenizer, shown), params.stop, params.min_tokens)
            sequences.append(sequence)
            self.scheduler.add(sequence)
        self._unfinished[request_id] = sequences

    def abort(self, request_id: str) -> None:
        """Ends a request: its pages are available at once, the next step says "abort" for each unfinished sample.

        An id that is unknown is no error: the request may just have finished.
        """
        for sequence in self._unfinished.pop(request_id, ()):
            self.scheduler.remove(sequence)
            self._aborted.append(self._delta(sequence, finish_reason="abort"))

    def step(self) -> list[Delta]:
        """Runs one step, if there is anything to compute; one Delta for every token drawn and every aborted sample.

        After an error of the runner the step can be run again, or its requests aborted.
        """
        chunks = self.scheduler.schedule()
        result = self.runner.step(pack(chunks)) if chunks else None
        deltas, self._aborted = self._aborted, []
        if result is None:
            return deltas
        tokens, logprobs = result.tokens.tolist(), result.logprobs.tolist()
        block_size, row = self.block_manager.block_size, 0
        for chunk in chunks:
            sequence, samples = chunk.sequence, chunk.samples
            sequence.num_computed += chunk.num_tokens
            if sequence.num_computed // block_size > sequence.num_registered:
                self.block_manager.register(sequence)
            if samples:
                delta = self._append(sequence, tokens[row], logprobs[row])
                if sequence.params.logprobs is not None:
                    delta.top_logprobs = [_alternatives(result, row, sequence.params.logprobs)]
                deltas.append(delta)
                row += 1
        return deltas

    def score(self, token_ids: Seq[int]) -> list[float]:
        """The log-probability of each token but the first, given those before it.

        Raises:
            MemoryError: running requests leave too few pages.
        """
        sequence, logprobs = Sequence(token_ids, SamplingParams()), []
        self.block_manager.hold(sequence, [])
        try:
            while (left := sequence.num_tokens - 1 - sequence.num_computed) > 0:
                count = min(left, self.scheduler.max_num_batched_tokens)
                logprobs += self.runner.step(pack_scoring(sequence, count)).logprobs.tolist()
                sequence.num_computed += count
        finally:
            self.block_manager.release(sequence)
        return logprobs

    def _append(self, sequence: Sequence, token: int, logprob: float) -> Delta:
        """Adds a drawn token, which may end the sequence."""
        self._generated_tokens += 1
        sequence.token_ids.append(token)
        delta = self._delta(sequence, [token], [logprob])
        text = sequence.text
        if token in sequence.stop_token_ids:
            delta.finish_reason = "stop"
            if sequence.params.ignore_eos or token not in self.eos_token_ids:
                delta.stop_reason = token
        else:
            if text is not None:
                delta.text = text.push(token)
                if text.found is not None:
                    delta.finish_reason, delta.stop_reason = "stop", text.found
            if delta.finish_reason is None and len(sequence.token_ids) >= sequence.max_length:
                delta.finish_reason = "length"
        if delta.finish_reason is not None:
            if text is not None:
                delta.text += text.finish()
            self._finish(sequence)
        return delta

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        siblings = self._unfinished[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._unfinished[sequence.request_id]

    def _delta(self, sequence: Sequence, token_ids=(), logprobs=(), finish_reason: str | None = None) -> Delta:
        return Delta(
            sequence.request_id,
            sequence.index,
            list(token_ids),
            list(logprobs),
            None,
            "",
            finish_reason,
            None,
            sequence.prompt_len,
            sequence.num_cached or 0,
        )

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        return (frozenset() if params.ignore_eos else self.eos_token_ids) | frozenset(params.stop_token_ids)

    def _max_length(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        return min(len(prompt_ids) + params.max_tokens, self.max_model_len)


def _alternatives(result: StepResult, row: int, count: int) -> list[tuple[int, float]]:
    if result.top_ids is None or result.top_logprobs is None:
        return []  # every row that wants some wants 0 of them
    ids, logprobs = result.top_ids[row, :count].tolist(), result.top_logprobs[row, :count].tolist()
    return [(token, logprob) for token, logprob in zip(ids, logprobs, strict=True) if token >= 0]
