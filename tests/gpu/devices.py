"""Where kernels run: a GPU through PyTorch's memory, or this processor through the emulation of CUDA.

A device has `kernels`, `stream`, array(x) and empty(shape, dtype), which give an object with `pointer` and `numpy()`,
and workspace(bytes).
"""

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np

from ops.csrc import nvcc
from tests.gpu.table import Kernels
from tests.ops.cuda_emulation import FOLDER, ROOT, Emulation, build
from tests.ops.emulated_ranks import build_nccl


class Array(Protocol):
    """An array in the device's memory."""

    pointer: int

    def numpy(self) -> np.ndarray:
        """A copy on the host, once the work enqueued before is done."""


class Device(Protocol):
    """A device and its memory."""

    path: Path  # of the kernels' library
    kernels: Kernels
    stream: int | None

    def __init__(self, path: Path | None = None) -> None: ...

    def count(self) -> int:
        """Devices of this kind."""

    def use(self, number: int) -> None:
        """Makes device `number` this one, before anything is on it."""

    def nccl(self) -> str:
        """The library to be taken for NCCL's."""

    def array(self, x: np.ndarray) -> Array: ...

    def empty(self, shape: tuple[int, ...], dtype: type) -> Array: ...

    def workspace(self, bytes: int) -> Array:
        """Memory with other contents at every call."""


class _EmulatedArray:
    """Host memory that ends at a page nothing may touch, full of a pattern that is not a number."""

    def __init__(self, emulation: Emulation, shape: tuple[int, ...], dtype: type) -> None:
        self.emulation, self.shape, self.dtype = emulation, shape, np.dtype(dtype)
        self.bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.pointer = emulation.library.pm_emulation_allocate(self.bytes)

    def view(self) -> np.ndarray:
        buffer = (ctypes.c_char * self.bytes).from_address(self.pointer)
        return np.frombuffer(buffer, self.dtype).reshape(self.shape)

    def numpy(self) -> np.ndarray:
        return self.view().copy()

    def __del__(self) -> None:
        self.emulation.library.pm_emulation_free(self.pointer, self.bytes)


class EmulatedDevice:
    """The kernels compiled by g++ on the emulation of CUDA (tests/ops/cuda_emulation)."""

    name = "emulation"
    stream = None

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or build("kernels", nvcc.sources())
        self.emulation, self.kernels = Emulation(self.path), Kernels(self.path)

    def count(self) -> int:
        return 3  # as many as processes, in fact

    def use(self, number: int) -> None:
        pass

    def nccl(self) -> str:
        self.messages = tempfile.TemporaryDirectory()
        os.environ["NCCL_STAND_IN_FOLDER"] = self.messages.name
        return build_nccl(FOLDER)

    def empty(self, shape: tuple[int, ...], dtype: type) -> _EmulatedArray:
        return _EmulatedArray(self.emulation, shape, dtype)

    def array(self, x: np.ndarray) -> _EmulatedArray:
        made = self.empty(x.shape, x.dtype)
        made.view()[...] = x
        return made

    def workspace(self, bytes: int) -> _EmulatedArray:
        # 256-byte aligned: the end is, so a size that is a multiple begins so.
        return self.empty((-(-bytes // 256) * 256,), np.uint8)


class _TorchArray:
    def __init__(self, tensor, shape: tuple[int, ...], dtype: type) -> None:
        self.tensor, self.shape, self.dtype, self.pointer = tensor, shape, dtype, tensor.data_ptr()

    def numpy(self) -> np.ndarray:
        return self.tensor.cpu().numpy().view(self.dtype).reshape(self.shape)


class TorchDevice:
    """One GPU, its memory and its stream through PyTorch; the kernels compiled by nvcc for this GPU alone."""

    def __init__(self, path: Path | None = None) -> None:
        import torch

        self.path = path or ROOT / "build" / "gpu" / "libpaddle_mixtral_cuda.so"
        if path is None:
            nvcc.build_library(self.path, nvcc.NATIVE)
        self.torch, self.kernels = torch, Kernels(self.path)
        self.name = torch.cuda.get_device_name()
        self.stream = torch.cuda.current_stream().cuda_stream

    def count(self) -> int:
        return self.torch.cuda.device_count()

    def use(self, number: int) -> None:
        self.torch.cuda.set_device(number)
        assert self.kernels.library.pm_cuda_set_device(number) == 0, self.kernels.text()
        self.stream = self.torch.cuda.current_stream().cuda_stream

    def nccl(self) -> str:
        return "libnccl.so.2"  # PyTorch has loaded it

    @property
    def architecture(self) -> str:
        """As nvcc names it: "90a"."""
        major, minor = self.torch.cuda.get_device_capability()
        return f"{major}{minor}" + ("a" if major >= 9 else "")

    def empty(self, shape: tuple[int, ...], dtype: type) -> _TorchArray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        tensor = self.torch.full((size,), 0xFF, dtype=self.torch.uint8, device="cuda")  # not a number
        return _TorchArray(tensor, shape, dtype)

    def array(self, x: np.ndarray) -> _TorchArray:
        bytes_ = x.reshape(-1).view(np.uint8).copy()
        return _TorchArray(self.torch.from_numpy(bytes_).to("cuda"), x.shape, x.dtype)

    def workspace(self, bytes: int) -> _TorchArray:
        return self.empty((bytes,), np.uint8)


def gpu() -> TorchDevice:
    """This machine's GPU; ends the process with one sentence where it lacks one, or what drives it."""
    instead = "; GPU=--emulate (or --emulate) is the dry run that needs none of this"
    try:
        import torch
    except ImportError:
        sys.exit(f"{sys.executable} has no PyTorch: install torch with it, or have make PYTHON=another one{instead}")
    if not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} finds no NVIDIA GPU on this machine{instead}")
    if nvcc.find() is None:
        sys.exit(f"{nvcc.MISSING}{instead}")
    return TorchDevice()
