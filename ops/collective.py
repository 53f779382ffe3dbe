"""Sums and gathers across the ranks of one job, and the group they form.

Every rank makes the same calls in the same order. The operators survive jit.save and run inside the predictor; a
process joins its group once, before the first of them runs.
"""

import ctypes
import os

import numpy as np
import paddle

from ops.library import LIBRARY, run

MAX_RANKS = 16  # PM_MAX_RANKS of ops/csrc/kernels/include/collective.h
LOST = "another rank of this job died or did not answer in time; see its log (log/workerlog.*)"
PEER_LOST = 2  # PM_PEER_LOST of ops/csrc/kernels/include/common.h

LIBRARY.pm_cpu_group_join.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_double, ctypes.c_double]
LIBRARY.pm_cpu_group_leave.restype = None
LIBRARY.pm_cpu_broadcast.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]


def all_reduce(x: paddle.Tensor, world_size: int) -> paddle.Tensor:
    """``((x_0 + x_1) + x_2) + ...`` over the ranks, in rank order: the same bits on every rank.

    Args:
        x: float32 of any shape, the same on every rank.
        world_size: ranks in the group; with 1, x is returned as it is.

    Returns:
        The shape of x, float32.

    Raises:
        ValueError: x is not float32, the group has another size, the ranks called different operators or sizes, or
            another rank died, left or did not arrive in time.
    """
    return x if world_size == 1 else run("pm_all_reduce", x, world_size)[0]


def all_gather(x: paddle.Tensor, world_size: int) -> paddle.Tensor:
    """The columns of every rank side by side, rank r's at ``r * cols``.

    Args:
        x: [rows, cols] float32, the same shape on every rank.
        world_size: ranks in the group; with 1, x is returned as it is.

    Returns:
        [rows, world_size * cols] float32.

    Raises:
        ValueError: as :func:`all_reduce` does.
    """
    return x if world_size == 1 else run("pm_all_gather", x, world_size)[0]


def broadcast(array: np.ndarray) -> None:
    """Copies rank 0's bytes into the arrays of the other ranks, which have as many; not part of a program.

    A rank waits here without using the processor, for as long as the group's ``step_timeout_s`` allows.

    Args:
        array: C-contiguous; written to on every rank but the first.

    Raises:
        ValueError: the array cannot be written in place, or as :func:`all_reduce` does.
    """
    if not array.flags.carray:
        raise ValueError("broadcast: the array is not a contiguous one that can be written to; give a copy")
    status = LIBRARY.pm_cpu_broadcast(array.ctypes.data, array.nbytes, None)
    if status == PEER_LOST:
        raise ValueError(f"broadcast: {LOST}")
    if status != 0:
        raise ValueError(
            f"broadcast: status {status}: this process has joined no group, or the ranks called different operators or "
            "sizes; give every rank the same command and artefact"
        )


def check_group() -> None:
    """Returns at once, if all ranks live.

    Raises:
        ValueError: one has died or left.
    """
    if not LIBRARY.pm_cpu_group_alive():
        raise ValueError(LOST)


def join_group(name: str, rank: int, world_size: int, timeout_s: float, step_timeout_s: float = 600.0) -> None:
    """Joins the ranks of one job on this machine; returns when all have.

    Args:
        name: the same on every rank, and no other running job's; letters, digits, '-' and '_'.
        rank: 0 .. world_size - 1, another on every rank.
        world_size: 1 .. 16.
        timeout_s: seconds to wait here for the others.
        step_timeout_s: seconds an operator waits for a rank that lives but does not arrive (math.inf: for ever).
            Ranks that die are noticed within a second, whatever it is.

    Raises:
        ValueError: an argument other than the above, this process has a group already, the others did not join in time,
            or the system gives no shared memory.
    """
    if not name or len(name) > 200 or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ValueError(f"group name is '{name}', needs 1 to 200 letters, digits, '-' or '_'")
    if not 1 <= world_size <= MAX_RANKS:
        raise ValueError(f"world_size is {world_size}, needs 1 to {MAX_RANKS} ranks")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, needs 0 to {world_size - 1} (world_size {world_size})")
    if not (timeout_s > 0 and step_timeout_s > 0):
        raise ValueError(f"time-outs are {timeout_s} s and {step_timeout_s} s, both need to be positive")
    status = LIBRARY.pm_cpu_group_join(name.encode(), rank, world_size, timeout_s, step_timeout_s)
    if status == PEER_LOST:
        raise ValueError(
            f"rank {rank} of {world_size} waited up to {timeout_s:g} s for the other ranks, and they did not all join: "
            "one of them failed or is slow to start; see its log (log/workerlog.*)"
        )
    if status != 0:
        raise ValueError(f"rank {rank} of {world_size} cannot join its group: {os.strerror(-status)} (/dev/shm)")


def leave_group() -> None:
    """Forgets the group, if there is one; ranks still waiting for this one raise."""
    LIBRARY.pm_cpu_group_leave()


def group() -> tuple[int, int]:
    """(rank, world_size) of the joined group; (0, 1) without one."""
    return LIBRARY.pm_cpu_group_rank(), LIBRARY.pm_cpu_group_world()
