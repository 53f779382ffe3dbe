"""Weights to int8, one scale a row: symmetric, absmax / 127."""

import ctypes

import numpy as np
import paddle

from ops.library import LIBRARY, run

# A weight format of the host entry: its NumPy type (NumPy has no bfloat16: its bits as uint16) and its pm_dtype.
_HOST_FORMATS = {"float32": (np.float32, 0), "bfloat16": (np.uint16, 1), "float16": (np.float16, 2)}


def quantize_int8(weight: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """``scale[n] = max_k |weight[n, k]| / 127`` (1 for a row of zeros), ``q = round_half_even(weight / scale)``.

    Args:
        weight: [N, K] float32, bfloat16 or float16, finite.

    Returns:
        (q [N, K] int8, scale [N] float32); ``q * scale[:, None]`` is the weight within half a scale.

    Raises:
        ValueError: a shape, dtype or device other than the above, or a value that is not finite.
    """
    q, scale = run("pm_quantize_int8", weight)
    return q, scale


def quantize_int8_into(weight: np.ndarray, q: np.ndarray, scale: np.ndarray, dtype: str) -> None:
    """:func:`quantize_int8` of host memory into host memory, such as a slice of a preallocated tensor.

    Args:
        weight: [N, K] in ``dtype``, its rows any distance apart (a slice of columns will do), finite.
        q: [N, K] int8, contiguous; overwritten.
        scale: [N] float32, contiguous; overwritten.
        dtype: "float32", "float16" or "bfloat16" (whose bits ``weight`` holds as uint16).

    Raises:
        ValueError: a shape, dtype or layout other than the above, or a value that is not finite.
    """
    if dtype not in _HOST_FORMATS:
        raise ValueError(f"dtype is '{dtype}', needs one of {', '.join(_HOST_FORMATS)}")
    host_type, abi_dtype = _HOST_FORMATS[dtype]
    if weight.dtype != host_type or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight is {_kind(weight)}, needs {np.dtype(host_type)} [N, K], N and K >= 1, for {dtype}")
    rows, columns = weight.shape
    if weight.strides[1] != weight.itemsize or weight.strides[0] % weight.itemsize:
        raise ValueError(f"weight has strides {weight.strides}: the elements of a row must lie side by side")
    if not (_is_output(q, np.int8, (rows, columns)) and _is_output(scale, np.float32, (rows,))):
        raise ValueError(
            f"q is {_kind(q)} and scale is {_kind(scale)}, "
            f"needs contiguous, writable int8 {[rows, columns]} and float32 {[rows]}"
        )
    LIBRARY.pm_cpu_quantize_int8(
        ctypes.c_void_p(weight.ctypes.data),
        ctypes.c_int(abi_dtype),
        ctypes.c_int64(weight.strides[0] // weight.itemsize),
        ctypes.c_void_p(q.ctypes.data),
        ctypes.c_void_p(scale.ctypes.data),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,
    )
    not_finite = np.flatnonzero(np.isnan(scale))
    if not_finite.size:
        raise ValueError(f"row {not_finite[0]} of weight has a value that is not finite")


def _is_output(array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> bool:
    return array.dtype == dtype and array.shape == shape and array.flags.c_contiguous and array.flags.writeable


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
