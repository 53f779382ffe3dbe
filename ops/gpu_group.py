"""The GPUs of one job's ranks as a group: what all_reduce and all_gather of tensors on NVIDIA GPUs run through.

The ranks' GPUs reach each other's memory by CUDA's IPC handles (ops/csrc/kernels/cuda/collective.cu), which are moved
here through the group the processes have joined. Run so far with CUDA emulated, a process a rank; nobody has run it on
GPUs.
"""

import ctypes

import numpy as np
import paddle

from ops.collective import LOST, PEER_LOST, all_gather, group
from ops.library import LIBRARY

HANDLE_BYTES = 64  # PM_CUDA_HANDLE_BYTES of ops/csrc/kernels/include/collective.h


class _Table(ctypes.Structure):
    """The beginning of pm_device_kernels of ops/csrc/kernels/include/device.h."""

    _fields_ = (
        ("abi_version", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("last_error", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    )


_joined: ctypes.CDLL | None = None  # the kernels whose group of GPUs this process is in


def join_gpus(device: int, step_timeout_s: float = 600.0, kernels: ctypes.CDLL = LIBRARY) -> None:
    """Joins this rank's GPU to those of all ranks; returns when all have.

    Every rank calls it, after ops.collective.join_group. The group lasts as long as the process; joining again does
    nothing.

    Args:
        device: the number of this rank's GPU, as this process counts them.
        step_timeout_s: seconds an operator waits on the GPU for the other ranks.
        kernels: the library that has them.

    Raises:
        ValueError: a GPU refused its part, such as two that cannot reach each other's memory, or another rank died.
    """
    global _joined
    if _joined is not None:
        return
    rank, world_size = group()
    handle = np.zeros((1, HANDLE_BYTES), np.uint8)
    kernels.pm_cuda_group_create.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double, ctypes.c_void_p]
    kernels.pm_cuda_group_open.argtypes = [ctypes.c_void_p]
    _check(kernels, kernels.pm_cuda_set_device(device))
    _check(kernels, kernels.pm_cuda_group_create(rank, world_size, step_timeout_s, handle.ctypes.data))
    handles = _gather(handle, world_size)
    _check(kernels, kernels.pm_cuda_group_open(handles.ctypes.data))
    _gather(handle, world_size)  # a rank that was refused is noticed here, not by waiting for it on the GPU
    _joined = kernels


def check_gpus() -> None:
    """Returns at once, if all went well between the GPUs, or there is no group of them; asked after a step's results.

    Raises:
        ValueError: a wait for another rank took too long, or the ranks called different operators or sizes: what the
            step computed is of no use.
    """
    if _joined is None or (status := _joined.pm_cuda_group_status()) == 0:
        return
    raise ValueError(f"{LOST}: {_last_error(_joined)}" if status == PEER_LOST else _last_error(_joined))


def _gather(handle: np.ndarray, world_size: int) -> np.ndarray:
    """The handles of all ranks, in rank order. A gather only copies, so that bytes may pass as float32."""
    return all_gather(paddle.to_tensor(handle.view(np.float32), place=paddle.CPUPlace()), world_size).numpy()


def _check(kernels: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise ValueError(f"rank {group()[0]} cannot join its GPU to the other ranks': {_last_error(kernels)}")


def _last_error(kernels: ctypes.CDLL) -> str:
    kernels.pm_cuda_kernels.restype = ctypes.c_void_p
    return _Table.from_address(kernels.pm_cuda_kernels()).last_error().decode()
