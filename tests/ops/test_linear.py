"""ops.linear against the reference, over odd sizes and every pair of types; its bits against themselves."""

import hashlib

import numpy as np
import paddle
import pytest

from ops import library, reference
from ops.linear import linear, weight_only_linear
from ops.quantize import pack_bf16, pack_int8, packed_shape
from tests.ops.instruction_sets import assert_agree, bf16_product, digests
from tests.ops.sizes import LINEAR

THREADS = library.num_threads()


@pytest.fixture(autouse=True)
def all_threads():
    yield
    library.set_num_threads(THREADS)


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(array, dtype):
    return paddle.to_tensor(array).astype(dtype)


def float64(tensor):
    return tensor.astype("float32").numpy().astype(np.float64)


def assert_close(y, x, weight, out_dtype):
    """A sum of K products in 16 chains is off by at most (K / 16 + 6) roundings of the sum of their magnitudes."""
    x, weight = float64(x), float64(weight) if isinstance(weight, paddle.Tensor) else weight
    expected = reference.linear(x, weight)
    bound = (x.shape[1] / 16 + 6) * 2.0**-24 * reference.linear(np.abs(x), np.abs(weight))
    if out_dtype == "bfloat16":
        bound += 2.0**-8 * (np.abs(expected) + bound)  # half a unit in the last of 8 bits
    assert np.all(np.abs(float64(y) - expected) <= bound)


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), LINEAR)
def test_linear_is_the_reference(tokens, rows, columns, x_dtype, out_dtype):
    x = tensor(random(tokens, columns, seed=tokens), x_dtype)
    weight = tensor(random(rows, columns, seed=rows), "float32")
    y = linear(x, weight, rows, out_dtype)
    assert y.shape == [tokens, rows]
    assert_close(y, x, weight, out_dtype)


def bf16(array):
    """An array in bfloat16: packed, and its values as float32."""
    rounded = reference.round_bf16(array)
    return packed_bf16((rounded.view(np.uint32) >> 16).astype(np.uint16)), rounded


def packed_bf16(bits):
    return paddle.to_tensor(pack_bf16(bits).view(np.int16)).view("bfloat16")


def assert_same_bits(y, expected):
    """Signs of zeros included; but any NaN is as good as another."""
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(y), ~numbers)
    np.testing.assert_array_equal(y[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), LINEAR)
def test_linear_bf16_is_the_reference(tokens, rows, columns, out_dtype):
    x = reference.round_bf16(random(tokens, columns, seed=tokens))
    packed, weight = bf16(random(rows, columns, seed=rows))
    y = linear(tensor(x, "bfloat16"), packed, rows, out_dtype)
    assert y.shape == [tokens, rows]
    expected = bf16_product()(x, weight)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    # Every one of a sum's K additions (or fewer) rounds it, to within 2^-24 of at most the sum of the magnitudes.
    assert np.all(np.abs(expected - exact) <= columns * 2.0**-24 * (np.abs(x) @ np.abs(weight).T))
    if out_dtype == "bfloat16":
        expected = reference.round_bf16(expected)
    assert_same_bits(y.astype("float32").numpy(), expected)


