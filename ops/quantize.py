"""Weights to int8, one scale a row: symmetric, absmax / 127; and into the tiles the kernels multiply with."""

import ctypes

import numpy as np
import paddle

from ops.library import LIBRARY, run

# The names of the packed layouts: ops/csrc/kernels/include/quantize.h
INT8_LAYOUT, SIXTEEN_BIT_LAYOUT = "tile32x64", "tile32x32"
INT8_ZERO = 128  # what stands for 0 in packed int8, and wherever no weight is
_TILE_ROWS = 32
_TILE_COLUMNS = {"int8": 64, "bfloat16": 32, "float16": 32}

# A weight format of the host entry: its NumPy type (NumPy has no bfloat16: its bits as uint16) and its pm_dtype.
_HOST_FORMATS = {"float32": (np.float32, 0), "bfloat16": (np.uint16, 1), "float16": (np.float16, 2)}
# What is packed, by its NumPy type: the NumPy type of a tile's elements, the format's name and its pm_dtype.
_PACKED_FORMATS: dict[np.dtype, tuple[type, str, int]] = {
    np.dtype(np.int8): (np.uint8, "int8", 3),
    np.dtype(np.uint16): (np.uint16, "bfloat16", 1),
    np.dtype(np.float16): (np.float16, "float16", 2),
}


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
    _check_rows(weight)
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


def packed_shape(rows: int, columns: int, dtype: str = "int8") -> list[int]:
    """Shape of [rows, columns] in tiles of 2048 bytes: [tiles of 32 rows, tiles of columns, elements of a tile].

    int8: tiles of 64 columns, of 2048 uint8. bfloat16 and float16: tiles of 32 columns, of 1024 elements.
    """
    tile_columns = _TILE_COLUMNS[dtype]
    return [-(-rows // _TILE_ROWS), -(-columns // tile_columns), _TILE_ROWS * tile_columns]


def gate_up_shape(intermediate: int, columns: int, dtype: str = "int8") -> list[int]:
    """Shape of ``intermediate`` gate rows and as many up rows, 16 and 16 to a tile."""
    return packed_shape(-(-intermediate // 16) * _TILE_ROWS, columns, dtype)


def pack_int8(q: np.ndarray) -> np.ndarray:
    """q [N, K] int8 -> uint8 of :func:`packed_shape`."""
    packed = np.full(packed_shape(*q.shape), INT8_ZERO, np.uint8)
    pack_into(q, packed)
    return packed


def pack_bf16(weight: np.ndarray) -> np.ndarray:
    """weight [N, K], the bits of bfloat16 as uint16 (or float16) -> the same type of :func:`packed_shape`."""
    rows, columns = weight.shape
    packed = np.zeros(packed_shape(rows, columns, "bfloat16"), weight.dtype)
    pack_into(weight, packed)
    return packed


def pack_gate_up(weight: np.ndarray) -> np.ndarray:
    """weight [2I, K], int8 or 16 bits, gate rows above up rows -> packed, of :func:`gate_up_shape`."""
    gate, up = np.split(weight, 2)
    rows, columns = gate.shape
    if weight.dtype == np.int8:
        packed = np.full(gate_up_shape(rows, columns), INT8_ZERO, np.uint8)
    else:
        packed = np.zeros(gate_up_shape(rows, columns, "bfloat16"), weight.dtype)
    pack_into(gate, packed, half=0)
    pack_into(up, packed, half=1)
    return packed


def pack_into(weight: np.ndarray, packed: np.ndarray, row: int = 0, half: int | None = None) -> None:
    """Packs ``weight`` [N, K], its rows any distance apart, into host memory of a packed shape.

    Args:
        weight: int8; or bfloat16, its bits as uint16; or float16.
        packed: uint8 for int8, else of the same type; contiguous; zeros (INT8_ZERO for int8) wherever no weight is ever
            packed to (rows and columns beyond the last).
        row: of ``packed``, where the first row goes.
        half: 0 or 1 to fill that half of every tile, 16 rows each (gate rows 0, up rows 1), instead of whole tiles.

    Raises:
        ValueError: a shape, dtype or layout other than the above.
    """
    if weight.dtype not in _PACKED_FORMATS or weight.ndim != 2:
        raise ValueError(f"weight is {_kind(weight)}, needs int8, uint16 (the bits of bfloat16) or float16 [N, K]")
    _check_rows(weight)
    rows, columns = weight.shape
    packed_type, dtype, abi_dtype = _PACKED_FORMATS[weight.dtype]
    if half not in (None, 0, 1) or (half is not None and row):
        raise ValueError(f"half is {half} and row is {row}, needs half 0 or 1 and row 0, or half None")
    needed = packed_shape(row + rows, columns, dtype) if half is None else gate_up_shape(rows, columns, dtype)
    if not _is_output(packed, packed_type, (max(needed[0], packed.shape[0]), *needed[1:])):
        raise ValueError(
            f"packed is {_kind(packed)}, needs contiguous, writable {np.dtype(packed_type)} {needed} or more"
        )
    LIBRARY.pm_cpu_pack(
        ctypes.c_void_p(weight.ctypes.data),
        ctypes.c_int(abi_dtype),
        ctypes.c_int64(weight.strides[0] // weight.itemsize),
        ctypes.c_void_p(packed.ctypes.data),
        ctypes.c_int64(row if half is None else half * 16),
        ctypes.c_int64(1 if half is None else 2),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,
    )


def _check_rows(weight: np.ndarray) -> None:
    if weight.strides[1] != weight.itemsize or weight.strides[0] % weight.itemsize:
        raise ValueError(f"weight has strides {weight.strides}: the elements of a row must lie side by side")


def _is_output(array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> bool:
    return array.dtype == dtype and array.shape == shape and array.flags.c_contiguous and array.flags.writeable


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
