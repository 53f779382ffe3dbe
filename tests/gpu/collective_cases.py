"""all_reduce and all_gather between two processes that share one GPU and map one another's memory.

The processes take turns on the GPU, so this shows that sums are right, not how fast they are.
"""

import ctypes
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ops import reference
from tests.gpu.case import Case, assert_same_bits, normal
from tests.gpu.devices import Device

WORLD, HANDLE_BYTES = 2, 64
# Up to more than all blocks' slots hold, twice: 64 of 4096 floats.
SHAPES = [(1, 1), (3, 4096), (5, 777), (1, 600_001)]
# For a process to start, and for a rank to come.
STARTED_S, STEP_S = 120, 20.0


def two_processes_agree(device: Device) -> None:
    """Every rank gets the sum in rank order, to the bit, and all columns in rank order."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(WORLD)]
    ours = [pipe[0] for pipe in pipes]
    processes = [
        context.Process(target=_rank, args=(type(device), device.path, rank, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        handles = b"".join(_received(connection) for connection in ours)
        for connection in ours:
            connection.send(handles)
        found = [_received(connection) for connection in ours]
        for connection in ours:
            connection.send("leave")
        assert found == ["right"] * WORLD, found
    finally:
        for process in processes:
            process.join(STEP_S)
            if process.is_alive():
                process.terminate()


def _received(connection: Connection):
    assert connection.poll(STARTED_S), f"a rank said nothing for {STARTED_S} s"
    return connection.recv()


def _rank(kind: type, path: Path, rank: int, parent: Connection) -> None:
    device = kind(path)
    library = device.kernels.library
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    assert library.pm_cuda_group_create(rank, WORLD, ctypes.c_double(STEP_S), handle) == 0, device.kernels.text()
    parent.send(handle.raw)
    assert library.pm_cuda_group_open(parent.recv()) == 0, device.kernels.text()
    try:
        for index, shape in enumerate(SHAPES):
            xs = [normal(10 * index + r, *shape) for r in range(WORLD)]
            x, y = device.array(xs[rank]), device.empty((shape[0], WORLD * shape[1]), np.float32)
            device.kernels.all_gather(x.pointer, y.pointer, *shape, device.stream)
            assert_same_bits(y.numpy(), reference.all_gather(xs), f"all_gather of {shape}")
            device.kernels.all_reduce(x.pointer, x.pointer, xs[0].size, device.stream)
            assert_same_bits(x.numpy(), reference.all_reduce(xs), f"all_reduce of {shape}")
        parent.send("right")
    except Exception as error:  # for the parent to tell
        parent.send(str(error))
    parent.recv()
    library.pm_cuda_group_leave()


def cases() -> list[Case]:
    """The one case of all_reduce and all_gather."""
    return [Case("collective", f"{WORLD} processes on one device", two_processes_agree)]
