"""How long an all_reduce takes between two processes that share one GPU.

They take turns on it, a slice of time each, so this says little of GPUs of their own: it is an upper bound, and shows
that neither waits for ever.
"""

import ctypes
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from tests.gpu.devices import Device

WORLD, HANDLE_BYTES = 2, 64
CALLS = 10
STARTED_S, STEP_S = 120, 20.0  # for a process to start, and for a rank to come


def all_reduce_seconds(device: Device, sizes: list[int]) -> list[float]:
    """Of one all_reduce of so many float32, for each size.

    Raises:
        RuntimeError: a process failed, or did not answer in time.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(WORLD)]
    processes = [
        context.Process(target=_rank, args=(type(device), device.path, rank, sizes, pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    ours = [pipe[0] for pipe in pipes]
    try:
        handles = b"".join(_received(connection) for connection in ours)
        for connection in ours:
            connection.send(handles)
        found = [_received(connection) for connection in ours]
        for connection in ours:
            connection.send("leave")
    finally:
        for process in processes:
            process.join(STEP_S)
            if process.is_alive():
                process.terminate()
    return found[0]


def _received(connection: Connection):
    if not connection.poll(STARTED_S):
        raise RuntimeError(f"a rank of all_reduce said nothing for {STARTED_S} s")
    try:
        said = connection.recv()
    except EOFError:
        raise RuntimeError("a rank of all_reduce has died; what it said is above") from None
    if isinstance(said, str):
        raise RuntimeError(said)
    return said


def _rank(kind: type, path: Path, rank: int, sizes: list[int], parent: Connection) -> None:
    device = kind(path)
    library = device.kernels.library
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    created = library.pm_cuda_group_create(rank, WORLD, ctypes.c_double(STEP_S), handle)
    parent.send(handle.raw if created == 0 else device.kernels.text())
    if library.pm_cuda_group_open(parent.recv()) != 0:
        parent.send(device.kernels.text())
        return
    seconds = []
    for size in sizes:
        x = device.array(np.zeros(size, np.float32))
        one = device.array(np.zeros(1, np.float32))
        for calls in (1, CALLS):  # the first one is not counted
            began = time.perf_counter()
            for _ in range(calls):
                device.kernels.all_reduce(x.pointer, x.pointer, size, device.stream)
            one.numpy()  # all is done
        seconds.append((time.perf_counter() - began) / CALLS)
    parent.send(seconds if library.pm_cuda_group_status() == 0 else "the ranks have lost one another in all_reduce")
    parent.recv()
    library.pm_cuda_group_leave()
