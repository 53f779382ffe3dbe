"""This machine and this process, as Linux tells them."""

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's name."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Bytes of memory this process held at the most since it started, or since forget_peak()."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def forget_peak() -> None:
    """From here on, peak_memory() is that of what follows (where the system refuses, it stays that of everything)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    except OSError:
        return
