"""The arguments of one step, packed without padding from the chunks that take part in it, and what it gives."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from predict.engine.request import SamplingParams, Sequence

POSITION, FORCED_TOKEN, TOP_LOGPROBS = 1, 3, 5  # columns of sampling_ints


class StepBatch(NamedTuple):
    """One step's inputs, as every runner and exported program takes them: T new tokens of B sequences, S rows sampled.

    Attributes:
        token_ids: [T] int32, the new tokens of all sequences one after another.
        cu_seqlens: [B + 1] int32; sequence b owns token_ids[cu_seqlens[b]:cu_seqlens[b + 1]].
        context_lens: [B] int32, tokens of each sequence already in the cache.
        block_tables: [B, M] int32, the pages of each sequence in order, padded with -1.
        sample_rows: [S] int32, rows of token_ids whose next token is wanted: none of a chunk in mid-prompt, one of a
            decode, as many as wanted when scoring.
        sampling_floats: [S, 6] float32: temperature, top_p, min_p, repetition_, presence_, frequency_penalty.
        sampling_ints: [S, 6] int64: seed, position of the token to come, top_k, forced_token (-1: none), prompt_len,
            top_logprobs.
        history_ids, history_offsets: [N], [S + 1] int32: tokens seen by each row, for its penalties (may be empty: then
            history_ids holds one unused 0).
        bias_ids, bias_values, bias_offsets: [N] int32, [N] float32, [S + 1] int32: what each row adds to its logits
            (may be empty: then the first two hold one unused 0).
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
    bias_ids: np.ndarray
    bias_values: np.ndarray
    bias_offsets: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        """The inputs in the order of the step's arguments."""
        return list(self)

    @property
    def wants_top_logprobs(self) -> bool:
        """Whether any row does."""
        return any(self.sampling_ints[:, TOP_LOGPROBS].tolist())


# Rank and element type of every input, in the order of the step's arguments; every size is free.
INPUTS = dict.fromkeys(StepBatch._fields, (1, "int32")) | {
    "block_tables": (2, "int32"),
    "sampling_floats": (2, "float32"),
    "sampling_ints": (2, "int64"),
    "bias_values": (1, "float32"),
}
INPUT_NAMES = tuple(INPUTS)


class StepResult(NamedTuple):
    """One step's outputs.

    Attributes:
        tokens: [S] int32, the next token of each of the batch's sample_rows.
        logprobs: [S] float32, the model's log-probability of it.
        top_ids, top_logprobs: [S, 20] int32 and float32, the most probable tokens of the rows that ask, -1 and 0 of the
            others; None where no row asks.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclass(slots=True)  # not frozen, which would take eight times as long to make, for every sequence of every step
class Chunk:
    """The next ``num_tokens`` tokens of a sequence that have not been computed."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that a new one is to be drawn."""
        return self.sequence.num_computed + self.num_tokens == len(self.sequence.token_ids)


# What a step without rows to sample samples, greedily, because a program needs S >= 1.
_UNUSED = Sequence([0], SamplingParams())


def pack(chunks: list[Chunk]) -> StepBatch:
    """Packs chunks, in order, into one step.

    A step whose chunks are all in mid-prompt still samples its last row, greedily; whoever asked for nothing reads
    nothing of it.
    """
    offsets = list(accumulate((c.num_tokens for c in chunks), initial=0))
    sampled = [(c.sequence, end - 1) for c, end in zip(chunks, offsets[1:], strict=True) if c.samples]
    sequences, rows = zip(*(sampled or [(_UNUSED, offsets[-1] - 1)]), strict=True)
    ints = _rows([s.int_row for s in sequences], np.int64)
    for i, s in enumerate(sequences):
        ints[i, POSITION] = len(s.token_ids)
    histories = [s.token_ids.tobytes() if s.has_penalties else b"" for s in sequences]
    return _batch(
        chunks, offsets, rows, _rows([s.float_row for s in sequences], np.float32), ints, histories, sequences
    )


def pack_scoring(sequence: Sequence, num_tokens: int) -> StepBatch:
    """A step over the next num_tokens tokens of a sequence that forces, and so scores, the token after each.

    The last token of the sequence has none after it: its row is not sampled.
    """
    start = sequence.num_computed
    following = sequence.token_ids[start + 1 : start + num_tokens + 1]
    count = len(following)
    ints = np.zeros((count, 6), np.int64)
    ints[:, POSITION] = np.arange(start + 1, start + count + 1)
    ints[:, FORCED_TOKEN] = following
    floats = np.tile(np.frombuffer(_UNUSED.float_row, np.float32), (count, 1))
    return _batch(
        [Chunk(sequence, num_tokens)], [0, num_tokens], range(count), floats, ints, [b""] * count, [_UNUSED] * count
    )


def _batch(chunks, offsets, rows, floats, ints, histories, sequences) -> StepBatch:
    owners = [c.sequence for c in chunks]
    tokens = [
        s.token_ids[s.num_computed : s.num_computed + c.num_tokens].tobytes()
        for s, c in zip(owners, chunks, strict=True)
    ]
    # 0xff in every byte is the int32 -1.
    width = max(len(s.block_ids) for s in owners)
    tables = [s.block_ids.tobytes().ljust(4 * width, b"\xff") for s in owners]
    biases = [s.bias or (b"", b"") for s in sequences]
    return StepBatch(
        token_ids=_joined(tokens, np.int32),
        cu_seqlens=_int32(offsets),
        context_lens=_int32(s.num_computed for s in owners),
        block_tables=_joined(tables, np.int32).reshape(len(chunks), width),
        sample_rows=_int32(rows),
        sampling_floats=floats,
        sampling_ints=ints,
        history_ids=_ragged(histories, np.int32),
        history_offsets=_ends(histories),
        bias_ids=_ragged([ids for ids, _ in biases], np.int32),
        bias_values=_ragged([values for _, values in biases], np.float32),
        bias_offsets=_ends([ids for ids, _ in biases]),
    )


def _int32(numbers: Iterable[int]) -> np.ndarray:
    # Not np.array: in a decode the weights drive all code from the caches, and its conversions are much code.
    return np.frombuffer(array("i", numbers), np.int32)


def _joined(pieces: list[bytes], dtype: type) -> np.ndarray:
    return np.frombuffer(bytearray().join(pieces), dtype)  # a bytearray, so that the array can be written to


def _rows(pieces: list[bytes], dtype: type) -> np.ndarray:
    return _joined(pieces, dtype).reshape(len(pieces), -1)


def _ragged(pieces: list[bytes], dtype: type) -> np.ndarray:
    joined = _joined(pieces, dtype)
    return joined if len(joined) else np.zeros(1, dtype)


def _ends(pieces: list[bytes]) -> np.ndarray:
    """Where each piece of 4-byte elements begins, and where the last ends."""
    return _int32(accumulate((len(piece) // 4 for piece in pieces), initial=0))
