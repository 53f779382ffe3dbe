"""Memory for weights: in huge pages where the system has them, since decoding reads all of it for every token."""

import ctypes
import mmap
from typing import Any

import numpy as np
import paddle

HUGE_PAGE = 2 << 20  # bytes, on x86-64
_LIBC = ctypes.CDLL(None)


def empty(shape: list[int], dtype: str) -> paddle.Tensor:
    """An uninitialised CPU tensor; one larger than a huge page asks for them, which takes effect as it is written.

    Uninitialised because the loader writes every element, and a fill would touch the memory twice.
    """
    tensor = paddle.empty(shape, dtype)
    size = tensor.size * tensor.element_size()
    if size >= HUGE_PAGE:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice: a system without huge pages refuses it (EINVAL), and all still works.
        _LIBC.madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + size - start), ctypes.c_int(mmap.MADV_HUGEPAGE)
        )
    return tensor


def host_view(tensor: paddle.Tensor) -> np.ndarray:
    """A writable NumPy view of a CPU tensor's memory (bfloat16 as uint16). It does not keep the tensor alive."""
    numpy_dtypes: dict[str, Any] = {"bfloat16": np.uint16, "float32": np.float32, "uint8": np.uint8}
    numpy_dtype = numpy_dtypes[str(tensor.dtype).removeprefix("paddle.")]
    memory = (ctypes.c_char * (tensor.size * np.dtype(numpy_dtype).itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(memory, numpy_dtype).reshape(tensor.shape)
