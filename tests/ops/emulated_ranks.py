"""Ranks whose GPUs are emulated: processes that map one another's memory as GPUs do, or send it as NCCL would."""

import ctypes
import multiprocessing
import subprocess
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ops import reference
from tests.gpu.table import KernelError, Kernels
from tests.ops.cuda_emulation import Emulation

PROCESSES = multiprocessing.get_context("spawn")
HANDLE_BYTES, NCCL_ID_BYTES = 64, 128


def build_nccl(folder: Path) -> str:
    """The stand-in for NCCL's library, compiled into ``folder``."""
    library, source = folder / "libnccl.so.2", Path(__file__).with_name("nccl_stand_in.cc")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return str(library)


class Group:
    """This process' membership in a group of emulated GPUs, made with the others through the parent."""

    def __init__(
        self,
        library: str,
        nccl: str | None,
        rank: int,
        world: int,
        parent: Connection,
        step_timeout: float = 60.0,
        join_timeout: float = 60.0,
    ) -> None:
        self.functions = ctypes.CDLL(library)
        self.kernels, self.rank, self.world, self.parent = Kernels(library), rank, world, parent
        handle = ctypes.create_string_buffer(HANDLE_BYTES)
        self._check(self.functions.pm_cuda_group_create(rank, world, ctypes.c_double(step_timeout), handle))
        if nccl is None:
            self._check(self.functions.pm_cuda_group_open(self._gather(handle)))
        else:
            nccl_id = ctypes.create_string_buffer(NCCL_ID_BYTES)
            self._check(self.functions.pm_cuda_nccl_load(nccl.encode(), ctypes.byref(ctypes.c_int())))
            if rank == 0:
                self._check(self.functions.pm_cuda_nccl_id(nccl_id))
            ids = self._gather(nccl_id)  # rank 0's is the first
            self._check(self.functions.pm_cuda_group_open_nccl(ids, ctypes.c_double(join_timeout)))

    def status(self) -> tuple[int, str]:
        """The group's, and its text where it is not 0."""
        status = self.functions.pm_cuda_group_status()
        return status, self.kernels.text() if status else ""

    def all_reduce(self, x: np.ndarray, in_place: bool = False, offset: int = 0) -> np.ndarray:
        """Of a copy of x that begins `offset` bytes after what a GPU would like."""
        x = _shifted(x, offset)
        y = x if in_place else _shifted(np.full_like(x, np.nan), offset)
        self.kernels.all_reduce(_at(x), _at(y), x.size, None)
        return y

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        y = np.full((len(x), self.world * x.shape[1]), np.nan, np.float32)
        self.kernels.all_gather(_at(x), _at(y), *x.shape, None)
        return y

    def _gather(self, mine: ctypes.Array) -> bytes:
        self.parent.send(mine.raw)
        return self.parent.recv()

    def _check(self, status: int) -> None:
        if status:
            raise KernelError(self.kernels.text())


