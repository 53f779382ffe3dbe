"""Sparse mixture of experts as Mixtral has it: router, experts and their weighted sum in one operator."""

import paddle

from ops.library import run


def fused_moe(
    x: paddle.Tensor,
    gate: paddle.Tensor,
    w13: paddle.Tensor,
    w2: paddle.Tensor,
    top_k: int,
    w13_scale: paddle.Tensor | None = None,
    w2_scale: paddle.Tensor | None = None,
    activation_bits: int = 16,
) -> paddle.Tensor:
    """``y[t] = sum_e p[t, e] * w2[e] (silu(w1[e] x[t]) * (w3[e] x[t]))`` over the ``top_k`` experts of largest
    ``softmax(x[t] gate^T)`` (ties: the lower index), their probabilities renormalised to sum 1.

    All arithmetic is float32, but for what enters products with int8 weights (see ops.linear.weight_only_linear) or
    weights of 16 bits (ops.linear.linear), which is rounded: ``x``, and what is multiplied with w2. A row of the result
    depends on its row of ``x`` alone, bit for bit.

    With weights of float16 an element of what is multiplied with w2 that is 65,520 or more becomes an infinity, and the
    row of the result infinities and NaN; rms_norm makes NaN of them, and ops.sampling.sample refuses the row's logits.
    Int8 weights have no such limit: what is multiplied with them is fixed point with a scale of its own.

    Args:
        x: [T, H] float32 or bfloat16 (on a GPU bfloat16 or float16), T >= 1; of w13's type if that has 16 bits.
        gate: [E, H] float32.
        w13: [E, 2I, H] float32 (on a CPU); rows 0..I-1 of an expert are w1 (gate), rows I..2I-1 w3 (up). Or each expert
            packed by ops.quantize.pack_gate_up: int8 as uint8 [E, ceil(I / 16), ceil(H / 64), 2048], bfloat16 or (on a
            GPU) float16 [E, ceil(I / 16), ceil(H / 32), 1024].
        w2: of w13's type: [E, H, I] float32. Or each expert packed by ops.quantize.pack_int8, uint8 [E, ceil(H / 32),
            ceil(I / 64), 2048], or pack_bf16, [E, ceil(H / 32), ceil(I / 32), 1024].
        top_k: experts a token; 1 to E.
        w13_scale, w2_scale: [E, 2I] and [E, H] float32 for int8 weights, None for others.
        activation_bits: 16, or 8 with int8 weights: of the fixed point that is multiplied with them.

    Returns:
        [T, H] float32.

    Raises:
        ValueError: a shape (T = 0 included), dtype, device, top_k or activation_bits other than the above.

    Source: Jiang et al., Mixtral of Experts, arXiv:2401.04088.
    """
    return run("pm_fused_moe", x, gate, w13, w2, w13_scale, w2_scale, top_k, activation_bits)[0]
