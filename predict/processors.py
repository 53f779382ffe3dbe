"""How many processors this process may use: what the kernels' threads are by default."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def processors(cgroups: Path = CGROUPS) -> int:
    """Those it may run on, or as many as its control group's time is worth where that is fewer (``docker --cpus 2``).

    More threads than that would be stopped together for the rest of every period. A part of a processor counts as one.
    """
    allowed = len(os.sched_getaffinity(0))
    for limit in (_version_2, _version_1):
        try:
            quota, period = limit(cgroups)
        except (OSError, ValueError):  # another version of control groups, or "max": no limit
            continue
        if quota > 0:  # version 1 says -1 where there is no limit
            return min(allowed, math.ceil(quota / period))
    return allowed


def _version_2(cgroups: Path) -> tuple[int, int]:
    quota, period = (cgroups / "cpu.max").read_text().split()
    return int(quota), int(period)


def _version_1(cgroups: Path) -> tuple[int, int]:
    quota, period = (int((cgroups / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return quota, period