def _at(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def _shifted(x: np.ndarray, offset: int) -> np.ndarray:
    """A copy of x that begins so many bytes after a multiple of 16."""
    memory = np.empty(x.nbytes + 32, np.uint8)
    begin = -memory.ctypes.data % 16 + offset
    copy = memory[begin : begin + x.nbytes].view(np.float32).reshape(x.shape)
    copy[...] = x
    return copy


def run_ranks(function: Callable, library: str, nccl: str | None, world: int, *arguments) -> list:
    """What function(library, nccl, rank, world, parent, *arguments) of each rank sent, once handles have been passed
    around; an exception's text where one was raised."""
    pipes = [PROCESSES.Pipe() for _ in range(world)]
    processes = [
        PROCESSES.Process(target=_rank, args=(function, library, nccl, rank, world, pipes[rank][1], *arguments))
        for rank in range(world)
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


def _rank(function: Callable, library: str, nccl: str | None, rank: int, world: int, parent: Connection, *arguments):
    try:
        parent.send(function(library, nccl, rank, world, parent, *arguments))
    except KernelError as error:
        parent.send(str(error))
    parent.recv()  # all are done
    ctypes.CDLL(library).pm_cuda_group_leave()


def _inputs(call: int, world: int, *shape: int) -> list[np.ndarray]:
    """Every rank's x of a call, of such magnitudes that another order of adding gives other bits."""
    random = np.random.default_rng([call, world])
    return [
        (random.standard_normal(shape, np.float32) * np.float32(10) ** random.integers(-4, 5, shape)).astype(np.float32)
        for _ in range(world)
    ]


def many_calls(
    library: str,
    nccl: str | None,
    rank: int,
    world: int,
    parent: Connection,
    mode: tuple[int, int],
    sizes: list[int],
    shapes: list[tuple[int, int]],
) -> tuple[list, tuple[int, str]]:
    """A sum of each size and a gather of each shape in turn: those with other bits than the reference's, and the
    group's status then."""
    Emulation(Path(library)).configure(mode)  # of all ranks: their blocks meet one by one
    group = Group(library, nccl, rank, world, parent)
    wrong: list = []
    for call, (size, shape) in enumerate(zip(sizes, (shapes * len(sizes))[: len(sizes)], strict=True)):
        xs = _inputs(call, world, size)
        y = group.all_reduce(xs[rank], in_place=call % 2 == 0, offset=4 * (call % 3))
        if not np.array_equal(y, reference.all_reduce(xs)):
            wrong.append(("all_reduce", size))
        xs = _inputs(call, world, *shape)
        if not np.array_equal(group.all_gather(xs[rank]), reference.all_gather(xs)):
            wrong.append(("all_gather", shape))
    return wrong, group.status()


# What rank 0 calls where the others add up 5 numbers.
OTHER_CALLS: dict[str, Callable[[Group], np.ndarray]] = {
    "all_reduce of [6]": lambda group: group.all_reduce(np.ones(6, np.float32)),
    "all_reduce of [600001]": lambda group: group.all_reduce(np.ones(600_001, np.float32)),
    "all_reduce of [0]": lambda group: group.all_reduce(np.ones(0, np.float32)),
    "all_gather of [1, 5]": lambda group: group.all_gather(np.ones((1, 5), np.float32)),
}


def calls_differ(
    library: str, nccl: str | None, rank: int, world: int, parent: Connection, other_call: str
) -> tuple[tuple[int, str], str]:
    """The group's status after a call that agrees and one that does not; what the next call says."""
    group = Group(library, nccl, rank, world, parent)
    group.all_gather(np.ones((2, 3), np.float32))
    five = np.ones(5, np.float32)
    call = OTHER_CALLS[other_call] if rank == 0 else lambda group: group.all_reduce(five)
    with suppress(KernelError) if nccl else nullcontext():  # by NCCL, emulated, a call itself may find it out
        call(group)
    status = group.status()
    try:
        group.all_reduce(five)
    except KernelError as error:
        return status, str(error)
    return status, "the next call was taken"


def assert_all_were_told(found: list[tuple[tuple[int, str], str]], other_call: str) -> None:
    """Of what calls_differ found on each rank."""
    disagree, mine, advice = 5, "all_reduce of [5]", "; give every rank the same command and artefact"
    for rank, ((status, text), next_call) in enumerate(found):
        ours, theirs = (other_call, mine) if rank == 0 else (mine, other_call)
        others = range(1, len(found)) if rank == 0 else (0,)
        assert status == disagree
        assert text in [f"rank {rank} called {ours} where rank {r} called {theirs}{advice}" for r in others]
        assert next_call == f"all_reduce: PM_RANKS_DISAGREE: {text}"


def waits_in_vain(library: str, nccl: str | None, rank: int, world: int, parent: Connection) -> tuple[int, list[str]]:
    """The group's status after a sum that the last rank does not come to, and another; what they said."""
    group = Group(library, nccl, rank, world, parent, step_timeout=0.1)
    texts = []
    for _ in range(0 if rank == world - 1 else 2):
        try:
            group.all_reduce(np.ones(5000, np.float32))
        except KernelError as error:
            texts.append(str(error))
    return group.status()[0], texts
