"""The mock device (ops/csrc/device/mock.cc), built for tests, and processes that see it as their GPU."""

import os
import subprocess
import sys
from pathlib import Path

import paddle

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "ops" / "csrc" / "device"


def build(folder: Path) -> None:
    """Compiles the mock runtime into ``folder``, which is then one for PADDLE_MIXTRAL_DEVICE_RUNTIME."""
    include = paddle.sysconfig.get_include()
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    headers = ["-isystem", include, "-isystem", f"{include}/third_party"]
    sources = [SOURCES / name for name in ("plugin.cc", "mock.cc", "mock_kernels.cc")]
    subprocess.run(["g++", *flags, *headers, *sources, "-ldl", "-o", folder / "libpm_mock.so"], check=True)


def run(arguments: list[str], runtime: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python with the runtime of a folder; Paddle raises where it would copy to the CPU for want of a kernel."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CUSTOM_DEVICE_ROOT"},
        "PADDLE_MIXTRAL_DEVICE_RUNTIME": str(runtime),
        "FLAGS_enable_api_kernel_fallback": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        **variables,
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
