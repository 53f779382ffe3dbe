"""How nvcc builds the CUDA kernels: for setup.py, the tests and the scripts that run on a GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MISSING = "nvcc is not in CUDA_HOME, on the PATH nor in /usr/local/cuda; install the CUDA toolkit, or set NVCC"
KERNELS = Path(__file__).resolve().parent / "kernels" / "cuda"

# -fmad=false: a fused multiply-add is only ever what __fmaf_rn says; that a row's bits do not depend on its launch, and
# integer products agree with the CPU's, rests on it.
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
STRICT = ["-Werror", "all-warnings"]
HOST_FLAGS = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]

# Which architectures the library is built for; semicolons between them, empty for none.
ARCHITECTURES_VARIABLE = "PADDLE_MIXTRAL_CUDA_ARCHS"
DEFAULT_ARCHITECTURES = "80;90a"


def code_for(architectures: list[str]) -> list[str]:
    """nvcc's flags for machine code of each, and of those that have successors PTX, which later GPUs compile."""
    return [
        f"-gencode=arch=compute_{a},code=" + (f"sm_{a}" if a[-1].isalpha() else f"[sm_{a},compute_{a}]")
        for a in architectures
    ]


# What is shipped: machine code of A100 and H100, and PTX of the first for every later GPU.
SHIPPED = code_for(DEFAULT_ARCHITECTURES.split(";"))
# The GPU of this machine alone.
NATIVE = ["-arch=native"]


def find() -> str | None:
    """nvcc of $NVCC, $CUDA_HOME, $CUDA_PATH, the PATH or /usr/local/cuda, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    installed = [f"{home}/bin/nvcc" for home in homes]
    candidates = [os.environ.get("NVCC"), *installed, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


@dataclass(frozen=True)
class Folders:
    """Where a toolkit has its headers and its libraries."""

    include: list[str]
    libraries: list[str]


def folders() -> Folders:
    """Those of the nvcc that was found, as it states them itself; none where there is no nvcc."""
    if find() is None:
        return Folders([], [])
    command = [_nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def stated(names: str, flags: str) -> list[str]:
        lines = re.findall(rf"^#\$ (?:{names})=(.*)$", said, re.MULTILINE)
        return re.findall(rf'"(?:{flags})([^"]+)"', " ".join(lines))

    return Folders(stated("INCLUDES|SYSTEM_INCLUDES", '-I|-isystem" "'), stated("LIBRARIES", "-L"))


def wanted_architectures() -> list[str]:
    """Those the library is to be built for; none where there is no nvcc and nobody has asked for any.

    Raises:
        ValueError: the variable is malformed, or asks for some where there is no nvcc.
    """
    asked = os.environ.get(ARCHITECTURES_VARIABLE)
    wanted = [a for a in (DEFAULT_ARCHITECTURES if asked is None else asked).split(";") if a]
    for architecture in wanted:
        if not re.fullmatch(r"\d{2,3}[af]?", architecture) or int(architecture.rstrip("af")) < 80:
            raise ValueError(
                f"{ARCHITECTURES_VARIABLE} is '{asked}', needs numbers from 80 on, such as {DEFAULT_ARCHITECTURES}"
            )
    if find() is not None:
        return wanted
    if asked and wanted:
        raise ValueError(
            f"{ARCHITECTURES_VARIABLE} asks for CUDA kernels ({asked}), but {MISSING}; or leave the variable unset for "
            "the CPU alone"
        )
    return []


def sources() -> list[Path]:
    """The kernels' files, in a fixed order."""
    return sorted(KERNELS.glob("*.cu"))


def compile_command(source: Path, target: Path, architectures: list[str], strict: bool = True) -> list[str]:
    """One source to one object, warnings being errors if ``strict``; FileNotFoundError where there is no nvcc."""
    flags = [*FLAGS, *(STRICT if strict else []), *HOST_FLAGS, *architectures]
    return [_nvcc(), *flags, "-c", str(source), "-o", str(target)]


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
        raise FileNotFoundError(MISSING)
    return path
