"""What a test module's digest() is on each instruction set this processor has."""

import os
import subprocess
import sys
from pathlib import Path


def digests(module: str) -> dict[str, str]:
    """``module.digest()``, evaluated in one process per instruction set, all at once."""
    flags = Path("/proc/cpuinfo").read_text()
    isas = ["baseline", *(["avx2"] if " avx2 " in flags else []), *(["avx512"] if " avx512vl " in flags else [])]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    running = {
        isa: subprocess.Popen(
            [sys.executable, "-c", f"import {module}; print({module}.digest())"],
            env={**os.environ, "PADDLE_MIXTRAL_ISA": isa, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa in isas
    }
    return {isa: process.communicate()[0].split()[-1] for isa, process in running.items()}
