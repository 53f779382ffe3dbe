"""How the CUDA sources are compiled: for setup.py, and for the tests that look at what comes out."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ARCHS_VARIABLE = "PADDLE_MIXTRAL_CUDA_ARCHS"
DEFAULT_ARCHS = "80;90a"
# No fused multiply-adds but those the sources ask for: results must not depend on what a compiler makes of a line.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
WARNINGS_ARE_ERRORS = ["-Werror", "all-warnings"]


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit.

    Attributes:
        nvcc: its compiler.
        include: folders of its headers.
        libraries: folders of its libraries.
    """

    nvcc: str
    include: list[str]
    libraries: list[str]


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, of PATH, or where the toolkit installs itself; None if there is none."""
    homes = [*filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH"))), None, "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=None if home is None else str(Path(home) / "bin")) for home in homes)
    return next(filter(None, found), None)


def find_toolkit() -> Toolkit | None:
    """The toolkit around that nvcc, as nvcc itself states it; None if there is none."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    include = re.findall(r'"(?:-I|-isystem" ")([^"]+)"', _stated(said.stderr, "INCLUDES|SYSTEM_INCLUDES"))
    return Toolkit(nvcc, include, re.findall(r'"-L([^"]+)"', _stated(said.stderr, "LIBRARIES")))


def _stated(dryrun: str, names: str) -> str:
    """What `nvcc --dryrun` says its variables of these names are."""
    return " ".join(re.findall(rf"^#\$ (?:{names})=(.*)$", dryrun, re.MULTILINE))


def wanted_archs(nvcc_found: bool) -> list[str]:
    """Architectures to compile for, such as ["80", "90a"]; none where there is no nvcc and nobody asked.

    Raises:
        ValueError: PADDLE_MIXTRAL_CUDA_ARCHS is malformed, or asks where there is no nvcc.
    """
    asked = os.environ.get(ARCHS_VARIABLE)
    archs = [a for a in (DEFAULT_ARCHS if asked is None else asked).split(";") if a]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise ValueError(f"{ARCHS_VARIABLE} is '{asked}', needs numbers of 80 or more such as {DEFAULT_ARCHS}")
    if nvcc_found or asked is None:
        return archs if nvcc_found else []
    if archs:
        raise ValueError(
            f"{ARCHS_VARIABLE} asks for CUDA kernels ({asked}), but there is no nvcc in CUDA_HOME, PATH or "
            "/usr/local/cuda; install the CUDA toolkit, or leave the variable unset for the CPU alone"
        )
    return []


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags: code of each architecture; of those that have successors also PTX, which newer GPUs compile."""
    flags = []
    for arch in archs:
        code = f"sm_{arch}" if arch[-1] in "af" else f"[sm_{arch},compute_{arch}]"
        flags += ["-gencode", f"arch=compute_{arch},code={code}"]
    return flags
