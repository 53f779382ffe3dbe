"""The table of a device's kernels (ops/csrc/kernels/include/device.h) for Python: one callable an entry."""

import ctypes
from collections.abc import Callable
from pathlib import Path

F32, BF16, F16, I8 = range(4)
STATUSES = ("PM_OK", "PM_OUT_OF_MEMORY", "PM_PEER_LOST", "PM_NOT_CONNECTED", "PM_NOT_FINITE", "PM_RANKS_DISAGREE")
STATUSES += ("PM_UNSUPPORTED", "PM_LAUNCH_FAILED")

P, D, N, F, W = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double
# name: (result, parameters), in the table's order; D also stands for pm_dtype.
ENTRIES: dict[str, tuple[type, list]] = {
    "last_error": (ctypes.c_char_p, []),
    "rms_norm": (D, [P, P, P, P, P, P, D, N, N, F, P]),
    "embedding": (D, [P, P, D, P, N, N, N, P]),
    "linear_workspace": (N, [D, N, N, N]),
    "linear": (D, [P, D, P, D, P, D, P, D, N, N, N, P, P]),
    "fused_moe_workspace": (N, [D, N, N, N, N, N]),
    "fused_moe": (D, [P, D, P, P, P, D, P, P, D, P, N, N, N, N, N, P, P]),
    "append_attention_workspace": (N, [N] * 7),
    "append_attention": (D, [P, D, P, P, P, P, P, P, N, N, N, N, N, N, N, W, N, F, P, P]),
    "sample_workspace": (N, [N, N]),
    "sample": (D, [P] * 12 + [N, N, P, P]),
    "all_reduce": (D, [P, P, N, P]),
    "all_gather": (D, [P, P, N, N, P]),
    "expert_counts": (D, [P, P, P]),
}


class _Table(ctypes.Structure):
    _fields_ = (
        ("abi_version", ctypes.c_int),
        ("name", ctypes.c_char_p),
        *((name, ctypes.CFUNCTYPE(result, *parameters)) for name, (result, parameters) in ENTRIES.items()),
    )


class KernelError(RuntimeError):
    """A kernel's call returned a status other than PM_OK."""


class Kernels:
    """pm_cuda_kernels() of the library at ``path``: kernels.linear(...) and so on; a status is an exception.

    Raises:
        KernelError: the library has no CUDA kernels.
    """

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.pm_cuda_kernels.restype = ctypes.POINTER(_Table)
        table = self.library.pm_cuda_kernels()
        if not table:
            raise KernelError(f"{path} was built without CUDA")
        self.table = table.contents

    def __getattr__(self, name: str) -> Callable:
        function = getattr(self.table, name)
        if ENTRIES[name][0] is not D:
            return function

        def call(*arguments) -> None:
            status = function(*arguments)
            if status:
                raise KernelError(f"{name}: {STATUSES[status]}: {self.text()}")

        return call

    def text(self) -> str:
        """Of this thread's last failed call."""
        return self.table.last_error().decode()
