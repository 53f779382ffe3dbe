"""Operators of one row at a time: rms_norm, embedding, sample."""

from functools import partial

import numpy as np

from ops import reference
from tests.gpu.case import Case, assert_same_bits, assert_within, normal
from tests.gpu.devices import Array, Device
from tests.gpu.floats import NAMES, ROUNDING, STORED, decode, encode
from tests.gpu.table import BF16, F16, F32
from tests.ops.sampling_rows import Rows
from tests.ops.sizes import RMS_NORM, SAMPLE

EPS = 1e-5
# float32 sums in another order: a few units in the last place.
NORM_TOLERANCE = 2e-6
# The float32 exponentials are within 2 units in the last place, their float64 sum and its logarithm far closer; the
# result is one rounding of a number up to about 20.
LOGPROB_TOLERANCE = 3e-6


def pointer(array: Array | None) -> int | None:
    """None is NULL."""
    return array and array.pointer


def normed(device: Device, x, delta, rows, weight, y_dtype: int, in_place: bool) -> tuple[np.ndarray, np.ndarray]:
    """(y as stored, the sum). In place: the residual is its own sum."""
    count, hidden = (len(x) if rows is None else len(rows)), x.shape[1]
    arrays = [None if a is None else device.array(a) for a in (x, delta, rows, weight)]
    total = arrays[0] if in_place else device.empty((count, hidden), np.float32)
    y = device.empty((count, hidden), STORED[y_dtype])
    device.kernels.rms_norm(
        *map(pointer, arrays), pointer(total), pointer(y), y_dtype, count, hidden, EPS, device.stream
    )
    return y.numpy(), total.numpy()


def norm_is_the_reference(device: Device, size: tuple[int, int], y_dtype: int, add: bool) -> None:
    """And each row alone, and chosen by `rows`, has the same bits."""
    tokens, hidden = size
    x, weight = normal(1, tokens, hidden), normal(2, hidden)
    delta = normal(3, tokens, hidden) if add else None
    y, total = normed(device, x, delta, None, weight, y_dtype, in_place=add)
    expected_total = x + delta if add else x
    expected = reference.rms_norm(expected_total, weight, EPS)
    assert_same_bits(total, expected_total, "the sum")
    rounding = ROUNDING[y_dtype] if y_dtype != F32 else 0
    assert_within(decode(y, y_dtype), expected, (rounding + NORM_TOLERANCE) * np.abs(expected) + 1e-6)
    rows = np.array([tokens - 1, 0, tokens // 2, tokens // 2], np.int32)
    some, some_total = normed(device, x, delta, rows, weight, y_dtype, in_place=False)
    assert_same_bits(some, y[rows], f"rows {rows}")
    assert_same_bits(some_total, expected_total[rows], f"the sums of rows {rows}")


def embedding_is_the_table(device: Device, dtype: int, hidden: int) -> None:
    """Rows of the table, converted."""
    table = encode(normal(1, 50, hidden), dtype)
    ids = np.array([49, 0, 7, 7, 31], np.int32)
    arrays, out = [device.array(ids), device.array(table)], device.empty((5, hidden), np.float32)
    device.kernels.embedding(arrays[0].pointer, arrays[1].pointer, dtype, out.pointer, 5, 50, hidden, device.stream)
    assert_same_bits(out.numpy(), decode(table, dtype)[ids], "rows")


def sampled(device: Device, rows: Rows) -> list[np.ndarray]:
    """next_tokens, logprobs, top_ids and top_logprobs."""
    inputs = [device.array(x) for x in rows.arrays()]
    count, vocabulary = rows.logits.shape
    outputs = [device.empty((count, *shape), kind) for shape, kind in (((), np.int32), ((), np.float32))]
    outputs += [device.empty((count, 20), kind) for kind in (np.int32, np.float32)]
    workspace = device.workspace(device.kernels.sample_workspace(count, vocabulary))
    device.kernels.sample(
        *(x.pointer for x in [*inputs, *outputs]), count, vocabulary, workspace.pointer, device.stream
    )
    return [x.numpy() for x in outputs]


def sample_is_the_reference(device: Device, size: tuple[int, int]) -> None:
    """Token for token, whatever the parameters."""
    count, vocabulary = size
    rows = Rows.random(count, vocabulary, seed=vocabulary)
    tokens, logprobs, top_ids, top_logprobs = sampled(device, rows)
    expected = reference.sample(*rows.arrays())
    assert_same_bits(tokens, expected[0], "tokens")
    assert_within(logprobs, expected[1], LOGPROB_TOLERANCE)
    assert_same_bits(top_ids, expected[2], "top_ids")
    assert_within(top_logprobs, expected[3], LOGPROB_TOLERANCE)
    for s in (0, count // 2):
        for of_row, of_all in zip(sampled(device, rows.row(s)), (tokens, logprobs, top_ids, top_logprobs), strict=True):
            assert_same_bits(of_row[0], of_all[s], f"row {s} alone")


def rows_without_an_answer(device: Device) -> None:
    """NaN, +inf or nothing above -inf: token -1, and the other rows as ever."""
    rows = Rows.random(12, 300, seed=4)
    expected = sampled(device, rows)[0]
    rows.logits[2, 100], rows.logits[5, 0], rows.logits[7] = np.nan, np.inf, -np.inf
    expected[[2, 5, 7]] = -1
    assert_same_bits(sampled(device, rows)[0], expected, "tokens")


def cases() -> list[Case]:
    """Every case of rms_norm, embedding and sample."""
    made = []
    for size in RMS_NORM:
        for y_dtype in (F32, BF16, F16):
            for add in (False, True):
                check = partial(norm_is_the_reference, size=size, y_dtype=y_dtype, add=add)
                made.append(Case("rms_norm", f"{size} -> {NAMES[y_dtype]}{', added' * add}", check))
    for dtype in (F32, BF16, F16):
        for hidden in (1, 77, 4096):
            check = partial(embedding_is_the_table, dtype=dtype, hidden=hidden)
            made.append(Case("embedding", f"{NAMES[dtype]} [50, {hidden}]", check))
    for count, vocabulary in SAMPLE:
        size = count // 5, vocabulary  # a block of a thousand threads a row: the emulation's time
        made.append(Case("sample", f"{size}", partial(sample_is_the_reference, size=size)))
    made.append(Case("sample", "rows without an answer", rows_without_an_answer))
    return made
