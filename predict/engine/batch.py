"""The arguments of one step, packed without padding from the chunks that take part in it."""

from dataclasses import dataclass, fields

import numpy as np

from predict.engine.request import Sequence

NO_FORCED_TOKEN = -1
GREEDY = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # a row of sampling_floats


@dataclass(frozen=True)
class StepBatch:
    """One step's inputs, as every runner and exported program takes them: T new tokens of B sequences, S rows sampled.

    Attributes:
        token_ids: [T] int32, the new tokens of all sequences one after another.
        cu_seqlens: [B + 1] int32; sequence b owns token_ids[cu_seqlens[b]:cu_seqlens[b + 1]].
        context_lens: [B] int32, tokens of each sequence already in the cache.
        block_tables: [B, M] int32, the pages of each sequence in order, padded with -1.
        sample_rows: [S] int32, rows of token_ids whose next token is wanted: none of a chunk in mid-prompt, one of a
            decode, as many as wanted when scoring.
        sampling_floats: [S, 6] float32: temperature, top_p, min_p, repetition_, presence_, frequency_penalty.
        sampling_ints: [S, 5] int64: seed, position of the token to come, top_k, forced_token (-1: none), prompt_len.
        history_ids, history_offsets: [N], [S + 1] int32: tokens seen by each row, for its penalties (may be empty: then
            history_ids holds one unused 0).
    """

    token_ids: np.ndarray
    cu_seqlens: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    sample_rows: np.ndarray
    sampling_floats: np.ndarray
    sampling_ints: np.ndarray
    history_ids: np.ndarray
    history_offsets: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        """The inputs in the order of the step's arguments."""
        return [getattr(self, f.name) for f in fields(self)]


INPUT_NAMES = tuple(f.name for f in fields(StepBatch))


@dataclass(frozen=True)
class Chunk:
    """The next ``num_tokens`` tokens of a sequence that have not been computed.

    ``score`` asks for the log-probability of every following prompt token instead of a new token at the end.
    """

    sequence: Sequence
    num_tokens: int
    score: bool = False

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that a new one is to be drawn."""
        return self.sequence.num_computed + self.num_tokens == self.sequence.num_tokens


def pack(chunks: list[Chunk]) -> StepBatch:
    """Packs chunks, in order, into one step.

    A step whose chunks are all in mid-prompt still samples its last row, greedily, because a program needs S >= 1;
    whoever asked for nothing reads nothing of it.
    """
    token_ids: list[int] = []
    rows: list[int] = []
    floats: list[tuple[float, ...]] = []
    ints: list[tuple[int, ...]] = []
    history: list[int] = []
    history_offsets = [0]
    for chunk in chunks:
        sequence, params, start = chunk.sequence, chunk.sequence.params, chunk.sequence.num_computed
        tokens = sequence.token_ids
        end = start + chunk.num_tokens
        if chunk.score:
            wanted = [(i, tokens[i + 1]) for i in range(start, min(end, len(tokens) - 1))]
        else:
            wanted = [(end - 1, NO_FORCED_TOKEN)] if chunk.samples else []
        for i, forced_token in wanted:
            rows.append(len(token_ids) + i - start)
            floats.append(
                (
                    params.temperature,
                    params.top_p,
                    params.min_p,
                    params.repetition_penalty,
                    params.presence_penalty,
                    params.frequency_penalty,
                )
            )
            prompt_len = 0
            if params.has_penalties and not chunk.score:
                history += tokens
                prompt_len = sequence.prompt_len
            ints.append((params.seed, i + 1, params.top_k, forced_token, prompt_len))
            history_offsets.append(len(history))
        token_ids += tokens[start:end]
    if not rows:
        rows.append(len(token_ids) - 1)
        floats.append(GREEDY)
        ints.append((0, 0, 0, NO_FORCED_TOKEN, 0))
        history_offsets.append(0)
    return StepBatch(
        token_ids=np.array(token_ids, np.int32),
        cu_seqlens=np.cumsum([0] + [c.num_tokens for c in chunks], dtype=np.int32),
        context_lens=np.array([c.sequence.num_computed for c in chunks], np.int32),
        block_tables=_block_tables([c.sequence.block_ids for c in chunks]),
        sample_rows=np.array(rows, np.int32),
        sampling_floats=np.array(floats, np.float32),
        sampling_ints=np.array(ints, np.int64),
        history_ids=np.array(history or [0], np.int32),
        history_offsets=np.array(history_offsets, np.int32),
    )


def _block_tables(block_ids: list[list[int]]) -> np.ndarray:
    tables = np.full((len(block_ids), max(map(len, block_ids))), -1, np.int32)
    for table, ids in zip(tables, block_ids, strict=True):
        table[: len(ids)] = ids
    return tables
