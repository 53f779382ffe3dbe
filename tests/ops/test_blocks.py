"""ops.blocks against the operators they are made of: the same bits; what they write in place, and what they refuse."""

import numpy as np
import paddle
import pytest

from ops.attention import append_attention
from ops.blocks import Norm, PagedCache, Weight, attention_block, head, moe_block
from ops.linear import linear, weight_only_linear
from ops.moe import fused_moe
from ops.norm import add_rms_norm, rms_norm
from tests.ops.test_linear import bf16, int8
from tests.ops.test_moe import Layer

TOKENS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EPS = 9, 70, 4, 2, 18, 1e-5
QKV_FEATURES, O_FEATURES = (HEADS + 2 * KV_HEADS) * HEAD_DIM, HEADS * HEAD_DIM
ATTENTION = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "rope_theta": 1e4, "sliding_window": 5}
BITS = {"float32": 16, "bfloat16": 16, "int8": 16, "a8w8": 8}
KINDS = list(BITS)
DTYPE = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16", "a8w8": "float32"}


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stream(*, seed=1):
    return paddle.to_tensor(random(TOKENS, HIDDEN, seed=seed))


def norm(kind):
    return Norm(paddle.to_tensor(random(HIDDEN, seed=3)), EPS, DTYPE[kind])


def weight(kind, rows, columns, seed) -> Weight:
    values = random(rows, columns, seed=seed) / np.float32(columns**0.5)
    if kind == "float32":
        return Weight(paddle.to_tensor(values), None)
    if kind == "bfloat16":
        return Weight(bf16(values)[0], None)
    packed, scale, _ = int8(values)
    return Weight(packed, scale)


def product(kind, x, weight, rows, out_dtype):
    if weight.scale is None:
        return linear(x, weight.values, rows, out_dtype)
    return weight_only_linear(x, weight.values, weight.scale, out_dtype, BITS[kind])


def cache(kind):
    """Two sequences: five new tokens after three, four after none."""
    pages = [paddle.to_tensor(random(6, KV_HEADS, 4, HEAD_DIM, seed=s)).astype(DTYPE[kind]) for s in (7, 8)]
    tables = [[4, 0], [2, -1]]
    return PagedCache(*pages, *(paddle.to_tensor(np.array(a, np.int32)) for a in ([0, 5, 9], [3, 0], tables)))


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype("float32").numpy(), expected.astype("float32").numpy())


@pytest.mark.parametrize("first", [True, False], ids=["first layer", "later layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_block_is_its_operators(kind, first):
    qkv = weight(kind, QKV_FEATURES, HIDDEN, seed=4)
    o = weight(kind, HIDDEN, O_FEATURES, seed=5)
    delta = None if first else stream(seed=2)
    apart, together = cache(kind), cache(kind)

    normed, total = rms_norm(stream(), *norm(kind)), stream()
    if delta is not None:
        normed, total = add_rms_norm(stream(), delta, *norm(kind))
    rows = product(kind, normed, qkv, QKV_FEATURES, DTYPE[kind])
    expected = product(kind, append_attention(rows, *apart, **ATTENTION), o, HIDDEN, "float32")

    residual = stream()
    y, r = attention_block(residual, delta, norm(kind), qkv, o, together, **ATTENTION, activation_bits=BITS[kind])
    assert_same(y, expected)
    for found in (r, residual):  # in place
        assert_same(found, total)
    for found, page in zip(together, apart, strict=True):
        assert_same(found, page)


@pytest.mark.parametrize("kind", KINDS)
def test_moe_block_is_its_operators(kind):
    layer = Layer(HIDDEN, 33, 5, kind)
    scales = layer.scales or (None, None)
    w13, w2 = (Weight(*pair) for pair in zip(layer.tensors, scales, strict=True))
    normed, total = add_rms_norm(stream(), stream(seed=2), *norm(kind))
    expected = fused_moe(normed, layer.gate, *layer.tensors, 2, *scales, layer.bits)

    residual = stream()
    y, r = moe_block(residual, stream(seed=2), norm(kind), layer.gate, w13, w2, 2, layer.bits)
    assert_same(y, expected)
    for found in (r, residual):
        assert_same(found, total)


@pytest.mark.parametrize("kind", KINDS)
def test_head_is_its_operators(kind):
    rows, lm_head = paddle.to_tensor(np.array([8, 0, 3], np.int32)), weight(kind, 41, HIDDEN, seed=6)
    normed, _ = add_rms_norm(stream(), stream(seed=2), *norm(kind), rows=rows)
    residual = stream()
    logits = head(residual, stream(seed=2), norm(kind), rows, lm_head, 41, BITS[kind])
    assert_same(logits, product(kind, normed, lm_head, 41, "float32"))
    assert_same(residual, stream())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": paddle.zeros([TOKENS, 3])}, r"attention_block, norm: delta has shape \[9, 3\], needs \[9, 70\]"),
        (
            {"norm": Norm(paddle.ones([3]), EPS, "float32")},
            r"attention_block, norm: weight has shape \[3\], needs \[70\]",
        ),
        (
            {"norm": Norm(paddle.ones([HIDDEN]), EPS, "float16")},
            "attention_block, norm: out_dtype is 'float16', needs float32 or bfloat16",
        ),
        (
            {"qkv": Weight(paddle.zeros([QKV_FEATURES, 3]), None)},
            r"attention_block, qkv: weight has shape \[144, 3\], needs \[144, 70\]",
        ),
        (
            {"o": Weight(paddle.zeros([HIDDEN, 3]), None)},
            r"attention_block, o: weight has shape \[70, 3\], needs \[70, 72\]",
        ),
        ({"num_kv_heads": 3}, r"attention_block: key_cache has shape \[6, 2, 4, 18\], needs \[-1, 3, -1, -1\]"),
        ({"rope_theta": 0.0}, "attention_block: rope_theta is 0, needs a positive number"),
        ({"activation_bits": 8}, "attention_block, qkv: activation_bits is 8, needs 16: only int8 weights have others"),
    ],
)
def test_attention_block_refuses_by_name(change, message):
    good = {
        "residual": stream(),
        "delta": stream(),
        "norm": norm("float32"),
        "qkv": weight("float32", QKV_FEATURES, HIDDEN, seed=4),
        "o": weight("float32", HIDDEN, O_FEATURES, seed=5),
        "cache": cache("float32"),
        "activation_bits": 16,
        **ATTENTION,
    }
    with pytest.raises(ValueError, match=message):
        attention_block(**{**good, **change})


def test_moe_block_refuses_by_name():
    layer = Layer(HIDDEN, 33, 5, "float32")
    w13, w2 = (Weight(values, None) for values in layer.tensors)
    with pytest.raises(ValueError, match="moe_block: top_k is 6, needs 1 to the number of experts, 5"):
        moe_block(stream(), stream(), norm("float32"), layer.gate, w13, w2, 6, 16)
    with pytest.raises(ValueError, match=r"moe_block, norm: delta has shape \[9, 3\], needs \[9, 70\]"):
        moe_block(stream(), paddle.zeros([TOKENS, 3]), norm("float32"), layer.gate, w13, w2, 2, 16)


def test_head_refuses_by_name():
    rows, lm_head = paddle.to_tensor(np.array([0, 9], np.int32)), weight("float32", 41, HIDDEN, seed=6)
    with pytest.raises(ValueError, match=r"head, norm: rows\[1\] is 9, needs 0 to 8, the rows of residual"):
        head(stream(), stream(), norm("float32"), rows, lm_head, 41, 16)
