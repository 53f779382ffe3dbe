"""CUDA sources compiled by g++ to run on this processor: simt.h says what the emulation is and is strict about."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "cuda_emulation"
KERNELS = ROOT / "ops" / "csrc" / "kernels"

FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fsanitize=alignment,shift", "-fsanitize-undefined-trap-on-error"),  # a misaligned vector access is a trap
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-psabi"),
    *("-DPM_EMULATE", f"-I{HERE}"),
]

# (order, late): simt.h. Every result must be the same in all of them.
FORWARD, REVERSE, SHUFFLED = (0, 0), (1, 1), (2, 1)
MODES = {"forward": FORWARD, "reverse": REVERSE, "shuffled": SHUFFLED}

# The GPUs that can be emulated, by the major number of their compute capability: what shared memory a block may have.
GPUS = {"sm_80": 8, "sm_90a": 9}


# What a thread does not set is neither zero nor a number.
FLAGS_OF_GCC_12 = ["-ftrivial-auto-var-init=pattern"]


def build(name: str, sources: list[Path]) -> Path:
    """`sources` and the emulation as one library build/cuda_emulation/`name`.so; up-to-date objects stay."""
    headers = [*HERE.glob("*.h"), *KERNELS.glob("cuda/*.cuh"), *KERNELS.glob("cuda/*.h"), *KERNELS.glob("include/*.h")]
    newest_header = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
    version = subprocess.run(["g++", "-dumpversion"], check=True, capture_output=True, text=True).stdout
    flags = FLAGS + (FLAGS_OF_GCC_12 if int(version.split(".")[0]) >= 12 else [])
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        if not made.exists() or made.stat().st_mtime <= max(newest_header, source.stat().st_mtime):
            unfinished = made.with_suffix(f".{os.getpid()}.o")
            subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(unfinished)], check=True)
            unfinished.replace(made)
        return str(made)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, [*sources, *sorted(HERE.glob("*.cc"))]))
    target = FOLDER / f"{name}.so"
    unfinished = target.with_suffix(f".{os.getpid()}.so")
    subprocess.run(["g++", "-shared", "-o", str(unfinished), *objects], check=True)
    unfinished.replace(target)
    return target


class Emulation:
    """A library of build(), its modes and its memory."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.pm_emulation_allocate.restype = ctypes.c_void_p
        self.library.pm_emulation_allocate.argtypes = [ctypes.c_uint64]
        self.library.pm_emulation_free.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.library.pm_emulation_launches.restype = self.library.pm_emulation_waits.restype = ctypes.c_uint64
        self.library.pm_emulation_configure.argtypes = [*[ctypes.c_int] * 2, ctypes.c_uint64, *[ctypes.c_int] * 2]
        self.library.pm_emulation_fail.argtypes = [ctypes.c_uint64]

    def configure(self, mode: tuple[int, int], seed: int = 0, multiprocessors: int = 4, gpu: str = "sm_80") -> None:
        """The order of threads and blocks, the time of copies and the GPU, from the next launch on."""
        self.library.pm_emulation_configure(*mode, seed, multiprocessors, GPUS[gpu])

    @contextmanager
    def only_counting(self) -> Iterator[None]:
        """Launches are counted and held to the GPU's limits, but do not run: pointers may be any."""
        self.library.pm_emulation_run(0)
        try:
            yield
        finally:
            self.library.pm_emulation_run(1)

    def fail(self, launch: int) -> None:
        """Of the launches from now on the `launch`-th, counted from 1, fails; 0: none."""
        self.library.pm_emulation_fail(launch)

    def launches(self) -> int:
        """Kernels launched so far."""
        return self.library.pm_emulation_launches()

    def waits(self) -> int:
        """Calls so far by which the host has waited for the device, or had it allocate."""
        return self.library.pm_emulation_waits()
