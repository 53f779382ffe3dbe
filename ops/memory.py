"""The memory's read rate, which bounds decoding."""

import ctypes
import time

import numpy as np

from ops.library import LIBRARY


class MemoryReader:
    """Reads a buffer of its own, as fast as the kernels' threads can.

    Args:
        num_bytes: size of the buffer, a multiple of 4096; far larger than the caches to be a memory rate.

    Raises:
        ValueError: num_bytes is not a positive multiple of 4096.
    """

    def __init__(self, num_bytes: int = 1 << 29):
        if num_bytes < 4096 or num_bytes % 4096:
            raise ValueError(f"num_bytes is {num_bytes}, needs a positive multiple of 4096")
        self._buffer = np.ones(num_bytes // 8, np.uint64)

    def bandwidth(self) -> float:
        """Bytes per second of one pass over the buffer."""
        checksum = ctypes.c_uint64()
        started = time.perf_counter()
        LIBRARY.pm_cpu_read_memory(
            ctypes.c_void_p(self._buffer.ctypes.data), ctypes.c_int64(self._buffer.nbytes), ctypes.byref(checksum), None
        )
        return self._buffer.nbytes / (time.perf_counter() - started)
