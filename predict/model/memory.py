"""Memory for weights: in huge pages where the system has them, since decoding reads all of it for every token."""

import ctypes
import mmap

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
