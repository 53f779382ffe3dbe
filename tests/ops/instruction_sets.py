"""What a test module's digest() is on each instruction set this processor has."""

import os
import subprocess
import sys
from pathlib import Path

# What /proc/cpuinfo calls the least that each needs; every x86-64 has the baseline.
NEEDED = {
    "baseline": "",
    "avx2": " avx2 ",
    "avx512": " avx512vl ",
    "avx512_vnni": " avx512_vnni ",
    "amx": " amx_int8 ",
}


def available() -> list[str]:
    """The instruction sets of this processor; says which are left out."""
    flags = Path("/proc/cpuinfo").read_text()
    found = [isa for isa, flag in NEEDED.items() if flag in flags]
    for isa in NEEDED.keys() - found:
        print(f"not compared: this processor has no {isa}")
    return found


def digests(module: str, isas: list[str] | None = None, environment: dict[str, str] | None = None) -> dict[str, str]:
    """``module.digest()``, evaluated in one process per instruction set (None: all there are), all at once."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    running = {
        isa: subprocess.Popen(
            [sys.executable, "-c", f"import {module}; print({module}.digest())"],
            env={**os.environ, "PADDLE_MIXTRAL_ISA": isa, "PYTHONPATH": path, **(environment or {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa in isas or available()
    }
    return {isa: process.communicate()[0].split()[-1] for isa, process in running.items()}
