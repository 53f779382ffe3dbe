"""Processes that are the ranks of a group of GPUs, joined by memory that they map of one another, or by NCCL.

Rank r is on GPU r modulo their number. Processes on one GPU take turns, a slice of time each.
"""

import ctypes
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.gpu.devices import Device

HANDLE_BYTES, NCCL_ID_BYTES = 64, 128
# For a process to start, and for a rank to come.
STARTED_S, STEP_S = 120, 20.0


def in_ranks(world: int, device: Device, work: Callable[..., Any], nccl: str | None = None) -> list[Any]:
    """What ``work(device, rank, world)`` gives in each rank's process. ``nccl``: the library, where numbers go by it.

    Raises:
        RuntimeError: a rank failed or said nothing for long; says which and what.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    ours = [pipe[0] for pipe in pipes]
    processes = [
        context.Process(target=_rank, args=(type(device), device.path, nccl, rank, world, work, pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process, pipe in zip(processes, pipes, strict=True):
        process.start()
        pipe[1].close()  # so that the end of a process is the end of what it says
    try:
        introductions = b"".join(_received(rank, connection) for rank, connection in enumerate(ours))
        for connection in ours:
            connection.send(introductions)
        return [_received(rank, connection) for rank, connection in enumerate(ours)]
    finally:
        for connection in ours:
            connection.close()  # which tells a rank to leave
        for process in processes:
            process.join(STEP_S)
            if process.is_alive():
                process.terminate()


def _received(rank: int, connection: Connection) -> Any:
    if not connection.poll(STARTED_S):
        raise RuntimeError(f"rank {rank} said nothing for {STARTED_S} s")
    try:
        done, said = connection.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} has died; what it said is above") from None
    if not done:
        raise RuntimeError(f"rank {rank}: {said}")
    return said


def _rank(
    kind: type[Device], path: Path, nccl: str | None, rank: int, world: int, work: Callable, parent: Connection
) -> None:
    device = kind(path)
    with suppress(EOFError, ConnectionError):  # the parent has heard enough
        try:
            device.use(rank % device.count())
            _join(device, nccl, rank, world, parent)
            parent.send((True, work(device, rank, world)))
        except Exception as error:  # for the parent to tell
            parent.send((False, str(error)))
        parent.recv()
    device.kernels.library.pm_cuda_group_leave()


def _join(device: Device, nccl: str | None, rank: int, world: int, parent: Connection) -> None:
    library, kernels = device.kernels.library, device.kernels
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    assert library.pm_cuda_group_create(rank, world, ctypes.c_double(STEP_S), handle) == 0, kernels.text()
    if nccl is None:
        parent.send((True, handle.raw))
        assert library.pm_cuda_group_open(parent.recv()) == 0, kernels.text()
        return
    nccl_id = ctypes.create_string_buffer(NCCL_ID_BYTES)
    assert library.pm_cuda_nccl_load(nccl.encode(), ctypes.byref(ctypes.c_int())) == 0, kernels.text()
    if rank == 0:
        assert library.pm_cuda_nccl_id(nccl_id) == 0, kernels.text()
    parent.send((True, nccl_id.raw))
    ids = parent.recv()  # rank 0's is the first
    assert library.pm_cuda_group_open_nccl(ids, ctypes.c_double(STARTED_S)) == 0, kernels.text()
