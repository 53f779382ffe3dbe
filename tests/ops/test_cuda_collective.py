"""Collectives between GPUs, emulated: a process a rank, which map one another's memory as GPUs do."""

import ctypes
import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest

from ops import reference
from ops.csrc import nvcc
from tests.gpu.table import KernelError, Kernels
from tests.ops.cuda_emulation import FORWARD, REVERSE, Emulation, build

RANKS = multiprocessing.get_context("spawn")
HANDLE_BYTES = 64
LONG = 600_001  # more than all blocks' slots hold, twice: 64 of 4096 floats


@pytest.fixture(scope="module")
def library() -> str:
    return str(build("kernels", nvcc.sources()))


def at(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


class Group:
    """This process' membership in a group of emulated GPUs, made with the others through the parent."""

    def __init__(self, library: str, rank: int, world: int, step_timeout: float, parent: Connection) -> None:
        self.functions = ctypes.CDLL(library)
        self.kernels, self.world = Kernels(library), world
        handle = ctypes.create_string_buffer(HANDLE_BYTES)
        status = self.functions.pm_cuda_group_create(rank, world, ctypes.c_double(step_timeout), handle)
        assert status == 0, self.kernels.last_error().decode()
        parent.send(handle.raw)
        assert self.functions.pm_cuda_group_open(parent.recv()) == 0, self.kernels.last_error().decode()

    def all_reduce(self, x: np.ndarray, in_place: bool) -> np.ndarray:
        x = x.copy()
        y = x if in_place else np.full_like(x, np.nan)
        self.kernels.all_reduce(at(x), at(y), x.size, None)
        return y

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        y = np.full((len(x), self.world * x.shape[1]), np.nan, np.float32)
        self.kernels.all_gather(at(x), at(y), *x.shape, None)
        return y


def inputs(call: int, world: int) -> list[np.ndarray]:
    """Every rank's x [rows, cols] of a call, of such magnitudes that another order of adding gives other bits."""
    random = np.random.default_rng([call, world])
    shape = (1, LONG) if call == 5 else (int(random.integers(1, 9)), int(10 ** random.uniform(0, 3.5)))
    return [
        (random.standard_normal(shape) * 10.0 ** random.integers(-4, 5, shape)).astype(np.float32) for _ in range(world)
    ]


def many_calls(library: str, rank: int, world: int, parent: Connection, mode: tuple[int, int]) -> None:
    Emulation(library).configure(mode)  # of all ranks: their blocks meet one by one
    group = Group(library, rank, world, 60, parent)
    wrong = []
    for call in range(12):
        xs = inputs(call, world)
        if not np.array_equal(group.all_reduce(xs[rank], in_place=call % 2 == 0), reference.all_reduce(xs)):
            wrong.append(("all_reduce", call))
        if not np.array_equal(group.all_gather(xs[rank]), reference.all_gather(xs)):
            wrong.append(("all_gather", call))
    parent.send((wrong, group.functions.pm_cuda_group_status()))
    parent.recv()  # all are done
    group.functions.pm_cuda_group_leave()


def waits_in_vain(library: str, rank: int, world: int, parent: Connection) -> None:
    group = Group(library, rank, world, 0.1, parent)
    texts = []
    for _ in range(2 if rank == 0 else 0):  # rank 1 does not come
        try:
            group.all_reduce(np.ones(5000, np.float32), in_place=False)
        except KernelError as error:
            texts.append(str(error))
    parent.send((group.functions.pm_cuda_group_status(), texts))
    parent.recv()


def run_ranks(function, library: str, world: int, *arguments) -> list:
    """What each rank's ``function`` sent, once handles have been passed around."""
    pipes = [RANKS.Pipe() for _ in range(world)]
    processes = [
        RANKS.Process(target=function, args=(library, rank, world, pipes[rank][1], *arguments)) for rank in range(world)
    ]
    try:
        for process, (_, child) in zip(processes, pipes, strict=True):
            process.start()
            child.close()  # so that the end of a rank is the end of its pipe
        ours = [pipe for pipe, _ in pipes]
        handles = b"".join([pipe.recv() for pipe in ours])
        for pipe in ours:
            pipe.send(handles)
        found = [pipe.recv() for pipe in ours]
        for pipe in ours:
            pipe.send("done")
    finally:
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0] * world
    return found


@pytest.mark.parametrize(("world", "mode"), [(1, FORWARD), (2, FORWARD), (2, REVERSE), (3, FORWARD)])
def test_every_rank_has_the_sums_in_rank_order_and_all_columns(library, world, mode):
    assert run_ranks(many_calls, library, world, mode) == [([], 0)] * world


def test_a_rank_that_does_not_come_is_an_error_not_a_hang(library):
    peer_lost = 2
    (status, texts), (other, _) = run_ranks(waits_in_vain, library, 2)
    assert (status, other) == (peer_lost, 0)
    assert len(texts) == 1, "the call that waited was enqueued; the next one is refused"
    assert "PM_PEER_LOST: another rank did not come" in texts[0]


def test_what_is_no_group_is_refused(library):
    kernels, functions = Kernels(library), ctypes.CDLL(library)
    with pytest.raises(KernelError, match="PM_NOT_CONNECTED: no group of GPUs"):
        kernels.all_reduce(None, None, 1, None)
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    for rank, world in ((0, 0), (2, 2), (-1, 2), (0, 17)):
        assert functions.pm_cuda_group_create(rank, world, ctypes.c_double(1), handle) != 0
        assert f"rank {rank} of {world} ranks" in kernels.last_error().decode()
    assert functions.pm_cuda_group_create(0, 1, ctypes.c_double(1), handle) == 0
    assert functions.pm_cuda_group_create(0, 1, ctypes.c_double(1), handle) != 0
    assert "already has a group" in kernels.last_error().decode()
    functions.pm_cuda_group_leave()
    assert functions.pm_cuda_group_status() == 3
