"""Builds the operators: kernels once per instruction set and for GPUs, bindings once: ops/libpaddle_mixtral.so.

Where nvcc is found also ops/plugins/libpm_cuda.so, by which the Paddle for CPUs drives a GPU. No GPU is needed for it.
"""

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip leaves it out
from ops.csrc import nvcc  # noqa: E402

INCLUDE = ROOT / "ops" / "csrc" / "kernels" / "include"
CPU_KERNELS = ROOT / "ops" / "csrc" / "kernels" / "cpu"
DEVICE = ROOT / "ops" / "csrc" / "device"
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
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
if os.environ.get("PADDLE_MIXTRAL_WERROR"):
    WARNING_FLAGS.append("-Werror")
KERNEL_FLAGS = [*COMMON_FLAGS, *WARNING_FLAGS]
# Paddle's own headers do not compile without warnings, so the bindings cannot ask for -Werror.
BINDING_FLAGS = [*COMMON_FLAGS, "-w", "-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_NO_PYTHON"]

DEPENDENCIES = [
    "paddlenlp==2.8.1",
    "huggingface_hub<1",
    "aistudio_sdk<0.3",
    "datasets<4",
    "pyarrow<20",
    "sentencepiece>=0.2",
    'numpy>=1.26; python_version < "3.12"',
    # What paddlenlp needs there (tool_helpers 0.1.2) takes no later one, which pip finds so late that it goes back to a
    # pandas that has to be compiled, and cannot be.
    'numpy>=1.26,<2; python_version >= "3.12"',
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


Command = Callable[[Path, Path], list[str]]  # of a source and its object
Job = tuple[Path, Path, Command]  # source, object within the build folder, how it is made


class BuildOperators(build_ext):
    """Compiles each source under its own flags and links one shared library that Paddle loads."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, extension: Extension) -> None:
        import paddle

        try:
            archs = nvcc.wanted_architectures()
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        if archs:
            print(f"CUDA kernels for {', '.join(f'sm_{a}' for a in archs)}, by {nvcc.find()}")
        else:
            why = f"{nvcc.ARCHITECTURES_VARIABLE} is empty" if nvcc.find() else nvcc.MISSING
            print(f"no CUDA kernels: {why}")
        cuda = nvcc.folders()
        include = paddle.sysconfig.get_include()
        headers = [f"-isystem{folder}" for folder in (include, f"{include}/third_party", *cuda.include)]
        # nvcc takes longest, so its files come first.
        jobs = [*self._cuda_jobs(archs), *self._cpu_jobs()]
        # Of a Paddle for GPUs the headers include CUDA's; the one for CPUs drives them as CustomDevices.
        paddle_is = "-DPADDLE_WITH_CUDA" if paddle.is_compiled_with_cuda() else "-DPADDLE_WITH_CUSTOM_DEVICE"
        flags = [*BINDING_FLAGS, paddle_is, *headers]
        jobs += [_gxx(source, Path("paddle"), flags) for source in sorted(BINDINGS.glob("*.cc"))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self._compile(*job), jobs))
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        cuda_runtime = []
        if archs:
            # Linked in and its names hidden: the library loads where there is no CUDA, and beside another one.
            found = [f"-L{folder}" for folder in cuda.libraries]
            cuda_runtime = ["-Wl,--exclude-libs,ALL", *found, "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
        libraries = [f"-L{paddle.sysconfig.get_lib()}", f"-L{Path(paddle.__file__).parent / 'base'}", "-l:libpaddle.so"]
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-fopenmp", *cuda_runtime, "-lrt", *libraries], target_lang="c++"
        )
        runtime = target.parent / "plugins" / "libpm_cuda.so"
        runtime.unlink(missing_ok=True)  # of an earlier build
        if archs:
            runtime.parent.mkdir(exist_ok=True)
            flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", *WARNING_FLAGS, *headers]
            sources = [str(DEVICE / name) for name in ("plugin.cc", "cuda.cc")]
            self.spawn(["g++", *flags, *sources, *cuda_runtime, "-o", str(runtime)])

    def copy_extensions_to_source(self) -> None:
        """For an installation in place, which otherwise gets the library alone."""
        super().copy_extensions_to_source()
        built, plugins = Path(self.build_lib) / "ops" / "plugins", ROOT / "ops" / "plugins"
        shutil.rmtree(plugins, ignore_errors=True)
        if built.exists():
            shutil.copytree(built, plugins)

    def _cpu_jobs(self) -> Iterator[Job]:
        for source in sorted(CPU_KERNELS.glob("*.cc")):
            for isa, flags in ({"baseline": []} if source.name in BASELINE_ONLY else ISA_FLAGS).items():
                yield _gxx(source, Path("kernels") / isa, [*KERNEL_FLAGS, *flags])

    def _cuda_jobs(self, archs: list[str]) -> Iterator[Job]:
        strict = bool(os.environ.get("PADDLE_MIXTRAL_WERROR"))
        for source in nvcc.sources() if archs else ():
            target = Path("kernels") / "cuda" / "-".join(archs) / f"{source.stem}.o"
            yield source, target, partial(nvcc.compile_command, architectures=nvcc.code_for(archs), strict=strict)

    def _compile(self, source: Path, target: Path, command: Command) -> str:
        """Compiles one file, unless the object is newer than the source and every header it may include: those beside
        it and the C ABI's."""
        target = Path(self.build_temp) / target
        headers = [*source.parent.glob("*.h"), *source.parent.glob("*.cuh"), *INCLUDE.glob("*.h")]
        newest = max(p.stat().st_mtime for p in [source, ROOT / "setup.py", Path(nvcc.__file__), *headers])
        if not target.exists() or target.stat().st_mtime <= newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn(command(source, target))
        return str(target)


def _gxx(source: Path, folder: Path, flags: list[str]) -> Job:
    return source, folder / f"{source.stem}.o", lambda s, target: ["g++", *flags, "-c", str(s), "-o", str(target)]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("ops.libpaddle_mixtral", sources=[])],
        cmdclass={"build_ext": BuildOperators},
        install_requires=[*paddle_requirement(), *DEPENDENCIES],
    )
