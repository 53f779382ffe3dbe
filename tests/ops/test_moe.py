"""ops.moe against the reference, over odd sizes, routings and types, and its bits against themselves."""

import hashlib

import numpy as np
import paddle
import pytest

from ops import library, reference
from ops.moe import fused_moe
from ops.quantize import gate_up_shape, pack_bf16, pack_gate_up, pack_int8, packed_shape
from tests.ops.instruction_sets import assert_agree, bf16_product, digests
from tests.ops.sizes import FUSED_MOE

# Sums of some hundred float32 products of order one, passed through two layers; relative to the largest result. With
# int8 the sums are exact, but an h that differs in its last bit may be rounded to another of its row's 32,639 steps.
# With 8 bits ("a8w8") such a step is 1 / 127, far beyond this, which so tells 8 bits from 16; but it takes an h within
# a rounding of the border of two steps. Inputs and bits are the same everywhere, and none of them lies there. So it is
# with bfloat16, whose steps are 1 / 256 of an h.
TOLERANCE = {"float32": 5e-6, "bfloat16": 5e-5, "int8": 5e-5, "a8w8": 5e-5}
THREADS = library.num_threads()


@pytest.fixture(autouse=True)
def all_threads():
    yield
    library.set_num_threads(THREADS)


class Layer:
    """A random layer whose weights are of `dtype`; `exact` holds the values they stand for, for the reference."""

    def __init__(self, hidden, intermediate, experts, dtype, seed=0):
        generator = np.random.default_rng(seed)
        gate = generator.standard_normal([experts, hidden], np.float32)
        w13 = generator.standard_normal([experts, 2 * intermediate, hidden], np.float32) / np.float32(hidden**0.5)
        w2 = generator.standard_normal([experts, hidden, intermediate], np.float32) / np.float32(intermediate**0.5)
        self.dtype, self.gate, self.scales = dtype, paddle.to_tensor(gate), []
        self.bits = 8 if dtype == "a8w8" else 16
        if dtype in ("int8", "a8w8"):
            quantised = [[reference.quantize_int8(expert) for expert in w] for w in (w13, w2)]
            (w13, w13_scale), (w2, w2_scale) = [[np.stack(part) for part in zip(*w, strict=True)] for w in quantised]
            packed = [np.stack([pack(q) for q in w]) for pack, w in ((pack_gate_up, w13), (pack_int8, w2))]
            self.tensors = [paddle.to_tensor(w) for w in packed]
            self.scales = [paddle.to_tensor(scale) for scale in (w13_scale, w2_scale)]
            self.exact = [gate, w13, w2]
        elif dtype == "bfloat16":
            self.exact = [gate, *(reference.round_bf16(w) for w in (w13, w2))]
            bits = [(w.view(np.uint32) >> 16).astype(np.uint16) for w in self.exact[1:]]
            packed = [np.stack([pack(w) for w in ws]) for pack, ws in zip((pack_gate_up, pack_bf16), bits, strict=True)]
            self.tensors = [paddle.to_tensor(w.view(np.int16)).view("bfloat16") for w in packed]
        else:
            self.tensors = [paddle.to_tensor(w) for w in (w13, w2)]
            self.exact = [w.astype(np.float64) for w in (gate, w13, w2)]

    def __call__(self, x, top_k):
        return fused_moe(x, self.gate, *self.tensors, top_k, *(self.scales or (None, None)), self.bits)

    def reference(self, x, top_k):
        x = x.astype("float32").numpy()
        if self.scales:  # rounds x and h to fixed point: in float32, as the operator does
            return reference.fused_moe(x, *self.exact, top_k, *(scale.numpy() for scale in self.scales), self.bits)
        if self.dtype == "bfloat16":
            return reference.fused_moe(x, *self.exact, top_k, bf16_product=bf16_product())
        return reference.fused_moe(x.astype(np.float64), *self.exact, top_k)


def tokens_of(count, hidden, dtype="float32", seed=1):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal([count, hidden], np.float32)).astype(dtype)


