"""The GPU beside the CPU: through paddlepaddle-gpu where that is what is installed, else through our own CustomDevice
runtime (ops/csrc/device), with which the Paddle for CPUs drives one.

Operators run where their tensors are; a place from here is what puts tensors on the GPU.
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import paddle
from paddle.base.core import Place, get_custom_device_count

from ops import DEVICE_RUNTIME
from ops.library import ABI_VERSION, LIBRARY

BUILD = "install the CUDA toolkit and build again with `pip install .` (README: NVIDIA GPUs), or use --device cpu"

CUDA_TYPE = "pm_cuda"  # as ops/csrc/device/cuda.cc names it to Paddle

LIBRARY.pm_cuda_kernels.restype = ctypes.c_void_p
LIBRARY.pm_register_device.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
LIBRARY.pm_register_device.restype = None


@dataclass(frozen=True)
class Runtime:
    """A loaded CustomDevice runtime of ours whose kernels are registered.

    Attributes:
        name: of the type of device at Paddle.
        plugin: its library (ops/csrc/device/plugin.h).
    """

    name: str
    plugin: ctypes.CDLL

    def copies(self) -> tuple[int, int, int]:
        """Copies so far: host to device, device to host, device to device."""
        counts = [ctypes.c_int64() for _ in range(3)]
        self.plugin.pm_plugin_copies(*map(ctypes.byref, counts))
        h2d, d2h, d2d = (c.value for c in counts)
        return h2d, d2h, d2d


def gpu_place(rank: int = 0) -> Place:
    """The GPU of a rank, number rank % gpu_count() of those that CUDA_VISIBLE_DEVICES shows.

    Raises:
        ValueError: there is none, or no kernels for it; says how to get them.
    """
    cuda = paddle.is_compiled_with_cuda()
    if cuda and not LIBRARY.pm_cuda_kernels():
        raise ValueError(f"the operators were built without CUDA kernels; {BUILD}")
    if (count := gpu_count()) == 0:
        raise ValueError("this machine shows no NVIDIA GPU (see nvidia-smi, CUDA_VISIBLE_DEVICES); use --device cpu")
    place, number = Place(), rank % count
    place.set_place(paddle.CUDAPlace(number) if cuda else paddle.CustomPlace(runtime().name, number))
    return place


def gpu_count() -> int:
    """The GPUs this process sees."""
    cuda = paddle.is_compiled_with_cuda()
    return paddle.device.cuda.device_count() if cuda else get_custom_device_count(runtime().name)


def ranks_sharing(place: Place, world_size: int) -> int:
    """How many of a job's ranks have this GPU: those of gpu_place()."""
    return len(range(device_number(place), world_size, gpu_count()))


def device_number(place: Place) -> int:
    """The number of a GPU's place among the GPUs this process sees."""
    return place.custom_device_id() if place.is_custom_place() else place.gpu_device_id()


def is_cuda(place: Place) -> bool:
    """Whether a GPU's place is one of CUDA's, not of another runtime."""
    return place.is_gpu_place() or place.custom_device_type() == CUDA_TYPE


def device_name(place: Place) -> str:
    """As in "pm_cuda:0"."""
    return str(place).removeprefix("Place(").removesuffix(")")


def device_memory(place: Place) -> tuple[int, int]:
    """Bytes of a GPU's memory: all, and those nobody holds."""
    total, free = ctypes.c_int64(), ctypes.c_int64()
    _call(place, "memory", ctypes.byref(total), ctypes.byref(free))
    return total.value, free.value


def device_model(place: Place) -> str:
    """What a GPU is called, such as "NVIDIA H200"."""
    name = ctypes.create_string_buffer(256)
    _call(place, "name", name, len(name))
    return name.value.decode()


def copy_on_device(place: Place, to: int, source: int, num_bytes: int) -> None:
    """Enqueues a copy of bytes from one address of a GPU's memory to another.

    Paddle's own work may run on other streams: whoever copies what that reads or writes calls :func:`synchronize`
    first, and again before that work is given the result.
    """
    _call(place, "copy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_int64(num_bytes))


def synchronize(place: Place) -> None:
    """Returns when a GPU has done all it was given."""
    _call(place, "synchronize")


def _call(place: Place, function: str, *arguments) -> None:
    """pm_plugin_``function`` of ops/csrc/device/plugin.h, on the device of a place."""
    plugin = runtime().plugin if place.is_custom_place() else ctypes.CDLL(str(DEVICE_RUNTIME / "libpm_cuda.so"))
    if getattr(plugin, f"pm_plugin_{function}")(device_number(place), *arguments) != 0:
        raise ValueError(f"{device_name(place)}: pm_plugin_{function} failed; the line before says why")


@functools.cache
def runtime() -> Runtime:
    """The runtime Paddle has loaded, its kernels registered.

    Raises:
        ValueError: there is none, or it was built with other operators; says how to get one.
    """
    root = Path(os.environ.get("CUSTOM_DEVICE_ROOT") or DEVICE_RUNTIME)
    found = sorted(root.glob("libpm_*.so"))
    if not found:
        raise ValueError(f"there is no CUDA runtime in {root}: it was built without nvcc; {BUILD}")
    plugin = ctypes.CDLL(str(found[0]))
    plugin.pm_plugin_device_type.restype = ctypes.c_char_p
    plugin.pm_plugin_kernels.restype = ctypes.POINTER(ctypes.c_int)
    name = plugin.pm_plugin_device_type().decode()
    if name not in paddle.device.get_all_custom_device_type():
        if not os.environ.get("CUSTOM_DEVICE_ROOT"):
            raise ValueError("this machine has no NVIDIA GPU, or no driver for it; use --device cpu")
        raise ValueError(
            f"Paddle was imported before it could be told of {found[0]}; import ops or predict before paddle, or set "
            f"CUSTOM_DEVICE_ROOT={root}"
        )
    kernels = plugin.pm_plugin_kernels(ctypes.c_void_p(LIBRARY._handle))
    if not kernels:
        raise ValueError(f"the operators were built without kernels for {found[0].name}; {BUILD}")
    if kernels[0] != ABI_VERSION:
        raise ValueError(f"{found[0]} has operator ABI {kernels[0]}, the operators have {ABI_VERSION}; {BUILD}")
    LIBRARY.pm_register_device(name.encode(), ctypes.cast(kernels, ctypes.c_void_p))
    return Runtime(name, plugin)
