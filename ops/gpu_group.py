"""The GPUs of one job's ranks as a group: what all_reduce and all_gather of tensors on NVIDIA GPUs run through.

All ranks are on one machine. Their GPUs reach each other's memory by CUDA's IPC handles where all of them can
(ops/csrc/kernels/cuda/collective_ipc.cu), else NCCL moves the numbers (collective_nccl.cu, which says why it does not
add them up): the sums are the same bits. Handles and ids are moved here through the group the processes have joined.
Run so far with CUDA emulated, a process a rank, and NCCL stood in for; nobody has run it on GPUs.
"""

import ctypes
import importlib.util
import os
from pathlib import Path

import numpy as np
import paddle

from ops.collective import LOST, PEER_LOST, all_gather, group
from ops.library import LIBRARY

HANDLE_BYTES = 64  # PM_CUDA_HANDLE_BYTES of ops/csrc/kernels/include/collective.h
NCCL_ID_BYTES = 128  # PM_CUDA_NCCL_ID_BYTES
WAY_VARIABLE = "PADDLE_MIXTRAL_GPU_COLLECTIVES"
NCCL_FILE = "libnccl.so.2"
_REASON_BYTES = 256
_TRIAL_TIMEOUT_S = 10.0  # for sums that take microseconds, of ranks that are all there


class _Table(ctypes.Structure):
    """The beginning of pm_device_kernels of ops/csrc/kernels/include/device.h."""

    _fields_ = (
        ("abi_version", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("last_error", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    )


_joined: ctypes.CDLL | None = None  # the kernels whose group of GPUs this process is in


def join_gpus(
    device: int,
    step_timeout_s: float = 600.0,
    kernels: ctypes.CDLL = LIBRARY,
    nccl: Path | None = None,
    join_timeout_s: float = 120.0,
) -> str | None:
    """Joins this rank's GPU to those of all ranks; returns when all have.

    Every rank calls it, after ops.collective.join_group. The group lasts as long as the process; joining again does
    nothing. The variable PADDLE_MIXTRAL_GPU_COLLECTIVES, set to ipc or nccl, allows that way alone.

    Args:
        device: the number of this rank's GPU, as this process counts them.
        step_timeout_s: seconds an operator waits for the other ranks.
        kernels: the library that has them.
        nccl: NCCL's library; None: the installed one.
        join_timeout_s: seconds to wait here for the other ranks' GPUs.

    Returns:
        Which way was taken, and why, for the log; None where this process had joined already.

    Raises:
        ValueError: a GPU refused its part, no way is open between the GPUs, or another rank died.
    """
    global _joined
    if _joined is not None:
        return None
    rank, world_size = group()
    asked = os.environ.get(WAY_VARIABLE, "")
    if asked not in ("", "ipc", "nccl"):
        raise ValueError(f"{WAY_VARIABLE} is '{asked}', needs ipc or nccl; leave it unset to have it chosen")
    handle = np.zeros(HANDLE_BYTES, np.uint8)
    kernels.pm_cuda_group_create.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double, ctypes.c_void_p]
    _check(kernels, kernels.pm_cuda_set_device(device))
    _check(kernels, kernels.pm_cuda_group_create(rank, world_size, step_timeout_s, handle.ctypes.data))
    for other, theirs in enumerate(_gather_texts(asked)):
        if theirs != asked:
            raise ValueError(
                f"{WAY_VARIABLE} is '{asked}' on rank {rank} and '{theirs}' on rank {other}; set it alike, or nowhere"
            )
    refusal = f"{WAY_VARIABLE} is nccl" if asked == "nccl" else _map_memory(kernels, handle, join_timeout_s)
    if not refusal:
        way = "CUDA IPC"
    elif asked == "ipc":
        raise ValueError(
            f"{WAY_VARIABLE} is ipc, but the GPUs do not share their memory ({refusal}); set it to nccl, or unset it"
        )
    else:
        way = f"NCCL {_connect_nccl(kernels, nccl, refusal, join_timeout_s)} ({refusal})"
    _gather(handle)  # a rank that was refused is noticed here, not by waiting for it on the GPU
    _joined = kernels
    return f"sums of {world_size} ranks' GPUs: through {way}"


def check_gpus() -> None:
    """Returns at once, if all went well between the GPUs, or there is no group of them; asked after a step's results.

    Raises:
        ValueError: a wait for another rank took too long, or the ranks called different operators or sizes: what the
            step computed is of no use.
    """
    if _joined is None or (status := _joined.pm_cuda_group_status()) == 0:
        return
    raise ValueError(f"{LOST}: {_last_error(_joined)}" if status == PEER_LOST else _last_error(_joined))


def _map_memory(kernels: ctypes.CDLL, handle: np.ndarray, timeout_s: float) -> str:
    """Opens the group by CUDA IPC; why that cannot be, the same on every rank, or nothing.

    Mapping and sharing are tried, not asked for: what cudaDeviceCanAccessPeer says of two GPUs does not tell whether
    two processes, perhaps in containers or a virtual machine, can share their memory.
    """
    kernels.pm_cuda_group_open.argtypes = [ctypes.c_void_p]
    kernels.pm_cuda_group_try.argtypes = [ctypes.c_double]
    handles = _gather(handle)
    return _first_refusal(kernels, kernels.pm_cuda_group_open(handles.ctypes.data)) or _first_refusal(
        kernels, kernels.pm_cuda_group_try(min(timeout_s, _TRIAL_TIMEOUT_S))
    )


def _first_refusal(kernels: ctypes.CDLL, status: int) -> str:
    """Of the ranks' statuses of a call, the text of the first that is not 0."""
    texts = _gather_texts("" if status == 0 else _last_error(kernels))
    return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), "")


