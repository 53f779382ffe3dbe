"""join_gpus between processes whose GPUs are emulated: handles pass through the processes' group."""

import ctypes
import multiprocessing
import os

import numpy as np
import pytest

from ops.collective import group, join_group
from ops.csrc import nvcc
from ops.gpu_group import check_gpus, join_gpus
from tests.gpu.table import KernelError, Kernels
from tests.ops.cuda_emulation import build

RANKS = multiprocessing.get_context("spawn")
WORLD = 3


def sums(library: str) -> float:
    """Joins twice, the second time in vain, and adds up one number of each rank."""
    for _ in range(2):
        join_gpus(0, kernels=ctypes.CDLL(library))
    check_gpus()
    x = np.array([10.0 ** group()[0]], np.float32)
    Kernels(library).all_reduce(x.ctypes.data_as(ctypes.c_void_p), x.ctypes.data_as(ctypes.c_void_p), 1, None)
    check_gpus()
    return x.item()


def refused(library: str) -> float:
    """Rank 1 asks for a GPU that there is not."""
    join_gpus(7 if group()[0] == 1 else 0, kernels=ctypes.CDLL(library))
    return 0.0


def missed(library: str) -> float:
    """Rank 1 does not come to a sum."""
    join_gpus(0, 0.1, ctypes.CDLL(library))
    x = np.ones(1, np.float32)
    if group()[0] != 1:
        Kernels(library).all_reduce(x.ctypes.data_as(ctypes.c_void_p), x.ctypes.data_as(ctypes.c_void_p), 1, None)
    check_gpus()
    return 0.0


def differ(library: str) -> float:
    """Rank 2 adds up other numbers than the others."""
    join_gpus(0, kernels=ctypes.CDLL(library))
    x = np.ones(2, np.float32)
    size = 2 if group()[0] == 2 else 1
    Kernels(library).all_reduce(x.ctypes.data_as(ctypes.c_void_p), x.ctypes.data_as(ctypes.c_void_p), size, None)
    check_gpus()
    return 0.0


def in_a_rank(function, library: str, name: str, rank: int, found) -> None:
    join_group(name, rank, WORLD, 60)
    try:
        found.send(function(library))
    except (ValueError, KernelError) as error:
        found.send(str(error))


@pytest.fixture(scope="module")
def run():
    """run(function) -> what it returned or raised, by rank."""
    library = str(build("kernels", nvcc.sources()))

    def run(function) -> list[float | str]:
        pipes = [RANKS.Pipe() for _ in range(WORLD)]
        name = f"test-gpus-{os.getpid()}-{function.__name__}"
        processes = [
            RANKS.Process(target=in_a_rank, args=(function, library, name, rank, pipes[rank][1]))
            for rank in range(WORLD)
        ]
        for process, (_, child) in zip(processes, pipes, strict=True):
            process.start()
            child.close()  # so that the end of a rank is the end of its pipe
        found = [pipe.recv() for pipe, _ in pipes]
        for process in processes:
            process.join(60)
        return found

    return run


def test_the_gpus_of_all_ranks_meet(run):
    assert run(sums) == [111.0] * WORLD


def test_a_wait_in_vain_is_told(run):
    first, second, third = run(missed)
    assert second == 0.0  # it missed nobody
    lost = "another rank of this job died or did not answer in time; see its log (log/workerlog.*): "
    assert first == f"{lost}rank 1 did not come to all_reduce of [1] of rank 0 within 0.1 s"
    assert third == f"{lost}rank 1 did not come to all_reduce of [1] of rank 2 within 0.1 s"


def test_calls_that_differ_are_told(run):
    first, second, third = run(differ)
    advice = "; give every rank the same command and artefact"
    assert first == f"rank 0 called all_reduce of [1] where rank 2 called all_reduce of [2]{advice}"
    assert second == f"rank 1 called all_reduce of [1] where rank 2 called all_reduce of [2]{advice}"
    assert str(third).startswith("rank 2 called all_reduce of [2] where rank ")


def test_a_gpu_that_refuses_ends_the_joining_on_every_rank(run):
    first, second, third = run(refused)
    assert second == "rank 1 cannot join its GPU to the other ranks': choosing the GPU: invalid argument"
    assert (
        first
        == third
        == "all_gather: another rank of this job died or did not answer in time; see its log " + ("(log/workerlog.*)")
    )
