"""What a test module's digest() is on each instruction set this processor has."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ops import reference
from ops.matrix import units

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


def bf16_product() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The reference of products with bfloat16 weights in the order of this process's kernels."""
    return reference.linear_bf16_tiles if "amx_bf16" in units() else reference.linear_bf16


def digests(module: str, isas: list[str] | None = None, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """``module.digest()``, evaluated in one process per instruction set (None: all there are), all at once."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    running = {
        isa: subprocess.Popen(
            [sys.executable, "-c", f"import json, {module}; print(json.dumps({module}.digest()))"],
            env={**os.environ, "PADDLE_MIXTRAL_ISA": isa, "PYTHONPATH": path, **(environment or {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa in isas or available()
    }
    return {isa: json.loads(process.communicate()[0].splitlines()[-1]) for isa, process in running.items()}


def assert_agree(found: dict[str, dict[str, str]]) -> None:
    """That all instruction sets have the same digests, by type of weights.

    All but amx with bfloat16, whose tiles sum up in an order of their own: it has its own reference (bf16_product).
    """
    for dtype in next(iter(found.values())):
        same = {isa: digest[dtype] for isa, digest in found.items() if (isa, dtype) != ("amx", "bfloat16")}
        assert len(set(same.values())) == 1, (dtype, same)
