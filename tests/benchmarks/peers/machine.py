"""The machine: its name, its memory's read rate, and how busy others keep it."""

import os
import platform
import statistics
import time
from pathlib import Path

from ops import library
from ops.memory import MemoryReader

PASSES = 5
BUSY_S = 1.0


class Machine:
    """Measured between the peers' runs, while none of them is running."""

    def __init__(self, threads: int):
        library.set_num_threads(threads)
        self.threads = threads
        self.reader = MemoryReader()

    def bandwidth(self) -> float:
        """Bytes per second: median of a few passes over half a GiB."""
        return statistics.median(self.reader.bandwidth() for _ in range(PASSES))

    def busy(self) -> float:
        """The share of all processors' time that was in use during a second: by others, as nothing of ours runs."""
        before = _processor_times()
        time.sleep(BUSY_S)
        idle, total = (after - now for after, now in zip(_processor_times(), before, strict=True))
        return 1 - idle / total

    def describe(self) -> dict[str, str]:
        """What a reader needs to know of it."""
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        said = {name.strip(): value.strip() for name, _, value in lines}  # of the last processor, as of all
        flags = said["flags"].split()
        interesting = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {
            "processor": said.get("model name", platform.machine()),
            "processors": str(os.cpu_count()),
            "instruction sets": " ".join(flag for flag in interesting if flag in flags),
            "our kernels": library.cpu_isa(),
            "memory": f"{memory / 1e9:.1f} GB",
            "threads": str(self.threads),
        }


def _processor_times() -> tuple[int, int]:
    """(idle, all) clock ticks of all processors since the start, iowait counted as idle."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
