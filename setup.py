"""Builds the operators: kernels once per instruction set, bindings once, all into ops/libpaddle_mixtral.so."""

import importlib.metadata
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_KERNELS = ROOT / "ops" / "csrc" / "kernels" / "cpu"
BINDINGS = ROOT / "ops" / "csrc" / "paddle"

# The vector kernels are compiled once for each; the others (no F32x16 in them) for the baseline alone.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
BASELINE_ONLY = {"runtime.cc", "collective.cc", "counters.cc"}
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off"]
# gcc 12's own AVX-512 headers trip -Wmaybe-uninitialized. Warnings are errors where we build (the Makefile sets the
# variable), not on a user's machine with a compiler we have not seen.
KERNEL_FLAGS = [*COMMON_FLAGS, "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
if os.environ.get("PADDLE_MIXTRAL_WERROR"):
    KERNEL_FLAGS.append("-Werror")
# Paddle's own headers do not compile without warnings, so the bindings cannot ask for -Werror.
BINDING_FLAGS = [*COMMON_FLAGS, "-w", "-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_NO_PYTHON"]

DEPENDENCIES = [
    "paddlenlp==2.8.1",
    "huggingface_hub<1",
    "aistudio_sdk<0.3",
    "datasets<4",
    "pyarrow<20",
    "sentencepiece>=0.2",
    "numpy>=1.26",
    "safetensors>=0.5",
    "jinja2>=3.1",
    "tqdm>=4.66",
    "fastapi>=0.135",
    "uvicorn>=0.30",
    "pydantic>=2.10",
    "prometheus-client>=0.20",
]


def paddle_requirement() -> list[str]:
    """paddlepaddle 3.3.1, unless the environment already has paddlepaddle-gpu, which must stay as it is."""
    site_packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    installed = {d.name for d in importlib.metadata.distributions(path=[p for p in site_packages if p])}
    return [] if "paddlepaddle-gpu" in installed else ["paddlepaddle==3.3.1"]


class BuildOperators(build_ext):
    """Compiles each source under its own flags and links one shared library that Paddle loads."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, extension: Extension) -> None:
        import paddle

        include = paddle.sysconfig.get_include()
        libraries = [paddle.sysconfig.get_lib(), str(Path(paddle.__file__).parent / "base")]
        jobs = []
        for source in sorted(BINDINGS.glob("*.cc")):
            jobs.append((source, Path("paddle"), [*BINDING_FLAGS, f"-I{include}", f"-I{include}/third_party"]))
        for source in sorted(CPU_KERNELS.glob("*.cc")):
            variants = {"baseline": []} if source.name in BASELINE_ONLY else ISA_FLAGS
            jobs += [(source, Path("kernels") / isa, [*KERNEL_FLAGS, *flags]) for isa, flags in variants.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self._compile(*job), jobs))
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            extra_postargs=["-fopenmp", "-lrt", *[f"-L{p}" for p in libraries], "-l:libpaddle.so"],
            target_lang="c++",
        )

    def _compile(self, source: Path, folder: Path, flags: list[str]) -> str:
        """Compiles one file into its own folder, unless the object is newer than the source and every header it may
        include: those beside it and the C ABI's."""
        target = Path(self.build_temp) / folder / f"{source.stem}.o"
        headers = [*source.parent.glob("*.h"), *(CPU_KERNELS.parent / "include").glob("*.h")]
        newest = max(p.stat().st_mtime for p in [source, ROOT / "setup.py", *headers])
        if not target.exists() or target.stat().st_mtime <= newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn(["g++", *flags, "-c", str(source), "-o", str(target)])
        return str(target)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("ops.libpaddle_mixtral", sources=[])],
        cmdclass={"build_ext": BuildOperators},
        install_requires=[*paddle_requirement(), *DEPENDENCIES],
    )
