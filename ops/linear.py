"""Linear layers: plain and weight-only int8."""

import paddle

from ops.library import run


def linear(x: paddle.Tensor, weight: paddle.Tensor, out_dtype: str) -> paddle.Tensor:
    """``x @ weight^T`` with sums in float32; a row of the result depends on its row of ``x`` alone, bit for bit.

    Args:
        x: [T, K] float32 or bfloat16, T >= 1.
        weight: [N, K] float32 or bfloat16.
        out_dtype: "float32" or "bfloat16".

    Returns:
        [T, N] in ``out_dtype``.

    Raises:
        ValueError: a shape (T = 0 included), dtype or device other than the above.
    """
    return run("pm_linear", x, weight, None, out_dtype)[0]


def weight_only_linear(x: paddle.Tensor, weight: paddle.Tensor, scale: paddle.Tensor, out_dtype: str) -> paddle.Tensor:
    """``(x @ weight^T) * scale`` with an int8 weight as ops.quantize.quantize_int8 makes it, sums in float32.

    Args:
        x: [T, K] float32 or bfloat16, T >= 1.
        weight: [N, K] int8.
        scale: [N] float32.
        out_dtype: "float32" or "bfloat16".

    Returns:
        [T, N] in ``out_dtype``.

    Raises:
        ValueError: a shape (T = 0 included), dtype or device other than the above.
    """
    return run("pm_linear", x, weight, scale, out_dtype)[0]
