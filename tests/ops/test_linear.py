"""ops.linear against the reference in float64, over odd sizes and every pair of types; its bits against themselves."""

import hashlib

import numpy as np
import paddle
import pytest

from ops import library, reference
from ops.linear import linear, weight_only_linear
from ops.quantize import quantize_int8
from tests.ops.instruction_sets import digests

# K around the 16 lanes of a vector and the 64 bytes of a cache line; T around the panels (6 tokens) and tasks (48).
SIZES = [(1, 1, 1), (1, 33, 16), (2, 17, 15), (3, 5, 100), (6, 64, 512), (7, 31, 513), (13, 70, 1100), (97, 40, 48)]
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
@pytest.mark.parametrize("w_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SIZES)
def test_linear_is_the_reference(tokens, rows, columns, x_dtype, w_dtype, out_dtype):
    x = tensor(random(tokens, columns, seed=tokens), x_dtype)
    weight = tensor(random(rows, columns, seed=rows), w_dtype)
    y = linear(x, weight, out_dtype)
    assert y.shape == [tokens, rows]
    assert_close(y, x, weight, out_dtype)


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SIZES)
def test_weight_only_linear_is_the_reference(tokens, rows, columns, x_dtype, out_dtype):
    x = tensor(random(tokens, columns, seed=tokens), x_dtype)
    q, scale = quantize_int8(tensor(random(rows, columns, seed=rows), "float32"))
    y = weight_only_linear(x, q, scale, out_dtype)
    assert_close(y, x, reference.dequantize_int8(q.numpy(), scale.numpy().astype(np.float64)), out_dtype)


def test_more_tokens_than_a_block_holds():
    x, weight = tensor(random(300, 14001, seed=1), "bfloat16"), tensor(random(9, 14001, seed=2), "bfloat16")
    assert_close(linear(x, weight, "float32"), x, weight, "float32")


@pytest.mark.parametrize("w_dtype", ["float32", "bfloat16", "int8"])
def test_rows_do_not_depend_on_their_batch_or_the_threads(w_dtype):
    x, weight = tensor(random(70, 523, seed=3), "bfloat16"), tensor(random(300, 523, seed=4), "float32")
    q, scale = quantize_int8(weight)

    def outputs(x):
        if w_dtype == "int8":
            return weight_only_linear(x, q, scale, "float32").numpy()
        return linear(x, weight.astype(w_dtype), "float32").numpy()

    alone = np.concatenate([outputs(x[t : t + 1]) for t in range(70)])
    for threads in (1, 2, 3):
        library.set_num_threads(threads)
        for tokens in range(1, 71):
            np.testing.assert_array_equal(outputs(x[70 - tokens :]), alone[70 - tokens :])


def digest() -> str:
    """Of the outputs for few, several and many tokens, every weight type, K not a multiple of 16."""
    sha = hashlib.sha256()
    for tokens in (1, 2, 3, 5, 14):
        x, weight = tensor(random(tokens, 531, seed=5), "bfloat16"), tensor(random(37, 531, seed=6), "float32")
        q, scale = quantize_int8(weight)
        for y in (
            linear(x, weight, "float32"),
            linear(x, weight.astype("bfloat16"), "float32"),
            weight_only_linear(x, q, scale, "float32"),
            weight_only_linear(x, q, scale, "bfloat16").astype("float32"),
        ):
            sha.update(y.numpy().tobytes())
    return sha.hexdigest()


def test_instruction_sets_agree():
    found = digests("test_linear")
    assert set(found.values()) == {digest()}, found


def test_shape_is_inferred_for_any_number_of_tokens():
    def both(x, weight, q, scale):
        return linear(x, weight, "float32"), weight_only_linear(x, q, scale, "bfloat16")

    specs = [
        paddle.static.InputSpec([-1, 16], "float32"),
        paddle.static.InputSpec([5, 16], "float32"),
        paddle.static.InputSpec([7, 16], "int8"),
        paddle.static.InputSpec([7], "float32"),
    ]
    traced = paddle.jit.to_static(both, input_spec=specs, full_graph=True)  # keeps the program and so its values alive
    first, second = traced.concrete_program.outputs
    assert (list(first.shape), first.dtype) == ([-1, 5], paddle.float32)
    assert (list(second.shape), second.dtype) == ([-1, 7], paddle.bfloat16)


X, WEIGHT = np.zeros([2, 16], np.float32), np.zeros([3, 16], np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:0], WEIGHT, "float32"), "linear: needs T, N and K >= 1, found T = 0"),
        ((X, WEIGHT[:, 1:], "float32"), r"linear: weight has shape \[3, 15\], needs \[-1, 16\]"),
        ((X, WEIGHT.astype(np.int8), "float32"), "linear: weight is int8, needs float32 or bfloat16"),
        ((X.astype(np.float16), WEIGHT, "float32"), "linear: x is float16, needs float32 or bfloat16"),
        ((X, WEIGHT, "int8"), "out_dtype is 'int8', needs float32 or bfloat16"),
    ],
)
def test_linear_refuses(arguments, message):
    x, weight, out_dtype = arguments
    with pytest.raises(ValueError, match=message):
        linear(paddle.to_tensor(x), paddle.to_tensor(weight), out_dtype)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (WEIGHT, np.ones(3, np.float32), "weight_only_linear: weight is float32, needs int8"),
        (WEIGHT.astype(np.int8), np.ones(2, np.float32), r"scale has shape \[2\], needs \[3\]"),
        (WEIGHT.astype(np.int8), np.ones(3, np.float64), "scale is another type, needs float32"),
    ],
)
def test_weight_only_linear_refuses(weight, scale, message):
    with pytest.raises(ValueError, match=message):
        weight_only_linear(paddle.to_tensor(X), paddle.to_tensor(weight), paddle.to_tensor(scale), "float32")