def _connect_nccl(kernels: ctypes.CDLL, library: Path | None, why: str, timeout_s: float) -> str:
    """Opens the group by NCCL; its version."""
    library = library or _find_nccl()
    kernels.pm_cuda_nccl_load.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int)]
    kernels.pm_cuda_nccl_id.argtypes = [ctypes.c_void_p]
    kernels.pm_cuda_group_open_nccl.argtypes = [ctypes.c_void_p, ctypes.c_double]
    code = ctypes.c_int()
    if kernels.pm_cuda_nccl_load(os.fsencode(library), ctypes.byref(code)) != 0:
        raise ValueError(
            f"the GPUs need NCCL ({why}), which cannot be loaded: {_last_error(kernels)}; pip install nvidia-nccl-cu13 "
            "(nvidia-nccl-cu12 where nvidia-smi says CUDA 12), or have the folder of libnccl.so.2 in LD_LIBRARY_PATH"
        )
    nccl_id = np.zeros(NCCL_ID_BYTES, np.uint8)
    if group()[0] == 0:
        _check(kernels, kernels.pm_cuda_nccl_id(nccl_id.ctypes.data))
    ids = _gather(nccl_id)
    _check(kernels, kernels.pm_cuda_group_open_nccl(ids.ctypes.data, timeout_s))  # the first is rank 0's
    major, minor, patch = code.value // 10000, code.value // 100 % 100, code.value % 100
    return f"{major}.{minor}.{patch}" if major else str(code.value)  # before 2.9 numbered otherwise


def _find_nccl() -> Path:
    """NCCL of the package from PyPI, which the loader does not look for; else what the loader finds, or has loaded."""
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # of nvidia
        package = None
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(folder) / "lib" / NCCL_FILE).exists():
            return file
    return Path(NCCL_FILE)


def _gather_texts(text: str) -> list[str]:
    """Every rank's text, in rank order; a long one loses its end."""
    row = np.zeros(_REASON_BYTES, np.uint8)
    given = text.encode()[:_REASON_BYTES]
    row[: len(given)] = np.frombuffer(given, np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in _gather(row)]


def _gather(row: np.ndarray) -> np.ndarray:
    """The bytes [n] of all ranks [world_size, n], in rank order. A gather only copies, so they may pass as float32."""
    world_size = group()[1]
    mine = paddle.to_tensor(row.view(np.float32)[None], place=paddle.CPUPlace())
    return all_gather(mine, world_size).numpy().view(np.uint8).reshape(world_size, -1)


def _check(kernels: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise ValueError(f"rank {group()[0]} cannot join its GPU to the other ranks': {_last_error(kernels)}")


def _last_error(kernels: ctypes.CDLL) -> str:
    kernels.pm_cuda_kernels.restype = ctypes.c_void_p
    return _Table.from_address(kernels.pm_cuda_kernels()).last_error().decode()
