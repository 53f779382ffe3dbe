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
# In numbers: one; odd counts around what a block passes at a time and what a block takes at least; just enough, and
# just not enough, to be added up in shares by 3 ranks, 4 and 8 (collective_ipc.cu); more than all blocks' slots hold.
SIZES = [1, 2, 7, 511, 4097, 42_857, 42_861, 149_999, 150_003, 337_499, 337_503]
MORE_THAN_SLOTS = 64 * 16 * 1024 + 5
SHAPES = [(1, 1), (3, 777), (7, 1), (5, 4096), (1, 100_001)]


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

    def all_reduce(self, x: np.ndarray, in_place: bool = False, offset: int = 0) -> np.ndarray:
        """Of x, or of a copy of it that begins `offset` bytes after what a GPU would like."""
        x = shifted(x, offset)
        y = x if in_place else shifted(np.full_like(x, np.nan), offset)
        self.kernels.all_reduce(at(x), at(y), x.size, None)
        return y

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        y = np.full((len(x), self.world * x.shape[1]), np.nan, np.float32)
        self.kernels.all_gather(at(x), at(y), *x.shape, None)
        return y


def shifted(x: np.ndarray, offset: int) -> np.ndarray:
    """A copy of x [n] that begins so many bytes after a multiple of 16."""
    memory = np.empty(x.nbytes + 32, np.uint8)
    begin = -memory.ctypes.data % 16 + offset
    copy = memory[begin : begin + x.nbytes].view(np.float32).reshape(x.shape)
    copy[...] = x
    return copy


def inputs(call: int, world: int, *shape: int) -> list[np.ndarray]:
    """Every rank's x of a call, of such magnitudes that another order of adding gives other bits."""
    random = np.random.default_rng([call, world])
    return [
        (random.standard_normal(shape, np.float32) * np.float32(10) ** random.integers(-4, 5, shape)).astype(np.float32)
        for _ in range(world)
    ]


def many_calls(
    library: str, rank: int, world: int, parent: Connection, mode: tuple[int, int], sizes: list[int]
) -> None:
    Emulation(library).configure(mode)  # of all ranks: their blocks meet one by one
    group = Group(library, rank, world, 60, parent)
    wrong = []
    for call, size in enumerate(sizes):
        xs = inputs(call, world, size)
        y = group.all_reduce(xs[rank], in_place=call % 2 == 0, offset=4 * (call % 3))
        if not np.array_equal(y, reference.all_reduce(xs)):
            wrong.append(("all_reduce", size))
        shape = SHAPES[call % len(SHAPES)]
        xs = inputs(call, world, *shape)
        if not np.array_equal(group.all_gather(xs[rank]), reference.all_gather(xs)):
            wrong.append(("all_gather", shape))
    parent.send((wrong, group.functions.pm_cuda_group_status()))
    parent.recv()  # all are done
    group.functions.pm_cuda_group_leave()


# What rank 0 calls where the others add up 5 numbers, and what they then read of it.
OTHER_CALLS = {
    "all_reduce of [6]": lambda group: group.all_reduce(np.ones(6, np.float32)),
    "all_reduce of [600001]": lambda group: group.all_reduce(np.ones(600_001, np.float32)),
    "all_reduce of [0]": lambda group: group.all_reduce(np.ones(0, np.float32)),
    "all_gather of [1, 5]": lambda group: group.all_gather(np.ones((1, 5), np.float32)),
}


def calls_differ(library: str, rank: int, world: int, parent: Connection, other_call: str) -> None:
    """A call that agrees, one that does not, and one more."""
    group = Group(library, rank, world, 60, parent)
    five = np.ones(5, np.float32)
    group.all_gather(np.ones((2, 3), np.float32))
    if rank == 0:
        OTHER_CALLS[other_call](group)
    else:
        group.all_reduce(five)
    status, text = group.functions.pm_cuda_group_status(), group.kernels.text()
    with pytest.raises(KernelError, match="PM_RANKS_DISAGREE"):
        group.all_reduce(five)
    parent.send((status, text))
    parent.recv()


def waits_in_vain(library: str, rank: int, world: int, parent: Connection) -> None:
    group = Group(library, rank, world, 0.1, parent)
    texts = []
    for _ in range(2 if rank == 0 else 0):  # rank 1 does not come
        try:
            group.all_reduce(np.ones(5000, np.float32))
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


@pytest.mark.parametrize(
    ("world", "mode", "sizes"),
    [
        (1, FORWARD, SIZES[:6]),
        (2, FORWARD, [*SIZES, MORE_THAN_SLOTS]),
        (2, REVERSE, SIZES[:6]),
        (3, FORWARD, [*SIZES, MORE_THAN_SLOTS]),
        (3, REVERSE, SIZES[-2:]),
        (4, FORWARD, [1, 7, 149_999, 150_003]),
        (8, FORWARD, [1, 511, 42_857, 42_861]),
    ],
)
def test_every_rank_has_the_sums_in_rank_order_and_all_columns(library, world, mode, sizes):
    assert run_ranks(many_calls, library, world, mode, sizes) == [([], 0)] * world


@pytest.mark.parametrize("other_call", OTHER_CALLS)
def test_ranks_that_make_other_calls_are_told_so(library, other_call):
    disagree = 5
    mine = "all_reduce of [5]"
    first, *others = run_ranks(calls_differ, library, 3, other_call)
    assert [status for status, _ in (first, *others)] == [disagree] * 3
    assert first[1].startswith(f"rank 0 called {other_call} where rank ")
    assert f" called {mine}; give every rank the same" in first[1]
    for rank, (_, text) in enumerate(others, 1):
        assert text.startswith(f"rank {rank} called {mine} where rank 0 called {other_call}; give every rank the same")


def test_a_rank_that_does_not_come_is_an_error_not_a_hang(library):
    peer_lost = 2
    (status, texts), (other, _) = run_ranks(waits_in_vain, library, 2)
    assert (status, other) == (peer_lost, 0)
    assert len(texts) == 1, "the call that waited was enqueued; the next one is refused"
    assert "PM_PEER_LOST: rank 1 did not come to all_reduce of [5000] of rank 0 within 0.1 s" in texts[0]


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
