"""Every operator again in plain float32 NumPy: the definition the kernels are tested against.

Nothing here is fast, fused or in place (except where the operator's meaning is to write its cache). Arguments and results
are NumPy arrays; bfloat16 tensors come in as the float32 they stand for.
"""

import numpy as np


def rms_norm(residual: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """ops.norm.rms_norm: residual [T, H], weight [H] -> [T, H]."""
    mean_square = np.mean(residual.astype(np.float32) ** 2, axis=-1, keepdims=True)
    return residual / np.sqrt(mean_square + eps) * weight


def add_rms_norm(
    residual: np.ndarray, delta: np.ndarray, weight: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """ops.norm.add_rms_norm: residual, delta [T, H], weight [H] -> (normalised, sum)."""
    total = residual + delta
    return rms_norm(total, weight, eps), total
