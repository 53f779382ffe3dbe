"""Collectives between GPUs that map one another's memory, emulated, a process a rank."""

import ctypes

import pytest

from ops.csrc import nvcc
from tests.gpu.table import KernelError, Kernels
from tests.ops.cuda_emulation import FORWARD, REVERSE, build
from tests.ops.emulated_ranks import (
    HANDLE_BYTES,
    OTHER_CALLS,
    assert_all_were_told,
    calls_differ,
    many_calls,
    run_ranks,
    waits_in_vain,
)

# In numbers: one; odd counts around what a block passes at a time and what a block takes at least; just enough, and
# just not enough, to be added up in shares by 3 ranks, 4 and 8 (collective_ipc.cu); more than all blocks' slots hold.
SIZES = [1, 2, 7, 511, 4097, 42_857, 42_861, 149_999, 150_003, 337_499, 337_503]
MORE_THAN_SLOTS = 64 * 16 * 1024 + 5
SHAPES = [(1, 1), (3, 777), (7, 1), (5, 4096), (1, 100_001)]


@pytest.fixture(scope="module")
def library() -> str:
    return str(build("kernels", nvcc.sources()))


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
    assert run_ranks(many_calls, library, None, world, mode, sizes, SHAPES) == [([], (0, ""))] * world


@pytest.mark.parametrize("other_call", OTHER_CALLS)
def test_ranks_that_make_other_calls_are_told_so(library, other_call):
    assert_all_were_told(run_ranks(calls_differ, library, None, 3, other_call), other_call)


def test_a_rank_that_does_not_come_is_an_error_not_a_hang(library):
    peer_lost = 2
    (status, texts), (other, _) = run_ranks(waits_in_vain, library, None, 2)
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


def test_a_gather_of_too_many_rows_or_columns_is_refused(library):
    kernels, functions = Kernels(library), ctypes.CDLL(library)
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    assert functions.pm_cuda_group_create(0, 1, ctypes.c_double(1), handle) == 0
    assert functions.pm_cuda_group_open(handle) == 0
    for rows, cols in ((2**23, 1), (1, 2**23), (2**16, 2**16)):
        with pytest.raises(KernelError, match=rf"PM_UNSUPPORTED: .*; x is \[{rows}, {cols}\]"):
            kernels.all_gather(None, None, rows, cols, None)
    functions.pm_cuda_group_leave()
