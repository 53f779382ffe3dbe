"""Append attention: rotary embedding, KV append and causal grouped-query attention on a paged cache."""

import paddle

from ops.library import run


def append_attention(
    qkv: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    cu_seqlens: paddle.Tensor,
    context_lens: paddle.Tensor,
    block_tables: paddle.Tensor,
    num_heads: int,
    num_kv_heads: int,
    rope_theta: float,
    sliding_window: int = 0,
) -> paddle.Tensor:
    """Rotates the new queries and keys, writes keys and values to the cache, and attends to it causally.

    Query head h at position p: ``softmax_j(q . k_j / sqrt(D)) v_j`` over the positions j <= p of its sequence (the last
    ``sliding_window`` of them, if not 0), with key/value head ``h // (Hq // Hkv)``; scores and sums in float32. The
    bits of a token's result do not depend on how its sequence is cut into chunks, nor on what else is in the batch.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D] float32 or bfloat16 (on a GPU bfloat16 or float16): query heads, key heads, value
            heads of the T new tokens.
        key_cache, value_cache: [num_blocks, Hkv, block_size, D], dtype of qkv; written in place. D even.
        cu_seqlens: [B + 1] int32: sequence b owns rows ``cu_seqlens[b]:cu_seqlens[b + 1]`` (it may own none).
        context_lens: [B] int32: tokens of each sequence already in the cache.
        block_tables: [B, M] int32: position p of sequence b lives in page ``block_tables[b, p // block_size]``; entries
            no position needs (padding, or pages that slid out of the window) are never looked at.
        num_heads, num_kv_heads: Hq and Hkv; Hq a multiple of Hkv.
        rope_theta: base of the rotary frequencies; NeoX rotation (halves of a head).
        sliding_window: positions a query sees, its own included; 0: all.

    Returns:
        [T, Hq * D] in the dtype of qkv.

    Raises:
        ValueError: a shape, dtype, device or value other than the above.

    Source: Su et al. (RoPE) arXiv:2104.09864; Ainslie et al. (GQA) arXiv:2305.13245; Kwon et al. (paged cache)
    arXiv:2309.06180.
    """
    return run(
        "pm_append_attention",
        qkv,
        key_cache,
        value_cache,
        cu_seqlens,
        context_lens,
        block_tables,
        num_heads,
        num_kv_heads,
        repr(float(rope_theta)),
        sliding_window,
    )[0]
