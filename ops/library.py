"""The compiled operators: found, checked and registered with Paddle once per process."""

import ctypes
import os
from pathlib import Path

import paddle
from paddle import _C_ops

from ops import DEVICE_RUNTIME

PATH = Path(__file__).resolve().parent / "libpaddle_mixtral.so"
MAX_THREADS = 1024  # OpenMP crashes the process where the system refuses it a thread
ABI_VERSION = 6  # PM_OPS_ABI_VERSION of ops/csrc/kernels/include/common.h


class OperatorLibraryError(RuntimeError):
    """The compiled operators are missing, of another version, or cannot run here."""


def _load() -> ctypes.CDLL:
    if not PATH.exists():
        raise OperatorLibraryError(
            f"{PATH} does not exist: the operators have not been built; run `pip install .` in the source folder"
        )
    try:
        paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(PATH))
        library = ctypes.CDLL(str(PATH))
    except (OSError, RuntimeError) as error:
        raise OperatorLibraryError(
            f"{PATH.name} cannot be loaded into paddle {paddle.__version__}: {error}; it was built for another Paddle: "
            "build it again with `pip install --no-build-isolation --no-deps --force-reinstall .`"
        ) from error
    library.pm_cpu_isa.restype = ctypes.c_char_p
    if library.pm_ops_abi_version() != ABI_VERSION:
        raise OperatorLibraryError(
            f"{PATH.name} has operator ABI {library.pm_ops_abi_version()}, this Python code needs {ABI_VERSION}: "
            "build it again with `pip install .`"
        )
    if library.pm_cpu_isa() is None:
        raise OperatorLibraryError(
            f"PADDLE_MIXTRAL_ISA is '{os.environ['PADDLE_MIXTRAL_ISA']}', which this processor or build does not have; "
            "use amx, avx512_vnni, avx512, avx2 or baseline, or leave it unset"
        )
    return library


LIBRARY = _load()
if os.environ.get("CUSTOM_DEVICE_ROOT") == str(DEVICE_RUNTIME):
    paddle.set_device("cpu")  # the default is a plug-in's device otherwise, and we brought the plug-in


def run(op: str, *arguments):
    """Calls the registered operator ``op``, eager or while tracing; returns the list of its outputs.

    Raises:
        ValueError: a binding refused its arguments; the message says what it found and what it needs.
    """
    try:
        return _C_ops._run_custom_op(op, *arguments)  # type: ignore[attr-defined]
    except OSError as error:  # what Paddle makes of a binding's PD_THROW
        raise ValueError(str(error).partition("\n")[0]) from None


def cpu_isa() -> str:
    """The instruction set the CPU kernels use: "amx", "avx512_vnni", "avx512", "avx2" or "baseline"."""
    return LIBRARY.pm_cpu_isa().decode()


def num_threads() -> int:
    """Threads each CPU kernel may use."""
    return LIBRARY.pm_num_threads()


def set_num_threads(n: int) -> None:
    """Sets the threads each CPU kernel may use (results do not depend on it).

    Raises:
        ValueError: n is not in 1 .. 1024.
    """
    if not 1 <= n <= MAX_THREADS:
        raise ValueError(f"threads is {n}, needs 1 to {MAX_THREADS}; the processors of the machine are a good number")
    LIBRARY.pm_set_num_threads(n)
