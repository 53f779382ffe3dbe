"""join_gpus between processes whose GPUs are emulated: handles pass through the processes' group."""

import ctypes
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from ops.collective import group, join_group
from ops.csrc import nvcc
from ops.gpu_group import WAY_VARIABLE, check_gpus, join_gpus
from tests.gpu.table import KernelError, Kernels
from tests.ops.cuda_emulation import build
from tests.ops.emulated_ranks import build_nccl

RANKS = multiprocessing.get_context("spawn")
WORLD = 3
NO_PEERS = "rank 0: mapping the memory of rank 1's GPU: peer access is not supported between these two devices"


def add_up(library: str, size: int = 1) -> np.ndarray:
    """The sum of 10 to the power of each rank."""
    x = np.full(size, 10.0 ** group()[0], np.float32)
    pointer = x.ctypes.data_as(ctypes.c_void_p)
    Kernels(library).all_reduce(pointer, pointer, size, None)
    check_gpus()
    return x


def sums(library: str, nccl: Path | None) -> tuple[str | None, float]:
    """Joins twice, the second time in vain."""
    check_gpus()
    way = join_gpus(0, kernels=ctypes.CDLL(library), nccl=nccl)
    assert join_gpus(0, kernels=ctypes.CDLL(library), nccl=nccl) is None
    check_gpus()
    return way, add_up(library).item()


def sums_soon(library: str, nccl: Path | None) -> tuple[str | None, float]:
    """As sums, of ranks that do not wait long for one another."""
    return join_gpus(0, 30, ctypes.CDLL(library), nccl, join_timeout_s=5), add_up(library).item()


def refused(library: str, nccl: Path | None) -> None:
    """Rank 1 asks for a GPU that there is not."""
    join_gpus(7 if group()[0] == 1 else 0, kernels=ctypes.CDLL(library), nccl=nccl)


def missed(library: str, nccl: Path | None) -> None:
    """Rank 1 does not come to a sum."""
    join_gpus(0, 0.1, ctypes.CDLL(library), nccl)
    if group()[0] != 1:
        add_up(library)


def differ(library: str, nccl: Path | None) -> None:
    """Rank 2 adds up other numbers than the others."""
    join_gpus(0, kernels=ctypes.CDLL(library), nccl=nccl)
    add_up(library, 2 if group()[0] == 2 else 1)


def ask_otherwise(library: str, nccl: Path | None) -> None:
    """The variable is set on rank 1 alone."""
    if group()[0] == 1:
        os.environ[WAY_VARIABLE] = "nccl"
    join_gpus(0, kernels=ctypes.CDLL(library), nccl=nccl)


def find_nccl(library: str, nccl: Path | None) -> str | None:
    """NCCL is a package on Python's path, as PyPI's is."""
    assert nccl
    sys.path.insert(0, str(nccl.parents[3]))
    return join_gpus(0, kernels=ctypes.CDLL(library))


def in_a_rank(function, library: str, nccl: Path | None, name: str, rank: int, found) -> None:
    join_group(name, rank, WORLD, 60)
    try:
        found.send(function(library, nccl))
    except (ValueError, KernelError) as error:
        found.send(str(error))


