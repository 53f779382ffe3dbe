"""all_reduce and all_gather between processes: by memory that they map of one another, and by NCCL.

Rank r is on GPU r modulo their number. Processes on one GPU take turns, so this shows that sums are right, not how fast
they are. NCCL wants a GPU for each rank, so with one GPU it is a single rank's.
"""

import ctypes
import multiprocessing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ops import reference
from tests.gpu.case import Case, assert_same_bits, normal
from tests.gpu.devices import Device
from tests.gpu.table import STATUSES

WORLDS, MOST_NCCL_RANKS = (2, 3), 3
HANDLE_BYTES, NCCL_ID_BYTES = 64, 128
# The last is more than all blocks' slots hold, 64 of 16384 floats, and 3 ranks add it up in shares.
SHAPES = [(1, 1), (3, 4096), (5, 777), (1, 1_048_581)]
# For a process to start, and for a rank to come.
STARTED_S, STEP_S = 120, 20.0


def ranks_agree(world: int, device: Device, nccl: str | None = None) -> None:
    """Every rank gets the sum in rank order, to the bit, and all columns in rank order; then a call that differs is
    noticed. ``nccl``: the library, where the numbers go by it."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    ours = [pipe[0] for pipe in pipes]
    processes = [
        context.Process(target=_rank, args=(type(device), device.path, nccl, rank, world, pipe[1]))
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
        assert found == ["right"] * world, found
    finally:
        for process in processes:
            process.join(STEP_S)
            if process.is_alive():
                process.terminate()


def ranks_agree_by_nccl(device: Device) -> None:
    """As ranks_agree, a rank on each GPU, up to 3."""
    ranks_agree(min(device.count(), MOST_NCCL_RANKS), device, device.nccl())


def _received(connection: Connection):
    assert connection.poll(STARTED_S), f"a rank said nothing for {STARTED_S} s"
    return connection.recv()


def _rank(kind: type[Device], path: Path, nccl: str | None, rank: int, world: int, parent: Connection) -> None:
    device = kind(path)
    device.use(rank % device.count())
    library, kernels = device.kernels.library, device.kernels
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    assert library.pm_cuda_group_create(rank, world, ctypes.c_double(STEP_S), handle) == 0, kernels.text()
    if nccl is None:
        parent.send(handle.raw)
        assert library.pm_cuda_group_open(parent.recv()) == 0, kernels.text()
    else:
        nccl_id = ctypes.create_string_buffer(NCCL_ID_BYTES)
        assert library.pm_cuda_nccl_load(nccl.encode(), ctypes.byref(ctypes.c_int())) == 0, kernels.text()
        if rank == 0:
            assert library.pm_cuda_nccl_id(nccl_id) == 0, kernels.text()
        parent.send(nccl_id.raw)
        ids = parent.recv()  # rank 0's is the first
        assert library.pm_cuda_group_open_nccl(ids, ctypes.c_double(STARTED_S)) == 0, kernels.text()
    try:
        for index, shape in enumerate(SHAPES):
            xs = [normal(10 * index + r, *shape) for r in range(world)]
            x, y = device.array(xs[rank]), device.empty((shape[0], world * shape[1]), np.float32)
            device.kernels.all_gather(x.pointer, y.pointer, *shape, device.stream)
            assert_same_bits(y.numpy(), reference.all_gather(xs), f"all_gather of {shape}")
            device.kernels.all_reduce(x.pointer, x.pointer, xs[0].size, device.stream)
            assert_same_bits(x.numpy(), reference.all_reduce(xs), f"all_reduce of {shape}")
        assert library.pm_cuda_group_status() == 0, device.kernels.text()
        x = device.array(np.ones(2, np.float32))
        device.kernels.all_reduce(x.pointer, x.pointer, 1 + rank % 2, device.stream)
        x.numpy()  # it has run
        found = STATUSES[library.pm_cuda_group_status()]
        assert found == ("PM_RANKS_DISAGREE" if world > 1 else "PM_OK"), f"{found}: the ranks called different sizes"
        parent.send("right")
    except Exception as error:  # for the parent to tell
        parent.send(str(error))
    parent.recv()
    library.pm_cuda_group_leave()


def cases() -> list[Case]:
    """By number of ranks: from 3 on, long messages are added up in shares; and by NCCL."""
    mapped = [Case("collective", f"{world} ranks", partial(ranks_agree, world)) for world in WORLDS]
    return [*mapped, Case("collective", "by NCCL", ranks_agree_by_nccl)]
