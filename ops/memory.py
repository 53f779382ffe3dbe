"""The memory's read rate, which bounds decoding."""

import ctypes
import time

import numpy as np

from ops.library import LIBRARY


def read_bandwidth(num_bytes: int = 1 << 30, repeat: int = 5) -> float:
    """Bytes per second this process reads with the threads its kernels use: the median of ``repeat`` passes.

    Args:
        num_bytes: size of the buffer, a multiple of 4096; far larger than the caches to be a memory rate.

    Raises:
        ValueError: num_bytes is not a positive multiple of 4096.
    """
    if num_bytes < 4096 or num_bytes % 4096:
        raise ValueError(f"num_bytes is {num_bytes}, needs a positive multiple of 4096")
    buffer = np.ones(num_bytes // 8, np.uint64)
    checksum = ctypes.c_uint64()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        LIBRARY.pm_cpu_read_memory(
            ctypes.c_void_p(buffer.ctypes.data), ctypes.c_int64(num_bytes), ctypes.byref(checksum), None
        )
        seconds.append(time.perf_counter() - started)
    return num_bytes / float(np.median(seconds))
