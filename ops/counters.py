"""What the kernels have done so far, in numbers: their time and the experts they ran."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from ops.library import LIBRARY


@dataclass(frozen=True)
class Counters:
    """Running totals of this process, or what was added to them between two readings.

    Attributes:
        kernel_s: seconds in each kernel, by its name ("linear", "fused_moe", ...), from call to return.
        moe_calls: calls of fused_moe: one a layer and step.
        experts_hit: experts with at least one token, summed over those calls.
        busiest_tokens: tokens of the busiest expert, summed over those calls.
    """

    kernel_s: dict[str, float]
    moe_calls: int
    experts_hit: int
    busiest_tokens: int

    @staticmethod
    def read() -> "Counters":
        """The totals now."""
        calls, hit, busiest = (ctypes.c_int64() for _ in range(3))
        LIBRARY.pm_cpu_expert_counts(ctypes.byref(calls), ctypes.byref(hit), ctypes.byref(busiest))
        return Counters(dict(_kernel_times()), calls.value, hit.value, busiest.value)

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