@pytest.fixture(scope="module")
def run():
    """run(function, nccl) -> what it returned or raised, by rank."""
    library = str(build("kernels", nvcc.sources()))

    def run(function, nccl: Path | None = None) -> list:
        pipes = [RANKS.Pipe() for _ in range(WORLD)]
        name = f"test-gpus-{os.getpid()}-{function.__name__}"
        processes = [
            RANKS.Process(target=in_a_rank, args=(function, library, nccl, name, rank, pipes[rank][1]))
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


@pytest.fixture(scope="module")
def nccl(tmp_path_factory) -> Path:
    """The stand-in for NCCL, in a folder as its package has it."""
    folder = tmp_path_factory.mktemp("packages") / "nvidia" / "nccl" / "lib"
    folder.mkdir(parents=True)
    return Path(build_nccl(folder))


@pytest.fixture
def no_peer_access(tmp_path, monkeypatch) -> None:
    """No GPU maps another's memory; NCCL's messages have a folder."""
    monkeypatch.setenv("CUDA_EMULATION_PEER_ACCESS", "none")
    monkeypatch.setenv("NCCL_STAND_IN_FOLDER", str(tmp_path))


def test_the_gpus_of_all_ranks_meet(run):
    assert run(sums) == [("sums of 3 ranks' GPUs: through CUDA IPC", 111.0)] * WORLD


def test_gpus_that_do_not_share_memory_meet_by_nccl(run, nccl, no_peer_access):
    assert run(sums, nccl) == [(f"sums of 3 ranks' GPUs: through NCCL 2.27.3 ({NO_PEERS})", 111.0)] * WORLD


@pytest.mark.parametrize(
    ("access", "found"),
    [("feigned", "did not end within 5 s"), ("partial", "is wrong: number 1 is 1, not 6")],
)
def test_gpus_that_do_not_share_what_they_map_meet_by_nccl(run, nccl, no_peer_access, monkeypatch, access, found):
    monkeypatch.setenv("CUDA_EMULATION_PEER_ACCESS", access)
    reason = f"rank 0: a trial sum through mapped memory {found}"
    assert run(sums_soon, nccl) == [(f"sums of 3 ranks' GPUs: through NCCL 2.27.3 ({reason})", 111.0)] * WORLD


def test_nccl_is_found_where_its_package_is_installed(run, nccl, no_peer_access):
    assert run(find_nccl, nccl) == [f"sums of 3 ranks' GPUs: through NCCL 2.27.3 ({NO_PEERS})"] * WORLD


def test_without_nccl_it_is_said_how_to_get_it(run, no_peer_access):
    expected = (
        f"the GPUs need NCCL ({NO_PEERS}), which cannot be loaded: /nowhere/libnccl.so.2: cannot open shared object "
        "file: No such file or directory; pip install nvidia-nccl-cu13 (nvidia-nccl-cu12 where nvidia-smi says CUDA "
        "12), or have the folder of libnccl.so.2 in LD_LIBRARY_PATH"
    )
    assert run(sums, Path("/nowhere/libnccl.so.2")) == [expected] * WORLD


def test_the_way_can_be_asked_for(run, nccl, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_STAND_IN_FOLDER", str(tmp_path))
    monkeypatch.setenv(WAY_VARIABLE, "nccl")
    reason = f"{WAY_VARIABLE} is nccl"
    assert run(sums, nccl) == [(f"sums of 3 ranks' GPUs: through NCCL 2.27.3 ({reason})", 111.0)] * WORLD
    monkeypatch.setenv(WAY_VARIABLE, "ipc")
    assert run(sums, nccl) == [("sums of 3 ranks' GPUs: through CUDA IPC", 111.0)] * WORLD


def test_a_way_that_is_not_open_is_refused(run, nccl, no_peer_access, monkeypatch):
    monkeypatch.setenv(WAY_VARIABLE, "ipc")
    expected = (
        f"{WAY_VARIABLE} is ipc, but the GPUs do not share their memory ({NO_PEERS}); set it to nccl, or unset it"
    )
    assert run(sums, nccl) == [expected] * WORLD


def test_a_way_that_is_none_is_refused(run, monkeypatch):
    monkeypatch.setenv(WAY_VARIABLE, "mpi")
    expected = f"{WAY_VARIABLE} is 'mpi', needs ipc or nccl; leave it unset to have it chosen"
    assert run(sums) == [expected] * WORLD


def test_ranks_that_ask_for_other_ways_are_refused(run):
    advice = "; set it alike, or nowhere"
    assert run(ask_otherwise) == [
        f"{WAY_VARIABLE} is '' on rank 0 and 'nccl' on rank 1{advice}",
        f"{WAY_VARIABLE} is 'nccl' on rank 1 and '' on rank 0{advice}",
        f"{WAY_VARIABLE} is '' on rank 2 and 'nccl' on rank 1{advice}",
    ]


def test_a_wait_in_vain_is_told(run):
    first, second, third = run(missed)
    assert second is None  # it missed nobody
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
