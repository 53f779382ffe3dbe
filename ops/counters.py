"""What the kernels have done so far, in numbers: their time and the experts they ran."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from paddle.base.core import Place

from ops.device import device_name, device_number
from ops.library import LIBRARY


@dataclass(frozen=True)
class Counters:
    """Running totals of the kernels of the CPU or of a device, or what was added to them between two readings.

    Attributes:
        kernel_s: seconds in each kernel, by its name ("linear", "fused_moe", ...), from call to return; of a device's,
            which run one after another without the CPU, nothing.
        moe_calls: calls of fused_moe: one a layer and step; on a device, one for every 2,048 tokens of them or fewer.
        experts_hit: experts with at least one token, summed over those calls.
        busiest_tokens: tokens of the busiest expert, summed over those calls.
    """

    kernel_s: dict[str, float]
    moe_calls: int
    experts_hit: int
    busiest_tokens: int

    @staticmethod
    def read(place: Place | None = None) -> "Counters":
        """The totals now: of the CPU (None), or of a device, once it has done all it was given.

        Raises:
            ValueError: the device has failed.
        """
        counts = [ctypes.c_int64() for _ in range(3)]
        if place is None:
            LIBRARY.pm_cpu_expert_counts(*map(ctypes.byref, counts))
            return Counters(dict(_kernel_times()), *(c.value for c in counts))
        kind = place.custom_device_type().encode() if place.is_custom_place() else b""
        status = LIBRARY.pm_device_expert_counts(kind, device_number(place), *map(ctypes.byref, counts))
        if status != 0:
            raise ValueError(f"{device_name(place)}: its counts of experts cannot be read (status {status})")
        return Counters({}, *(c.value for c in counts))

    def since(self, earlier: "Counters") -> "Counters":
        """What was added after ``earlier``; kernels that were not called are left out."""
        added = {name: total - earlier.kernel_s[name] for name, total in self.kernel_s.items()}
        return Counters(
            {name: seconds for name, seconds in added.items() if seconds > 0},
            self.moe_calls - earlier.moe_calls,
            self.experts_hit - earlier.experts_hit,
            self.busiest_tokens - earlier.busiest_tokens,
        )


def _kernel_times() -> Iterator[tuple[str, float]]:
    name, calls, nanoseconds, index = ctypes.c_char_p(), ctypes.c_int64(), ctypes.c_int64(), 0
    while LIBRARY.pm_cpu_kernel_time(index, ctypes.byref(name), ctypes.byref(calls), ctypes.byref(nanoseconds)):
        yield (name.value or b"").decode(), nanoseconds.value / 1e9
        index += 1