def assert_is_the_reference(layer, x, top_k):
    y = layer(x, top_k)
    expected = layer.reference(x, top_k)
    assert (y.shape, y.dtype) == (x.shape, paddle.float32)
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=TOLERANCE[layer.dtype] * np.abs(expected).max())


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [(x, w) for x in ("float32", "bfloat16") for w in ("float32", "int8", "a8w8")] + [("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate", "experts"), FUSED_MOE)
def test_fused_moe_is_the_reference(tokens, hidden, intermediate, experts, x_dtype, w_dtype):
    layer = Layer(hidden, intermediate, experts, w_dtype, seed=hidden)
    assert_is_the_reference(layer, tokens_of(tokens, hidden, x_dtype), min(2, experts))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_every_top_k(top_k):
    assert_is_the_reference(Layer(48, 32, 5, "float32"), tokens_of(20, 48), top_k)


def test_more_tokens_than_a_block_holds():
    assert_is_the_reference(Layer(24, 14001, 2, "int8"), tokens_of(300, 24), 1)


def test_ties_go_to_the_lower_index():
    layer, x = Layer(32, 16, 5, "float32"), tokens_of(7, 32)
    gate = np.zeros([5, 32], np.float32)
    gate[1] = -1
    x = paddle.concat([x.abs() + 0.1, paddle.zeros([1, 32])])
    layer.gate, layer.exact[0] = paddle.to_tensor(gate), gate.astype(np.float64)
    share = reference.route(x.numpy(), gate, 2)
    np.testing.assert_array_equal(share[:7], [[0.5, 0, 0.5, 0, 0]] * 7)
    np.testing.assert_array_equal(share[7], [0.5, 0.5, 0, 0, 0])
    assert_is_the_reference(layer, x, 2)


def test_experts_without_tokens_are_not_read():
    layer, x = Layer(32, 16, 4, "float32"), tokens_of(9, 32).abs()
    gate = np.array([[1], [-1], [2], [-2]], np.float32) * np.ones([1, 32], np.float32)
    layer.gate, layer.exact[0] = paddle.to_tensor(gate), gate.astype(np.float64)
    poison = paddle.to_tensor(np.array([0, np.nan, 0, np.nan], np.float32)).reshape([4, 1, 1])
    layer.tensors = [w + poison for w in layer.tensors]
    assert_is_the_reference(layer, x, 2)


def test_very_sure_and_very_large_tokens():
    layer, x = Layer(32, 16, 4, "float32"), tokens_of(9, 32) * 100.0
    assert_is_the_reference(layer, x, 2)


@pytest.mark.parametrize("w_dtype", ["bfloat16", "int8", "a8w8"])
def test_tokens_do_not_depend_on_their_batch_or_the_threads(w_dtype):
    layer, x = Layer(150, 70, 5, w_dtype), tokens_of(70, 150, "bfloat16")
    alone = np.concatenate([layer(x[t : t + 1], 2).numpy() for t in range(70)])
    for threads in (1, 2, 3):
        library.set_num_threads(threads)
        for tokens in range(1, 71):
            np.testing.assert_array_equal(layer(x[70 - tokens :], 2).numpy(), alone[70 - tokens :])


def digest() -> dict[str, str]:
    """Of the outputs for few and many tokens, by type of weights, H and I not multiples of 16."""
    found = {}
    for dtype in ("float32", "bfloat16", "int8", "a8w8"):
        layer, sha = Layer(531, 37, 5, dtype), hashlib.sha256()
        for tokens in (1, 3, 40):
            sha.update(layer(tokens_of(tokens, 531, "bfloat16"), 2).numpy().tobytes())
        found[dtype] = sha.hexdigest()
    return found


def test_instruction_sets_agree():
    assert_agree(digests("test_moe"))


def test_shape_is_inferred_for_any_number_of_tokens():
    def moe(x, gate, w13, w2):
        return fused_moe(x, gate, w13, w2, 2)

    shapes = [[-1, 16], [4, 16], [4, 64, 16], [4, 16, 32]]
    specs = [paddle.static.InputSpec(shape, "float32") for shape in shapes]
    traced = paddle.jit.to_static(moe, input_spec=specs, full_graph=True)  # keeps the program and so its values alive
    (y,) = traced.concrete_program.outputs
    assert (list(y.shape), y.dtype) == ([-1, 16], paddle.float32)