def extremes(seed, rows, columns, exponents):
    """bfloat16 of the given range of biased exponents, denormals (0) and what is not finite (255) among them."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2, (rows, columns)) << 15 | generator.integers(*exponents, (rows, columns)) << 7
    return (bits | generator.integers(0, 128, (rows, columns))).astype(np.uint16)


# Sums around the smallest normal number; denormal operands and products by large ones; overflow; infinities and NaN.
@pytest.mark.parametrize("exponents", [(60, 68), (0, 3), (0, 255), (180, 200), (0, 256)])
@pytest.mark.parametrize("tokens", [1, 5, 12, 17])
def test_denormals_and_what_is_not_finite_in_bf16(tokens, exponents):
    x, weight = extremes(tokens, tokens, 70, exponents), extremes(20, 40, 70, exponents)
    weight[:, 1::2] = weight[:, ::2] ^ (weight[:, 1::2] & 0x8001)  # sums that cancel, nearly or wholly
    x[:, 1::2] = x[:, ::2]
    values = [(a.astype(np.uint32) << 16).view(np.float32) for a in (x, weight)]
    x = paddle.to_tensor(x.view(np.int16)).view("bfloat16")
    assert_same_bits(linear(x, packed_bf16(weight), 40, "float32").numpy(), bf16_product()(*values))


def int8(weight):
    """A random weight in int8: packed, its scales, and the integers."""
    q, scale = reference.quantize_int8(weight)
    return paddle.to_tensor(pack_int8(q)), paddle.to_tensor(scale), q


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), LINEAR)
def test_weight_only_linear_is_the_reference(tokens, rows, columns, x_dtype, out_dtype, bits):
    x = tensor(random(tokens, columns, seed=tokens), x_dtype)
    packed, scale, q = int8(random(rows, columns, seed=rows))
    y = weight_only_linear(x, packed, scale, out_dtype, bits)
    expected = reference.weight_only_linear(x.astype("float32").numpy(), q, scale.numpy(), bits)
    np.testing.assert_array_equal(y.astype("float32").numpy(), tensor(expected, out_dtype).astype("float32").numpy())


@pytest.mark.parametrize("bits", [16, 8])
def test_the_longest_and_largest_sums_are_exact(bits):
    x, q = np.full([7, 65536], 3.0, np.float32), np.full([40, 65536], 127, np.int8)
    x[1], q[1:20] = -3.0, -127
    scale = np.ones(40, np.float32)
    weight = paddle.to_tensor(pack_int8(q)), paddle.to_tensor(scale)
    y = weight_only_linear(tensor(x, "float32"), *weight, "float32", bits)
    np.testing.assert_array_equal(y.numpy(), reference.weight_only_linear(x, q, scale, bits))


@pytest.mark.parametrize("outlier", [1, 30, 1000])
def test_fixed_point_is_finer_than_bfloat16(outlier):
    x = random(16, 4096, seed=7)
    x[:, [5, 77, 1300, 4000]] *= outlier
    weight = random(64, 4096, seed=8)
    packed, scale, q = int8(weight)
    exact = x.astype(np.float64) @ (q * scale.numpy().astype(np.float64)[:, None]).T

    def error(y):
        return np.linalg.norm(y - exact) / np.linalg.norm(exact)

    fixed = weight_only_linear(tensor(x, "float32"), packed, scale, "float32").numpy()
    rounded = float64(tensor(x, "bfloat16")) @ (q * scale.numpy().astype(np.float64)[:, None]).T
    # Half a step of 2^-15 of the largest element, against half of 2^-8 of each element.
    assert error(fixed) < error(rounded) / 2


@pytest.mark.parametrize(("outlier", "expected"), [(1, 0.009), (30, 0.078)])
def test_the_error_of_eight_bits(outlier, expected):
    """Relative to the result; what bfloat16 activations cost is 0.0016 with and without outliers."""
    x, weight = random(16, 4096, seed=7), random(64, 4096, seed=8)
    x[:, [5, 77, 1300, 4000]] *= outlier
    packed, scale, q = int8(weight)
    exact = x.astype(np.float64) @ (q * scale.numpy().astype(np.float64)[:, None]).T
    y = weight_only_linear(tensor(x, "float32"), packed, scale, "float32", activation_bits=8).numpy()
    # Rounding to steps of a row's largest / 127 leaves errors of step / sqrt(12); sums of 4,096 differ little from it.
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    theory = np.linalg.norm(np.broadcast_to(step, x.shape)) / np.sqrt(12) / np.linalg.norm(x)
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(theory, rel=0.1)
    assert error == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("value", [0.0, 2.0**-101, np.inf, np.nan])
def test_rows_without_a_scale(value, bits):
    x = random(5, 100, seed=9)
    x[3] = 0
    x[3, 99] = value
    packed, scale, _ = int8(random(40, 100, seed=10))
    y = weight_only_linear(tensor(x, "float32"), packed, scale, "float32", bits).numpy()
    np.testing.assert_array_equal(y[3], np.full(40, 0 if np.isfinite(value) else np.nan))
    alone = weight_only_linear(tensor(x[:3], "float32"), packed, scale, "float32", bits).numpy()
    np.testing.assert_array_equal(y[:3], alone)


def test_more_tokens_than_a_block_holds():
    x, weight = tensor(random(300, 14001, seed=1), "float32"), tensor(random(9, 14001, seed=2), "float32")
    assert_close(linear(x, weight, 9, "float32"), x, weight, "float32")


def test_more_tokens_than_a_block_holds_in_bf16():
    test_linear_bf16_is_the_reference(300, 9, 14001, "float32")


@pytest.mark.parametrize(("w_dtype", "bits"), [("float32", 16), ("bfloat16", 16), ("int8", 16), ("int8", 8)])
def test_rows_do_not_depend_on_their_batch_or_the_threads(w_dtype, bits):
    x, weight = tensor(random(70, 523, seed=3), "bfloat16"), tensor(random(300, 523, seed=4), "float32")
    packed, scale, _ = int8(weight.numpy())
    plain = weight if w_dtype == "float32" else bf16(weight.numpy())[0]

    def outputs(x):
        if w_dtype == "int8":
            return weight_only_linear(x, packed, scale, "float32", bits).numpy()
        return linear(x, plain, 300, "float32").numpy()

    alone = np.concatenate([outputs(x[t : t + 1]) for t in range(70)])
    for threads in (1, 2, 3):
        library.set_num_threads(threads)
        for tokens in range(1, 71):
            np.testing.assert_array_equal(outputs(x[70 - tokens :]), alone[70 - tokens :])


def digest() -> dict[str, str]:
    """Of the outputs for few, several and many tokens, by type of weights, K not a multiple of 16."""
    found = {dtype: hashlib.sha256() for dtype in ("float32", "bfloat16", "int8")}
    for tokens in (1, 2, 3, 5, 14):
        x, weight = tensor(random(tokens, 531, seed=5), "bfloat16"), tensor(random(37, 531, seed=6), "float32")
        packed, scale, _ = int8(weight.numpy())
        smallest = paddle.to_tensor(extremes(tokens, tokens, 531, (60, 68)).view(np.int16)).view("bfloat16")
        for dtype, y in (
            ("float32", linear(x, weight, 37, "float32")),
            ("bfloat16", linear(x, bf16(weight.numpy())[0], 37, "float32")),
            ("bfloat16", linear(smallest, packed_bf16(extremes(7, 37, 531, (60, 68))), 37, "float32")),
            ("int8", weight_only_linear(x, packed, scale, "float32")),
            ("int8", weight_only_linear(x, packed, scale, "bfloat16").astype("float32")),
            ("int8", weight_only_linear(x, packed, scale, "float32", activation_bits=8)),
        ):
            found[dtype].update(y.numpy().tobytes())
    return {dtype: sha.hexdigest() for dtype, sha in found.items()}


def test_instruction_sets_agree():
    assert_agree(digests("test_linear"))


def test_without_fused_multiply_add_in_hardware():
    """Then the C library computes it, as it does here for the baseline when told that the processor lacks it."""
    told = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2"}
    assert_agree(digests("test_linear", ["baseline"], told) | {library.cpu_isa(): digest()})


def test_shape_is_inferred_for_any_number_of_tokens():
    def both(x, weight, packed, scale):
        return linear(x, weight, 5, "float32"), weight_only_linear(x, packed, scale, "bfloat16")

    specs = [
        paddle.static.InputSpec([-1, 16], "float32"),
        paddle.static.InputSpec([5, 16], "float32"),
        paddle.static.InputSpec(packed_shape(7, 16), "uint8"),
        paddle.static.InputSpec([7], "float32"),
    ]
    traced = paddle.jit.to_static(both, input_spec=specs, full_graph=True)  # keeps the program and so its values alive
    first, second = traced.concrete_program.outputs
    assert (list(first.shape), first.dtype) == ([-1, 5], paddle.float32)
    assert (list(second.shape), second.dtype) == ([-1, 7], paddle.bfloat16)


X, WEIGHT = np.zeros([2, 16], np.float32), np.zeros([3, 16], np.float32)
PACKED = np.zeros(packed_shape(3, 16), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:0], WEIGHT, 3, "float32"), "linear: needs T, N and K >= 1, found T = 0"),
        ((X, WEIGHT, 0, "float32"), "linear: needs T, N and K >= 1, found T = 2, N = 0"),
        ((X, WEIGHT, 4, "float32"), r"linear: weight has shape \[3, 16\], needs \[4, 16\]"),
        ((X, WEIGHT[:, 1:], 3, "float32"), r"linear: weight has shape \[3, 15\], needs \[3, 16\]"),
        ((X, WEIGHT.astype(np.int8), 3, "float32"), "linear: weight is int8, needs float32 or bfloat16"),
        ((X.astype(np.float16), WEIGHT, 3, "float32"), "linear: x is float16, needs float32 or bfloat16"),
        ((X, WEIGHT, 3, "int8"), "out_dtype is 'int8', needs float32 or bfloat16"),
    ],
)
def test_linear_refuses(arguments, message):
    x, weight, out_features, out_dtype = arguments
    with pytest.raises(ValueError, match=message):
        linear(paddle.to_tensor(x), paddle.to_tensor(weight), out_features, out_dtype)


@pytest.mark.parametrize(
    ("x_dtype", "packed", "out_features", "message"),
    [
        ("float32", [1, 1, 1024], 3, "linear: x is float32, weights of bfloat16 need bfloat16; cast x"),
        ("bfloat16", [1, 1, 1024], 33, r"linear: weight has shape \[1, 1, 1024\], needs \[2, 1, 1024\]"),
        ("bfloat16", [3, 16], 3, r"linear: weight has shape \[3, 16\], needs \[1, 1, 1024\]"),
    ],
)
def test_linear_refuses_with_bf16_weights(x_dtype, packed, out_features, message):
    with pytest.raises(ValueError, match=message):
        linear(tensor(X, x_dtype), paddle.zeros(packed, "bfloat16"), out_features, "float32")


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (WEIGHT, np.ones(3, np.float32), "weight_only_linear: weight is float32, needs uint8"),
        (PACKED, np.ones(33, np.float32), r"weight has shape \[1, 1, 2048\], needs \[2, 1, 2048\]"),
        (PACKED, np.ones([3, 1], np.float32), r"scale has shape \[3, 1\], needs \[3\]"),
        (PACKED, np.ones(3, np.float64), "scale is another type, needs float32"),
    ],
)
def test_weight_only_linear_refuses(weight, scale, message):
    with pytest.raises(ValueError, match=message):
        weight_only_linear(paddle.to_tensor(X), paddle.to_tensor(weight), paddle.to_tensor(scale), "float32")


@pytest.mark.parametrize("bits", [0, 4, 32])
def test_other_bits_are_refused(bits):
    weight = paddle.to_tensor(PACKED), paddle.ones([3])
    with pytest.raises(ValueError, match=f"weight_only_linear: activation_bits is {bits}, needs 16 or 8"):
        weight_only_linear(paddle.to_tensor(X), *weight, "float32", bits)


def test_too_many_columns_for_exact_sums_are_refused():
    x, packed = paddle.zeros([1, 65537]), paddle.zeros(packed_shape(2, 65537), "uint8")
    with pytest.raises(ValueError, match="weights of int8 have 65537 columns, needs at most 65536"):
        weight_only_linear(x, packed, paddle.ones([2]), "float32")
