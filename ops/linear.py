"""Linear layers: plain and weight-only int8."""

import math

import paddle

from ops.library import run


def linear(x: paddle.Tensor, weight: paddle.Tensor, out_features: int, out_dtype: str) -> paddle.Tensor:
    """``x @ weight^T`` with sums in float32; a row of the result depends on its row of ``x`` alone, bit for bit.

    With a bfloat16 weight denormal numbers count as zeros.

    Args:
        x: [T, K] float32 or bfloat16 (on a GPU bfloat16 or float16), T >= 1; of the weight's type if that has 16 bits.
        weight: [N, K] float32 (on a CPU); or bfloat16 or (on a GPU) float16 as ops.quantize.pack_bf16 packs it,
            [ceil(N / 32), ceil(K / 32), 1024].
        out_features: N, which a packed weight does not tell: its last tile may hold rows of zeros.
        out_dtype: "float32", "bfloat16" or, on a GPU, "float16", in which what is 65,520 or more becomes an infinity.

    Returns:
        [T, N] in ``out_dtype``.

    Raises:
        ValueError: a shape (T = 0 included), dtype or device other than the above.
    """
    return run("pm_linear", x, weight, None, out_features, out_dtype, 16)[0]


def weight_only_linear(
    x: paddle.Tensor, weight: paddle.Tensor, scale: paddle.Tensor, out_dtype: str, activation_bits: int = 16
) -> paddle.Tensor:
    """``(x @ q^T) * scale`` with a weight ``q, scale`` of ops.quantize.quantize_int8, packed.

    ``x`` is rounded to fixed point, in steps of its row's largest magnitude / 32639 (16 bits) or / 127 (8 bits: faster,
    and coarser than bfloat16); sums are exact.
    A row of the result depends on its row of ``x`` alone, bit for bit.

    Args:
        x: [T, K] float32 or bfloat16 (on a GPU bfloat16 or float16), T >= 1, K <= 65536.
        weight: ops.quantize.pack_int8(q), uint8 [ceil(N / 32), ceil(K / 64), 2048].
        scale: [N] float32.
        out_dtype: "float32", "bfloat16" or, on a GPU, "float16", in which what is 65,520 or more becomes an infinity.
        activation_bits: 16 or 8.

    Returns:
        [T, N] in ``out_dtype``.

    Raises:
        ValueError: a shape (T = 0 included), dtype, device or activation_bits other than the above.
    """
    return run("pm_linear", x, weight, scale, math.prod(scale.shape), out_dtype, activation_bits)[0]