def test_zeros_and_values_that_are_not_finite():
    layer, x = Layer(70, 40, 3, "int8"), tokens_of(4, 70)
    x[1] = 0
    x[2, 69] = np.inf
    y = layer(x, 2).numpy()
    np.testing.assert_array_equal(y[1], 0)
    assert np.all(np.isnan(y[2]))
    np.testing.assert_array_equal(y[[0, 3]], layer(x[[0, 3]], 2).numpy())


GOOD = {
    "x": paddle.zeros([2, 16]),
    "gate": paddle.zeros([3, 16]),
    "w13": paddle.zeros([3, 8, 16]),
    "w2": paddle.zeros([3, 16, 4]),
    "top_k": 2,
}
PACKED = {
    "w13": paddle.zeros([3, *gate_up_shape(4, 16)], "uint8"),
    "w2": paddle.zeros([3, *packed_shape(16, 4)], "uint8"),
    "w13_scale": paddle.zeros([3, 8]),
    "w2_scale": paddle.zeros([3, 16]),
}

BF16_X = {"x": paddle.zeros([2, 16], "bfloat16")}
BF16 = {
    "w13": paddle.zeros([3, *gate_up_shape(4, 16, "bfloat16")], "bfloat16"),
    "w2": paddle.zeros([3, *packed_shape(16, 4, "bfloat16")], "bfloat16"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": paddle.zeros([0, 16])}, "fused_moe: needs T, H, I and E >= 1, found T = 0"),
        ({"gate": paddle.zeros([3, 16], "bfloat16")}, "gate is bfloat16, needs float32"),
        ({"w13": paddle.zeros([4, 8, 16])}, r"w13 has shape \[4, 8, 16\], needs \[3, -1, 16\]"),
        ({"w13": paddle.zeros([3, 7, 16])}, "w13 has 7 rows an expert, needs an even number"),
        ({"w2": paddle.zeros([3, 16, 4], "bfloat16")}, "w2 is bfloat16, needs float32"),
        (BF16, "x is float32, weights of bfloat16 need bfloat16; cast x"),
        (
            {**BF16, **BF16_X, "w13": paddle.zeros([3, 8, 16], "bfloat16")},
            r"w13 has shape \[3, 8, 16\], needs \[3, -1, 1, 1024\]",
        ),
        ({**BF16, **BF16_X, "w2": paddle.zeros([3, 1, 2, 1024], "bfloat16")}, r"needs \[3, 1, 1, 1024\]"),
        ({**BF16, **BF16_X, "w2": paddle.zeros([3, 16, 4])}, "w2 is float32, needs bfloat16"),
        ({"w2": paddle.zeros([3, 16, 5])}, r"w2 has shape \[3, 16, 5\], needs \[3, 16, 4\]"),
        ({"top_k": 4}, "top_k is 4, needs 1 to the number of experts, 3"),
        ({"top_k": 0}, "top_k is 0, needs 1 to the number of experts, 3"),
        ({"w13_scale": paddle.zeros([3, 8])}, "w13_scale is given and w2_scale is None"),
        ({"w13": paddle.zeros([3, 8, 16], "int8")}, "w13 is int8, needs float32 or bfloat16"),
        ({**PACKED, "w2_scale": None}, "both are needed for packed int8 weights"),
        (
            {**PACKED, "w13": paddle.zeros([3, 2, 1, 2048], "uint8")},
            r"w13 has shape \[3, 2, 1, 2048\], needs \[3, 1, 1, 2048\]",
        ),
        (
            {**PACKED, "w2": paddle.zeros([3, 2, 1, 2048], "uint8")},
            r"w2 has shape \[3, 2, 1, 2048\], needs \[3, 1, 1, 2048\]",
        ),
        ({**PACKED, "activation_bits": 4}, "fused_moe: activation_bits is 4, needs 16 or 8"),
        ({"activation_bits": 8}, "fused_moe: activation_bits is 8, needs 16: only int8 weights have others"),
        ({**PACKED, "w13_scale": paddle.zeros([3, 7])}, "w13_scale has 7 rows an expert, needs an even number"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        fused_moe(**{**GOOD, **change})
