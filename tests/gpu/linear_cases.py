"""linear: 16-bit weights within the rounding of their sums, int8 to the bit, and a row never depends on the others."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from ops import reference
from tests.gpu.case import Case, assert_same_bits, assert_within, normal
from tests.gpu.devices import Device
from tests.gpu.floats import NAMES, ROUNDING, STORED, decode, encode
from tests.gpu.table import BF16, F16, F32, I8
from tests.ops.sizes import LINEAR

# (T, N, K) beside the CPU's: the tokens of an mma (8), of a decode launch and of a block of many; strips of 32 rows;
# K of so many tiles that quarters are of one, and not of the same number; and so long that int8 tokens fill a block's
# shared memory: beside a shorter ring, in two parts and more.
GPU_SIZES = [(8, 64, 256), (9, 96, 320), (32, 33, 192), (33, 128, 96), (65, 64, 130), (130, 160, 224), (257, 40, 64)]
GPU_SIZES += [(13, 40, 6144), (28, 72, 6144), (31, 33, 4096)]
SUBSETS = (slice(0, 1), slice(4, 5), slice(1, 9), slice(0, 40), slice(2, 100))


@dataclass(frozen=True)
class Weight:
    """How a weight is stored: 16-bit floats of the activations' type (bits None), or int8 with tokens of `bits`."""

    bits: int | None

    def __str__(self) -> str:
        return f"int8, {self.bits}-bit tokens" if self.bits else "16-bit weights"


WEIGHTS = [Weight(None), Weight(16), Weight(8)]


def call(device: Device, x, x_dtype: int, weight: tuple, y_dtype: int, shape: tuple[int, int, int]) -> np.ndarray:
    """y [T, N] as stored. weight: (array, dtype, scale or None, activation bits)."""
    tokens, rows, columns = shape
    w, w_dtype, scale, bits = weight
    y = device.empty((tokens, rows), STORED[y_dtype])
    workspace = device.workspace(device.kernels.linear_workspace(w_dtype, tokens, rows, columns))
    device_x = device.array(x)
    device.kernels.linear(
        *(device_x.pointer, x_dtype, w.pointer, w_dtype, scale and scale.pointer, bits or 0, y.pointer, y_dtype),
        *(tokens, rows, columns, workspace.pointer, device.stream),
    )
    return y.numpy()


def make(device: Device, dtype: int, kind: Weight, rows: int, columns: int) -> tuple[tuple, np.ndarray, np.ndarray]:
    """The packed weight for call(), the values it stands for [N, K] and its scale (ones where there is none)."""
    values = normal(rows, rows, columns)
    if kind.bits is None:
        stored = encode(values, dtype)
        return (
            (device.array(reference.pack_bf16(stored)), dtype, None, None),
            decode(stored, dtype),
            np.ones(rows, np.float32),
        )
    q, scale = reference.quantize_int8(values)
    return (device.array(reference.pack_int8(q)), I8, device.array(scale), kind.bits), q, scale


def is_the_reference(device: Device, size: tuple[int, int, int], x_dtype: int, kind: Weight, y_dtype: int) -> None:
    """Also: a part of the rows gives the same bits."""
    tokens, rows, columns = size
    x = encode(normal(tokens, tokens, columns), x_dtype)
    weight, values, scale = make(device, x_dtype, kind, rows, columns)
    y = call(device, x, x_dtype, weight, y_dtype, size)
    if kind.bits:
        expected = reference.weight_only_linear(decode(x, x_dtype), values, scale, kind.bits)
        assert_same_bits(y, encode(expected, y_dtype), "int8")
    else:
        exact, w = decode(x, x_dtype).astype(np.float64), values.astype(np.float64)
        expected = exact @ w.T
        # One addition for every 16 columns and some to fold; a tensor core may cut bits off where we would round, and
        # aligns its addends to the largest: four times a rounding's error.
        bound = (columns / 16 + 6) * 2.0**-22 * (np.abs(exact) @ np.abs(w).T)
        bound += (ROUNDING[y_dtype] if y_dtype != F32 else 0) * (np.abs(expected) + bound)
        assert_within(decode(y, y_dtype), expected, bound)
    for part in SUBSETS:
        if len(x[part]) and len(x[part]) < tokens:
            again = call(device, x[part], x_dtype, weight, y_dtype, (len(x[part]), rows, columns))
            assert_same_bits(again, y[part], f"rows {part.start}..{part.stop - 1} alone")


