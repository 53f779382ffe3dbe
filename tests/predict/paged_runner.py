"""A runner without a model: its next token depends on every token before it, read back through the pages."""

from collections.abc import Sequence as Seq

import numpy as np

from predict.engine.batch import StepBatch, StepResult
from predict.engine.engine import Delta, Engine
from predict.engine.request import SamplingParams
from tests.predict.invariants import check_invariants

MODULUS = 2**31 - 1


def digest(tokens: Seq[int], before: int = 1) -> int:
    """A number that depends on every token and on their order."""
    for token in tokens:
        before = (before * 48271 + token + 1) % MODULUS
    return before


class PagedRunner:
    """Keeps the tokens of its pages, as a KV cache would, and draws from what it finds there."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4, vocab_size: int = 50):
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, vocab_size
        self.pages = [[-1] * block_size for _ in range(num_blocks)]
        self.steps: list[StepBatch] = []
        self.keep_steps = True

    def draw(self, tokens: Seq[int], seed: int, masked: Seq[int] = ()) -> int:
        """The token after these."""
        token = (digest(tokens) + 7919 * seed) % self.vocab_size
        while token in masked:
            token = (token + 1) % self.vocab_size
        return token

    def step(self, batch: StepBatch) -> StepResult:
        if self.keep_steps:
            self.steps.append(batch)
        size = self.block_size
        ends, contexts = batch.cu_seqlens.tolist(), batch.context_lens.tolist()
        tokens, tables = batch.token_ids.tolist(), batch.block_tables.tolist()
        offsets, ids, ints = batch.bias_offsets.tolist(), batch.bias_ids.tolist(), batch.sampling_ints.tolist()
        rows = {row: s for s, row in enumerate(batch.sample_rows.tolist())}
        assert ends[0] == 0
        assert ends[-1] == len(tokens)
        drawn = np.zeros(len(rows), np.int32)
        # First everything is written, then everything is read: a page written by two shows.
        for b, context in enumerate(contexts):
            assert ends[b + 1] > ends[b]
            for position, token in enumerate(tokens[ends[b] : ends[b + 1]], start=context):
                assert tables[b][position // size] >= 0
                self.pages[tables[b][position // size]][position % size] = token
        for b, context in enumerate(contexts):
            length = context + ends[b + 1] - ends[b]
            seen = [t for block in tables[b][: -(-length // size)] for t in self.pages[block]][:length]
            if ends[b + 1] - 1 in rows:
                s = rows[ends[b + 1] - 1]
                masked = ids[offsets[s] : offsets[s + 1]]
                assert ints[s][1] == length or ints[s][1] == 1  # the position, or that of a row nobody reads
                drawn[s] = self.draw(seen, ints[s][0], masked)
        top_ids = np.full((len(rows), 20), -1, np.int32)
        for s, row in enumerate(ints):
            top_ids[s, : row[5]] = drawn[s] + np.arange(row[5])
        return StepResult(drawn, -drawn.astype(np.float32), top_ids, -0.5 * np.maximum(top_ids, 0).astype(np.float32))


def expected(
    runner: PagedRunner, prompt: list[int], params: SamplingParams, index: int, eos: int, max_model_len: int
) -> tuple[list[int], str]:
    """Tokens and finish_reason of a sample that runs alone."""
    ends = (set() if params.ignore_eos else {eos}) | set(params.stop_token_ids)
    tokens = list(prompt)
    while True:
        early = len(tokens) - len(prompt) < params.min_tokens
        tokens.append(runner.draw(tokens, params.seed + index, ends if early else ()))
        if tokens[-1] in ends:
            return tokens[len(prompt) :], "stop"
        if len(tokens) - len(prompt) == params.max_tokens or len(tokens) == max_model_len:
            return tokens[len(prompt) :], "length"


def run(engine: Engine) -> dict[tuple[str, int], list[Delta]]:
    """Steps until nothing is left, checking the invariants; the Deltas of each sample."""
    deltas: dict[tuple[str, int], list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault((delta.request_id, delta.index), []).append(delta)
        check_invariants(engine)
    return deltas


def tokens_of(deltas: list[Delta]) -> list[int]:
    """The tokens of one sample."""
    return [token for delta in deltas for token in delta.token_ids]
