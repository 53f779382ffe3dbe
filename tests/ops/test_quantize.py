"""ops.quantize against the reference: the same integers and scales, from tensors and from host memory."""

import numpy as np
import paddle
import pytest

from ops import library, reference
from ops.quantize import (
    pack_bf16,
    pack_gate_up,
    pack_int8,
    pack_into,
    packed_shape,
    quantize_int8,
    quantize_int8_into,
)

SIZES = [(1, 1), (2, 15), (3, 16), (5, 77), (300, 530)]


def weights(rows, columns):
    """Rows of very different sizes, one of them zeros, one of exact halves of a scale."""
    weight = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32)
    weight *= 10.0 ** np.arange(-3, rows - 3).clip(-3, 4)[:, None]
    if rows > 2:
        weight[1] = 0
        weight[2] = np.arange(columns) % 255 / 2 - 63.5
        weight[2, 0] = 127
    return weight.astype(np.float32)


def as_bfloat16_bits(weight):
    return (weight.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_quantize_is_the_reference(rows, columns, dtype):
    weight = paddle.to_tensor(weights(rows, columns)).astype(dtype)
    q, scale = quantize_int8(weight)
    expected_q, expected_scale = reference.quantize_int8(weight.astype("float32").numpy())
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(q.numpy(), expected_q)


def test_dequantised_is_within_half_a_scale():
    weight = weights(40, 200)
    q, scale = (t.numpy() for t in quantize_int8(paddle.to_tensor(weight)))
    # Beside the half: the division and the product are rounded, each within 2^-24 of at most 127 scales.
    allowed = (0.5 + 127 * 2.0**-22) * scale[:, None]
    assert np.all(np.abs(reference.dequantize_int8(q, scale) - weight) <= allowed)


def test_numbers_too_small_for_their_scale():
    weight = np.float32(1e-45) * np.arange(6, dtype=np.float32).reshape(1, 6) * np.float32(30)
    q, scale = (t.numpy() for t in quantize_int8(paddle.to_tensor(weight)))
    expected_q, expected_scale = reference.quantize_int8(weight)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_host_memory_into_slices(dtype, threads):
    before = library.num_threads()
    library.set_num_threads(threads)
    weight = weights(300, 530)[:, 7:500]
    source = {
        "float32": weight,
        "bfloat16": as_bfloat16_bits(weights(300, 530))[:, 7:500],
        "float16": weights(300, 530).astype(np.float16)[:, 7:500],
    }[dtype]
    q, scale = np.full([4, 300, 493], 99, np.int8), np.full([4, 300], 99, np.float32)
    quantize_int8_into(source, q[2], scale[2], dtype)
    library.set_num_threads(before)
    value = (source.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else source.astype(np.float32)
    expected_q, expected_scale = reference.quantize_int8(value)
    np.testing.assert_array_equal(q[2], expected_q)
    np.testing.assert_array_equal(scale[2], expected_scale)
    assert np.all(q[[0, 1, 3]] == 99)
    assert np.all(scale[[0, 1, 3]] == 99)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(value):
    weight = weights(5, 33)
    weight[3, 32] = value
    with pytest.raises(ValueError, match="row 3 of weight has a value that is not finite"):
        quantize_int8(paddle.to_tensor(weight))
    with pytest.raises(ValueError, match="row 3 of weight has a value that is not finite"):
        quantize_int8_into(weight, np.empty([5, 33], np.int8), np.empty(5, np.float32), "float32")


def test_tensor_refusals():
    with pytest.raises(ValueError, match="weight is int8, needs float32 or bfloat16 or float16"):
        quantize_int8(paddle.zeros([2, 2], "int8"))
    with pytest.raises(ValueError, match=r"weight has shape \[2, 2, 2\], needs \[-1, -1\]"):
        quantize_int8(paddle.zeros([2, 2, 2]))


WEIGHT, Q, SCALE = np.zeros([4, 6], np.float32), np.zeros([4, 6], np.int8), np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("weight", "q", "scale", "dtype", "message"),
    [
        (WEIGHT, Q, SCALE, "float64", "dtype is 'float64', needs one of float32, bfloat16, float16"),
        (WEIGHT, Q, SCALE, "bfloat16", r"weight is float32 \[4, 6\], needs uint16 \[N, K\]"),
        (WEIGHT.T, Q.T.copy(), np.zeros(6, np.float32), "float32", "weight has strides"),
        (WEIGHT, Q[:3], SCALE, "float32", r"q is int8 \[3, 6\]"),
        (WEIGHT[:, :5], Q[:, :5], SCALE, "float32", "needs contiguous"),
        (WEIGHT, Q, SCALE.astype(np.float64), "float32", "scale is float64"),
        (WEIGHT[:0], Q[:0], SCALE[:0], "float32", r"weight is float32 \[0, 6\]"),
    ],
)
def test_host_refusals(weight, q, scale, dtype, message):
    with pytest.raises(ValueError, match=message):
        quantize_int8_into(weight, q, scale, dtype)


def integers(rows, columns):
    return np.random.default_rng(rows + columns).integers(-127, 128, [rows, columns]).astype(np.int8)


def sixteen_bits(rows, columns):
    return np.random.default_rng(rows + columns).integers(0, 1 << 16, [rows, columns]).astype(np.uint16)


# What makes a weight, what packs it, the same by the reference, and what stands for zero.
PACKINGS = [
    (integers, pack_int8, reference.pack_int8, "int8", 128),
    (sixteen_bits, pack_bf16, reference.pack_bf16, "bfloat16", 0),
]


@pytest.mark.parametrize(("make", "pack", "expected", "dtype", "zero"), PACKINGS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (33, 65), (70, 130), (300, 530)])
def test_packing_is_the_reference(rows, columns, make, pack, expected, dtype, zero):
    weight = make(rows, columns)
    packed = pack(weight)
    assert list(packed.shape) == packed_shape(rows, columns, dtype)
    assert packed[0, 0].nbytes == 2048
    np.testing.assert_array_equal(packed, expected(weight))
    np.testing.assert_array_equal(reference.unpack(packed, rows, columns), weight)
    weight = make(2 * rows, columns)
    np.testing.assert_array_equal(pack_gate_up(weight), reference.pack_gate_up(weight))
    np.testing.assert_array_equal(reference.unpack_gate_up(pack_gate_up(weight), rows, columns), weight)


