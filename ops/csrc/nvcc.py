"""How nvcc builds the CUDA kernels: for setup.py, the tests and the scripts that run on a GPU."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).resolve().parent / "kernels" / "cuda"

# -fmad=false: a fused multiply-add is only ever what __fmaf_rn says; that a row's bits do not depend on its launch, and
# integer products agree with the CPU's, rests on it.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
HOST_FLAGS = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]

# What is shipped: machine code of A100 and H100, and PTX of the first for every later GPU.
SHIPPED = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"]
# The GPU of this machine alone.
NATIVE = ["-arch=native"]


def find() -> str | None:
    """nvcc of $NVCC, the PATH or /usr/local/cuda, or None."""
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def sources() -> list[Path]:
    """The kernels' files, in a fixed order."""
    return sorted(KERNELS.glob("*.cu"))


def compile_command(source: Path, target: Path, architectures: list[str]) -> list[str]:
    """One source to one object; FileNotFoundError where there is no nvcc."""
    return [_nvcc(), *FLAGS, *HOST_FLAGS, *architectures, "-c", str(source), "-o", str(target)]


def build_library(target: Path, architectures: list[str], jobs: int | None = None) -> None:
    """The kernels alone as one shared library with pm_cuda_kernels(), loadable without Paddle; objects beside it.

    Objects newer than their source and every header stay as they are. Raises CalledProcessError where nvcc fails,
    which has printed why.
    """
    headers = [*KERNELS.glob("*.h"), *KERNELS.glob("*.cuh"), *(KERNELS.parent / "include").glob("*.h"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        made = target.parent / f"{source.stem}.o"
        if not made.exists() or made.stat().st_mtime <= max(newest_header, source.stat().st_mtime):
            subprocess.run(compile_command(source, made, architectures), check=True)
        return str(made)

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    subprocess.run([_nvcc(), "-shared", "-cudart", "static", "-o", str(target), *objects], check=True)


def _nvcc() -> str:
    path = find()
    if path is None:
        raise FileNotFoundError("nvcc is not on the PATH nor in /usr/local/cuda; install the CUDA toolkit, or set NVCC")
    return path
