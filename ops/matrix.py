"""The processor's rate of multiplying and adding, which bounds prefill."""

import ctypes
import time

from ops.library import LIBRARY, cpu_isa

# pm_matrix_unit of ops/csrc/kernels/include/matrix.h, in its order.
NAMES = ("float32", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
PASS_S = 0.02


def units() -> list[str]:
    """Names of the units this processor offers the kernels' instruction set; "float32" is always among them."""
    return [name for i, name in enumerate(NAMES) if LIBRARY.pm_cpu_has_matrix_unit(i)]


class MatrixUnit:
    """Multiplies and adds in one unit, as fast as the kernels' threads can, on operands that never leave registers.

    Args:
        name: one of units().

    Raises:
        ValueError: no such unit, or this processor lacks it.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"matrix unit is {name!r}, needs one of {', '.join(NAMES)}")
        if name not in units():
            raise ValueError(
                f"this processor has no {name} for the {cpu_isa()} kernels; use one of {', '.join(units())}"
            )
        self.name, self._number, self._rounds = name, NAMES.index(name), 1 << 10
        while (seconds := self._run()[1]) < PASS_S:
            self._rounds *= 2 if seconds > PASS_S / 8 else 8

    def rate(self) -> float:
        """Operations (a multiply-add is two) per second of one pass of some 20 ms, all threads together."""
        operations, seconds = self._run()
        return operations / seconds

    def _run(self) -> tuple[int, float]:
        operations = ctypes.c_int64()
        started = time.perf_counter()
        LIBRARY.pm_cpu_run_matrix_unit(self._number, ctypes.c_int64(self._rounds), ctypes.byref(operations), None)
        return operations.value, time.perf_counter() - started
