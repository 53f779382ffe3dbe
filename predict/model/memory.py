"""Memory for weights and caches. On the CPU in huge pages where there are such: decoding reads all of it every time."""

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import paddle
from paddle.base.core import Place

from ops.device import device_name

CPU = paddle.CPUPlace()
HUGE_PAGE = 2 << 20  # bytes, on x86-64
ELEMENT_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
_LIBC = ctypes.CDLL(None)


def empty(shape: list[int], dtype: str) -> paddle.Tensor:
    """An uninitialised CPU tensor; one larger than a huge page asks for them, which takes effect as it is written.

    Uninitialised because whoever asks writes what it reads, and a fill would touch the memory twice.
    """
    tensor = paddle.empty(shape, dtype, device=CPU)
    size = tensor.size * tensor.element_size()
    if size >= HUGE_PAGE:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice: a system without huge pages refuses it (EINVAL), and all still works.
        _LIBC.madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + size - start), ctypes.c_int(mmap.MADV_HUGEPAGE)
        )
    return tensor


def empty_on_device(shape: list[int], dtype: str, place: Place) -> paddle.Tensor:
    """An uninitialised tensor in a device's memory.

    Raises:
        MemoryError: it has no room for it.
    """
    with _no_room(math.prod(shape) * ELEMENT_BYTES[dtype], place):
        return paddle.empty(shape, dtype, device=place)


def on_device(tensor: paddle.Tensor, place: Place) -> paddle.Tensor:
    """A copy of a CPU tensor in a device's memory.

    Raises:
        MemoryError: it has no room for it.
    """
    with _no_room(tensor.size * tensor.element_size(), place):
        return tensor._copy_to(place, True)


@contextmanager
def _no_room(size: int, place: Place) -> Iterator[None]:
    try:
        yield
    except (MemoryError, OSError) as error:  # the latter is what Paddle makes of a CustomDevice's refusal
        raise MemoryError(
            f"{device_name(place)} has no memory left for {size / 1e9:.3f} GB more; use --quant_type "
            "weight_only_int8, or --device cpu"
        ) from error


def host_view(tensor: paddle.Tensor) -> np.ndarray:
    """A writable NumPy view of a CPU tensor's memory (bfloat16 as uint16). It does not keep the tensor alive."""
    dtype = str(tensor.dtype).removeprefix("paddle.")
    numpy_dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    memory = (ctypes.c_char * (tensor.size * numpy_dtype.itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(memory, numpy_dtype).reshape(tensor.shape)
