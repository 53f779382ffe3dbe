"""Sixteen-bit floats as NumPy has them or not: bfloat16 as the uint16 of its bits, float16 as itself."""

import numpy as np

from tests.gpu.table import BF16, F16, F32

NAMES = {F32: "float32", BF16: "bfloat16", F16: "float16"}
# Half the distance from 1 to the next number: the largest relative error of rounding.
ROUNDING = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
STORED = {F32: np.float32, BF16: np.uint16, F16: np.float16}


def encode(x: np.ndarray, dtype: int) -> np.ndarray:
    """x as stored in ``dtype``, rounded to nearest even."""
    if dtype != BF16:
        return x.astype(STORED[dtype])
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(x: np.ndarray, dtype: int) -> np.ndarray:
    """The float32 values of x, which is stored in ``dtype``."""
    if dtype != BF16:
        return x.astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray, dtype: int) -> np.ndarray:
    """The values of ``dtype`` nearest to x, as float32."""
    return decode(encode(x, dtype), dtype)
