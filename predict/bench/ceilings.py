"""What a machine can do at best, measured again whenever it is asked for: of the CPU, or of a GPU."""

from time import perf_counter
from typing import Protocol

from paddle.base.core import Place

from ops.device import copy_on_device, device_memory, device_number, is_cuda, synchronize
from ops.matrix import MatrixUnit, units
from ops.memory import MemoryReader
from predict.bench.matmul import MatmulRate
from predict.bench.plan import Plan
from predict.model.memory import empty_on_device
from predict.model.mixtral import QUANT_TYPES

READ_BYTES = 1 << 29  # at real sizes, the steps between two readings have driven all of it from the caches
COPIED_BYTES, COPIES = 1 << 30, 8  # so many, that what a launch and a wait take is no part of it
# The units whose products a kernel for these weights could be made of.
UNITS_OF = {
    "float32": ("float32",),
    "bfloat16": ("float32", "avx512_bf16", "amx_bf16"),
    **dict.fromkeys(QUANT_TYPES, ("float32", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")),
}
GPU_UNIT = "bf16_matmul"


class Ceilings(Protocol):
    """Every reading so far.

    Attributes:
        memory_kind: what was done to memory: "read" or "copy" (bytes read and bytes written both count).
        memory: bytes a second.
        matrix: operations a second of each matrix unit, by its name.
        unit: the unit that operations are held against; None where none could be measured.
        missing: why not, as a sentence; else "".
        buffer_bytes: of the host's memory, for the measurement.
    """

    memory_kind: str
    memory: list[float]
    matrix: dict[str, list[float]]
    missing: str
    buffer_bytes: int

    @property
    def unit(self) -> str | None: ...

    def now(self) -> tuple[float, float | None]:
        """Bytes and (of ``unit``) operations per second the machine is capable of at this moment."""
        ...

    def every_unit(self) -> None:
        """Adds a reading of memory and every matrix unit."""
        ...

    def close(self) -> None:
        """Gives back what measuring needs."""
        ...


class CpuCeilings:
    """Of the processor, by the kernels' own threads and instructions."""

    memory_kind, missing = "read", ""

    def __init__(self, plan: Plan):
        self.buffer_bytes = READ_BYTES
        self._reader = MemoryReader(READ_BYTES)
        self._units = {name: MatrixUnit(name) for name in units()}
        self.memory: list[float] = []
        self.matrix: dict[str, list[float]] = {name: [] for name in self._units}
        self.every_unit()
        usable = [n for n in UNITS_OF[plan.quant_type or plan.dtype] if n in self._units]
        #: the fastest for these weights
        self.unit = max(usable, key=lambda name: self.matrix[name][0])

    def now(self) -> tuple[float, float | None]:
        self.memory.append(self._reader.bandwidth())
        self.matrix[self.unit].append(self._units[self.unit].rate())
        return self.memory[-1], self.matrix[self.unit][-1]

    def every_unit(self) -> None:
        self.memory.append(self._reader.bandwidth())
        for name, unit in self._units.items():
            self.matrix[name].append(unit.rate())

    def close(self) -> None:
        self._units.clear()


class DeviceCeilings:
    """Of a GPU: copies within its memory, and a library's product of matrices of bfloat16."""

    memory_kind, buffer_bytes = "copy", 0

    def __init__(self, place: Place):
        self.place = place
        self.memory: list[float] = []
        free = device_memory(place)[1]
        self._buffers = [empty_on_device([min(COPIED_BYTES, free // 8)], "uint8", place) for _ in range(2)]
        self._copy()  # the first one takes longer
        self._matmul = MatmulRate(device_number(place)) if is_cuda(place) else None
        self.missing = "this device is no NVIDIA GPU" if self._matmul is None else self._matmul.missing or ""
        self.unit: str | None = None if self.missing else GPU_UNIT
        self.matrix: dict[str, list[float]] = {} if self.unit is None else {self.unit: []}
        self.every_unit()

    def now(self) -> tuple[float, float | None]:
        self.memory.append(self._copy())
        if self.unit is None or self._matmul is None:
            return self.memory[-1], None
        self.matrix[self.unit].append(self._matmul.rate())
        return self.memory[-1], self.matrix[self.unit][-1]

    def every_unit(self) -> None:
        self.now()

    def close(self) -> None:
        self._buffers.clear()
        if self._matmul is not None:
            self._matmul.close()

    def _copy(self) -> float:
        source, target = self._buffers
        synchronize(self.place)
        started = perf_counter()
        for _ in range(COPIES):
            copy_on_device(self.place, target.data_ptr(), source.data_ptr(), source.size)
        synchronize(self.place)
        return 2 * COPIES * source.size / (perf_counter() - started)
