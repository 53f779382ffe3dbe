"""Memory for weights and caches. On the CPU in huge pages where there are such: decoding reads all of it every time."""

import ctypes
import mmap
from typing import Any

import numpy as np
import paddle
from paddle.base.core import Place

from ops.device import device_name

CPU = paddle.CPUPlace()
HUGE_PAGE = 2 << 20  # bytes, on x86-64
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


def on_device(tensor: paddle.Tensor, place: Place) -> paddle.Tensor:
    """A copy of a CPU tensor in a device's memory.

    Raises:
        MemoryError: it has no room for it.
    """
    try:
        return tensor._copy_to(place, True)
    except OSError as error:  # what Paddle makes of a CustomDevice's refusal
        size = tensor.size * tensor.element_size() / 1e9
        raise MemoryError(
            f"{device_name(place)} has no memory left for a weight of {size:.3f} GB; use --quant_type "
            "weight_only_int8, or --device cpu"
        ) from error


def host_view(tensor: paddle.Tensor) -> np.ndarray:
    """A writable NumPy view of a CPU tensor's memory (bfloat16 as uint16). It does not keep the tensor alive."""
    numpy_dtypes: dict[str, Any] = {"bfloat16": np.uint16, "float32": np.float32, "uint8": np.uint8}
    numpy_dtype = numpy_dtypes[str(tensor.dtype).removeprefix("paddle.")]
    memory = (ctypes.c_char * (tensor.size * np.dtype(numpy_dtype).itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(memory, numpy_dtype).reshape(tensor.shape)