def test_float16_is_packed_as_bfloat16_is():
    weight = sixteen_bits(50, 70)
    packed = pack_bf16(weight.view(np.float16))
    assert packed.dtype == np.float16
    np.testing.assert_array_equal(packed.view(np.uint16), pack_bf16(weight))


@pytest.mark.parametrize(("make", "pack", "expected", "dtype", "zero"), PACKINGS)
def test_packing_runs_of_rows_one_after_another(make, pack, expected, dtype, zero):
    weight = make(100, 200)
    packed = np.full_like(pack(weight), zero)
    for begin, end in ((0, 7), (7, 50), (50, 100)):
        pack_into(weight[begin:end], packed, row=begin)
    np.testing.assert_array_equal(packed, expected(weight))
    sliced = np.full_like(pack(weight[:, 50:140]), zero)
    pack_into(weight[:, 50:140], sliced)
    np.testing.assert_array_equal(sliced, expected(weight[:, 50:140]))


@pytest.mark.parametrize(
    ("weight", "packed", "options", "message"),
    [
        (integers(4, 6).T, pack_int8(integers(6, 4)), {}, "side by side"),
        (
            integers(4, 6).astype(np.int16),
            pack_int8(integers(4, 6)),
            {},
            r"weight is int16 \[4, 6\], needs int8, uint16",
        ),
        (integers(4, 6)[0], pack_int8(integers(4, 6)), {}, r"weight is int8 \[6\], needs int8, uint16"),
        (sixteen_bits(4, 6), pack_int8(integers(4, 6)), {}, r"writable uint16 \[1, 1, 1024\] or more"),
        (integers(4, 6), pack_bf16(sixteen_bits(4, 6)), {}, r"writable uint8 \[1, 1, 2048\] or more"),
        (integers(4, 6), pack_int8(integers(4, 70)), {}, r"needs contiguous, writable uint8 \[1, 1, 2048\]"),
        (integers(4, 6), pack_int8(integers(4, 6)), {"row": 30}, r"uint8 \[2, 1, 2048\] or more"),
        (integers(17, 6), pack_int8(integers(17, 6)), {"half": 0}, r"uint8 \[2, 1, 2048\] or more"),
        (integers(4, 6), pack_int8(integers(4, 6)), {"half": 2}, "half is 2"),
        (integers(4, 6), pack_int8(integers(4, 6)), {"half": 1, "row": 3}, "half is 1 and row is 3"),
    ],
)
def test_packing_refusals(weight, packed, options, message):
    with pytest.raises(ValueError, match=message):
        pack_into(weight, packed, **options)
