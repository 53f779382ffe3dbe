"""16-bit weights in the tiles the kernels read."""

import numpy as np


def pack_16(weight: np.ndarray) -> np.ndarray:
    """weight [N, K] of 16-bit elements -> [tiles of 32 rows, of 32 columns, 16 pairs, 32 rows, 2], zeros added."""
    rows, columns = -(-weight.shape[0] // 32), -(-weight.shape[1] // 32)
    padded = np.zeros((rows * 32, columns * 32), weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return np.ascontiguousarray(padded.reshape(rows, 32, columns, 16, 2).transpose(0, 2, 3, 1, 4))


def pack_gate_up_16(weight: np.ndarray) -> np.ndarray:
    """weight [2I, K], gate above up -> tiles of 16 gate and 16 up rows."""
    gate, up = np.split(weight, 2)
    rows = -(-len(gate) // 16) * 16
    halves = [np.pad(half, ((0, rows - len(half)), (0, 0))).reshape(-1, 16, weight.shape[1]) for half in (gate, up)]
    return pack_16(np.stack(halves, axis=1).reshape(-1, weight.shape[1]))
