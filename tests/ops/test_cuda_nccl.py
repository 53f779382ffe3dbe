"""Collectives between GPUs that do not map one another's memory: emulated, a process a rank, NCCL stood in for."""

import ctypes
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from ops.csrc import nvcc
from tests.gpu.table import KernelError, Kernels
from tests.ops.cuda_emulation import FORWARD, SHUFFLED, build
from tests.ops.emulated_ranks import (
    HANDLE_BYTES,
    NCCL_ID_BYTES,
    OTHER_CALLS,
    Group,
    assert_all_were_told,
    build_nccl,
    calls_differ,
    many_calls,
    run_ranks,
    waits_in_vain,
)

PEER_LOST = 2
# In numbers: up to what a record holds, one more, and so few more that some ranks' shares are empty; more than a rank
# receives at a time (collective_nccl.cu).
SIZES = [1, 7, 4095, 4096, 4097, 4099, 40_001, 2_050_007]
SHAPES = [(1, 1), (5, 777), (2, 2048), (3, 4096), (1, 700_001)]


@pytest.fixture(scope="module")
def library() -> str:
    return str(build("kernels", nvcc.sources()))


@pytest.fixture(scope="module")
def nccl(tmp_path_factory) -> str:
    return build_nccl(tmp_path_factory.mktemp("nccl"))


@pytest.fixture(autouse=True)
def messages(tmp_path, monkeypatch) -> Path:
    """The folder of a job's messages."""
    monkeypatch.setenv("NCCL_STAND_IN_FOLDER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("world", "mode"), [(1, FORWARD), (2, FORWARD), (2, SHUFFLED), (3, FORWARD), (4, FORWARD)])
def test_every_rank_has_the_sums_in_rank_order_and_all_columns(library, nccl, world, mode):
    assert run_ranks(many_calls, library, nccl, world, mode, SIZES, SHAPES) == [([], (0, ""))] * world


@pytest.mark.parametrize("other_call", OTHER_CALLS)
def test_ranks_that_make_other_calls_are_told_so(library, nccl, other_call):
    assert_all_were_told(run_ranks(calls_differ, library, nccl, 3, other_call), other_call)


def test_a_rank_that_does_not_come_is_an_error_not_a_hang(library, nccl):
    *waiting, (other, _) = run_ranks(waits_in_vain, library, nccl, 3)
    assert other == 0
    for rank, (status, texts) in enumerate(waiting):
        assert status == PEER_LOST
        expected = f"all_reduce: PM_PEER_LOST: no collective of rank {rank} by NCCL has ended for 0.1 s"
        assert texts == [expected] * 2  # emulated, the call waits itself


def nccl_fails(library: str, nccl: str, rank: int, world: int, parent: Connection, messages: Path) -> tuple[int, str]:
    group = Group(library, nccl, rank, world, parent)
    group.all_reduce(np.ones(5, np.float32))
    [folder] = messages.iterdir()
    if rank == 0:
        (folder / "broken").touch()
    deadline = time.monotonic() + 20
    while group.status()[0] == 0 and time.monotonic() < deadline:
        pass
    return group.status()


def test_what_nccl_finds_out_itself_is_told(library, nccl, messages):
    text = "NCCL reports on rank {}: remote process exited or there was a network error"
    expected = [(PEER_LOST, text.format(rank)) for rank in range(2)]
    assert run_ranks(nccl_fails, library, nccl, 2, messages) == expected


def never_connects(library: str, nccl: str, rank: int, world: int, parent: Connection) -> str:
    if rank == 0:
        Group(library, nccl, rank, world, parent, join_timeout=0.2)
    parent.send(bytes(NCCL_ID_BYTES))
    parent.recv()
    return "did not come"


def test_a_rank_that_does_not_connect_is_an_error_not_a_hang(library, nccl):
    waiting, _ = run_ranks(never_connects, library, nccl, 2)
    assert waiting == "NCCL did not connect the ranks within 0.2 s"


def test_what_is_no_nccl_is_refused(library, nccl, monkeypatch):
    kernels, functions = Kernels(library), ctypes.CDLL(library)
    version, nccl_id = ctypes.c_int(), ctypes.create_string_buffer(NCCL_ID_BYTES)
    refused = [
        ("libnccl-that-is-not.so", "libnccl-that-is-not.so: cannot open shared object file"),
        ("libm.so.6", "libm.so.6 has no ncclGetVersion"),
    ]
    for name, text in refused:
        assert functions.pm_cuda_nccl_load(name.encode(), ctypes.byref(version)) != 0
        assert text in kernels.text()
    monkeypatch.setenv("NCCL_STAND_IN_VERSION", "2604")
    assert functions.pm_cuda_nccl_load(nccl.encode(), ctypes.byref(version)) != 0
    assert kernels.text() == f"{nccl} is NCCL of version code 2604, older than 2.7 (2700)"
    assert functions.pm_cuda_nccl_id(nccl_id) != 0
    assert kernels.text() == "no NCCL: pm_cuda_nccl_load first"
    assert functions.pm_cuda_group_open_nccl(nccl_id, ctypes.c_double(1)) != 0
    assert "pm_cuda_group_create first" in kernels.text()
    assert functions.pm_cuda_group_create(0, 1, ctypes.c_double(1), ctypes.create_string_buffer(HANDLE_BYTES)) == 0
    assert functions.pm_cuda_group_open_nccl(nccl_id, ctypes.c_double(1)) != 0
    assert kernels.text() == "no NCCL: pm_cuda_nccl_load first"
    functions.pm_cuda_group_leave()
    with pytest.raises(KernelError, match="PM_NOT_CONNECTED"):
        kernels.all_reduce(None, None, 1, None)
