"""RMS normalisation with the residual add."""

import paddle

from ops.library import run


def rms_norm(residual: paddle.Tensor, weight: paddle.Tensor, eps: float, out_dtype: str) -> paddle.Tensor:
    """``residual / sqrt(mean(residual^2, -1) + eps) * weight``.

    Args:
        residual: [T, H] float32.
        weight: [H] float32.
        eps: added to the mean square; positive.
        out_dtype: "float32" or "bfloat16"; on a GPU "bfloat16" or "float16".

    Returns:
        [T, H] in ``out_dtype``.

    Raises:
        ValueError: a shape, dtype or device other than the above.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    return run("pm_rms_norm", residual, weight, eps, out_dtype)[0]


def add_rms_norm(
    residual: paddle.Tensor,
    delta: paddle.Tensor,
    weight: paddle.Tensor,
    eps: float,
    out_dtype: str,
    rows: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Adds ``delta`` to the residual stream, then normalises as :func:`rms_norm` does.

    Args:
        residual, delta: [T, H] float32.
        weight: [H] float32.
        eps: added to the mean square; positive.
        out_dtype: "float32" or "bfloat16"; on a GPU "bfloat16" or "float16".
        rows: [S] int32: of these rows, 0 to T - 1, in this order; None: of all.

    Returns:
        (normalised [S, H] in ``out_dtype``, residual + delta [S, H] float32); S = T without ``rows``.

    Raises:
        ValueError: a shape, dtype, device or row other than the above.
    """
    normed, total = run("pm_add_rms_norm", residual, delta, weight, rows, eps, out_dtype)
    return normed, total
