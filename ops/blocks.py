"""What a rank computes between two meetings with the others, as one operator each: half a layer, or the logits.

Each gives the bits of the operators it is made of (ops.norm, ops.linear, ops.attention, ops.moe). Paddle takes 50 to
180 us to run an operator in a decode, whose weights drive all else from the caches: so there should be few.
"""

from typing import NamedTuple

import paddle

from ops.library import run


class Norm(NamedTuple):
    """rms_norm in front of a block.

    Attributes:
        weight: [H] float32.
        eps: added to the mean square; positive.
        dtype: of what enters products, and of the caches: "float32" or "bfloat16"; on a GPU "bfloat16" or "float16".
    """

    weight: paddle.Tensor
    eps: float
    dtype: str


class Weight(NamedTuple):
    """A linear layer's, as ops.linear.linear (scale None) or ops.linear.weight_only_linear takes it."""

    values: paddle.Tensor
    scale: paddle.Tensor | None


class PagedCache(NamedTuple):
    """A layer's, and whose tokens are where: as ops.attention.append_attention takes them."""

    keys: paddle.Tensor
    values: paddle.Tensor
    cu_seqlens: paddle.Tensor
    context_lens: paddle.Tensor
    block_tables: paddle.Tensor


def attention_block(
    residual: paddle.Tensor,
    delta: paddle.Tensor | None,
    norm: Norm,
    qkv: Weight,
    o: Weight,
    cache: PagedCache,
    num_heads: int,
    num_kv_heads: int,
    rope_theta: float,
    sliding_window: int,
    activation_bits: int,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``r = residual + delta``, and ``append_attention(rms_norm(r) qkv^T) o^T``: the first half of a layer.

    Args:
        residual: [T, H] float32; becomes r, in place.
        delta: [T, H] float32, or None: r is the residual.
        qkv, o: weights [(Hq + 2 Hkv) * D, H] and [H, Hq * D].
        cache: written in place.
        num_heads, num_kv_heads, rope_theta, sliding_window: of ops.attention.append_attention.
        activation_bits: of ops.linear.weight_only_linear; 16 without scales.

    Returns:
        (what is to be added to r once it is summed over ranks [T, H] float32, r).

    Raises:
        ValueError: what those operators refuse; residual and caches may have been written to by then.
    """
    heads = (num_heads, num_kv_heads, repr(float(rope_theta)), sliding_window)
    y, stream, *_ = run(
        "pm_attention_block",
        residual,
        delta,
        norm.weight,
        *qkv,
        *o,
        *cache,
        norm.eps,
        norm.dtype,
        *heads,
        activation_bits,
    )
    return y, stream


def moe_block(
    residual: paddle.Tensor,
    delta: paddle.Tensor,
    norm: Norm,
    gate: paddle.Tensor,
    w13: Weight,
    w2: Weight,
    top_k: int,
    activation_bits: int,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``r = residual + delta``, and ``fused_moe(rms_norm(r))``: the second half of a layer.

    Args:
        residual: [T, H] float32; becomes r, in place.
        delta: [T, H] float32.
        gate, w13, w2, top_k, activation_bits: of ops.moe.fused_moe.

    Returns:
        (what is to be added to r once it is summed over ranks [T, H] float32, r).

    Raises:
        ValueError: what those operators refuse; residual may have been written to by then.
    """
    weights = (gate, w13.values, w2.values, w13.scale, w2.scale)
    y, stream = run(
        "pm_moe_block", residual, delta, norm.weight, *weights, norm.eps, norm.dtype, top_k, activation_bits
    )
    return y, stream


def head(
    residual: paddle.Tensor,
    delta: paddle.Tensor,
    norm: Norm,
    rows: paddle.Tensor,
    weight: Weight,
    out_features: int,
    activation_bits: int,
) -> paddle.Tensor:
    """``rms_norm(residual[rows] + delta[rows]) weight^T``: logits.

    Args:
        residual, delta: [T, H] float32.
        rows: [S] int32, 0 to T - 1.
        weight: [V, H]; out_features: V.
        activation_bits: of ops.linear.weight_only_linear; 16 without a scale.

    Returns:
        [S, V] float32.

    Raises:
        ValueError: what those operators refuse.
    """
    return run(
        "pm_head", residual, delta, norm.weight, rows, *weight, norm.eps, norm.dtype, out_features, activation_bits
    )[0]
