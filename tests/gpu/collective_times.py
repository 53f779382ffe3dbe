"""How long an all_reduce takes between two ranks.

On one GPU they take turns, so there this says little of GPUs of their own: it is an upper bound, and shows that neither
waits for ever.
"""

import time
from functools import partial

import numpy as np

from tests.gpu.devices import Device
from tests.gpu.ranks import in_ranks

WORLD, CALLS = 2, 10


def all_reduce_seconds(device: Device, sizes: list[int]) -> list[float]:
    """Of one all_reduce of so many float32, for each size.

    Raises:
        RuntimeError: a rank failed, or did not answer in time.
    """
    return in_ranks(WORLD, device, partial(_seconds, sizes))[0]


def _seconds(sizes: list[int], device: Device, rank: int, world: int) -> list[float]:
    found = []
    for size in sizes:
        x = device.array(np.zeros(size, np.float32))
        one = device.array(np.zeros(1, np.float32))
        for calls in (1, CALLS):  # the first one is not counted
            began = time.perf_counter()
            for _ in range(calls):
                device.kernels.all_reduce(x.pointer, x.pointer, size, device.stream)
            one.numpy()  # all is done
        found.append((time.perf_counter() - began) / CALLS)
    assert device.kernels.library.pm_cuda_group_status() == 0, device.kernels.text()
    return found