def longest_and_largest_sums_are_exact(device: Device, tokens: int, bits: int) -> None:
    """65,536 products of the largest integers: sums of one plane that nearly fill an int32."""
    rows, columns = 33, 65536
    x, q, scale = (
        np.full([tokens, columns], 3.0, np.float32),
        np.full([rows, columns], 127, np.int8),
        np.ones(rows, np.float32),
    )
    x[tokens // 2], q[1:20] = -3.0, -127
    weight = device.array(reference.pack_int8(q)), I8, device.array(scale), bits
    y = call(device, encode(x, BF16), BF16, weight, F32, (tokens, rows, columns))
    assert_same_bits(y, reference.weight_only_linear(x, q, scale, bits), "the longest sums")


def odd_tokens(device: Device, bits: int) -> None:
    """Tokens of zeros, of very small numbers, with not a number, of one large element: as the CPU has them."""
    tokens, rows, columns = 20, 40, 200
    x = encode(normal(3, tokens, columns), BF16)
    x[3] = 0
    x[5] = encode(np.full(columns, 2.0**-110, np.float32), BF16)
    x[7, 11] = encode(np.float32([np.nan]), BF16)[0]
    x[8, 0] = encode(np.float32([np.inf]), BF16)[0]
    x[9, :] = 0
    x[9, 150] = encode(np.float32([-1e30]), BF16)[0]
    weight, values, scale = make(device, BF16, Weight(bits), rows, columns)
    y = call(device, x, BF16, weight, F32, (tokens, rows, columns))
    finite = np.isfinite(decode(x, BF16)).all(axis=1)
    expected = reference.weight_only_linear(decode(x[finite], BF16), values, scale, bits)
    assert_same_bits(y[finite], expected, "finite tokens")
    assert np.isnan(y[~finite]).all(), "a token that is not finite gives NaN"


def not_finite(device: Device, dtype: int) -> None:
    """16-bit weights: what is not finite stays in its own row."""
    tokens, rows, columns = 12, 40, 96
    x = encode(normal(4, tokens, columns), dtype)
    weight, _, _ = make(device, dtype, Weight(None), rows, columns)
    clean = call(device, x, dtype, weight, F32, (tokens, rows, columns))
    x[5, 17] = encode(np.float32([np.nan]), dtype)[0]
    y = call(device, x, dtype, weight, F32, (tokens, rows, columns))
    assert np.isnan(y[5]).all(), "its own row"
    others = np.arange(tokens) != 5
    assert_same_bits(y[others], clean[others], "the other rows")


def cases() -> list[Case]:
    """Every case of linear."""
    made = []
    for index, size in enumerate([*LINEAR, *GPU_SIZES]):
        for kind in WEIGHTS:
            for x_dtype in (BF16, F16):
                y_dtype = (F32, x_dtype)[index % 2]
                name = f"{size} {NAMES[x_dtype]} -> {NAMES[y_dtype]}, {kind}"
                check = partial(is_the_reference, size=size, x_dtype=x_dtype, kind=kind, y_dtype=y_dtype)
                made.append(Case("linear", name, check))
    made += [Case("linear", f"odd tokens, {bits} bits", partial(odd_tokens, bits=bits)) for bits in (16, 8)]
    for tokens, bits in ((2, 16), (1, 8), (40, 16)):
        check = partial(longest_and_largest_sums_are_exact, tokens=tokens, bits=bits)
        made.append(Case("linear", f"the longest and largest sums, {tokens} tokens, {bits} bits", check))
    made += [Case("linear", f"not finite, {NAMES[d]}", partial(not_finite, dtype=d)) for d in (BF16, F16)]
    return made
