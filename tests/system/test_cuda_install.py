"""What the build makes of nvcc and of its absence, and what a build with CUDA does on a machine without a GPU."""

import subprocess
from pathlib import Path

import paddle
import pytest

import ops
from ops.csrc import nvcc
from tests.system import mock_device

ROOT = Path(__file__).resolve().parents[2]
NVCC = nvcc.find()


@pytest.mark.parametrize(
    ("asked", "there_is_nvcc", "wanted"),
    [
        (None, True, ["80", "90a"]),
        (None, False, []),
        ("", True, []),
        ("", False, []),
        ("90a", True, ["90a"]),
        ("80;100a;120f", True, ["80", "100a", "120f"]),
    ],
)
def test_architectures_are_those_asked_for(monkeypatch, asked, there_is_nvcc, wanted):
    monkeypatch.setattr(nvcc, "find", lambda: "nvcc" if there_is_nvcc else None)
    monkeypatch.delenv(nvcc.ARCHITECTURES_VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(nvcc.ARCHITECTURES_VARIABLE, asked)
    assert nvcc.wanted_architectures() == wanted


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("90a", r"asks for CUDA kernels \(90a\), but nvcc is not in CUDA_HOME, .*; install the CUDA toolkit, .* alone"),
        ("75", "is '75', needs numbers from 80 on, such as 80;90a"),
        ("sm_90", "is 'sm_90', needs numbers from 80 on"),
        ("90,80", "is '90,80', needs numbers from 80 on"),
    ],
)
def test_what_cannot_be_built_is_refused(monkeypatch, asked, message):
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setenv(nvcc.ARCHITECTURES_VARIABLE, asked)
    with pytest.raises(ValueError, match=f"PADDLE_MIXTRAL_CUDA_ARCHS {message}"):
        nvcc.wanted_architectures()


@pytest.mark.skipif(NVCC is None, reason="the headers of a Paddle for GPUs include CUDA's, and there is no nvcc")
def test_bindings_compile_for_paddlepaddle_gpu():
    """One of them: all differences are in target.h."""
    include = paddle.sysconfig.get_include()
    headers = [f"-isystem{folder}" for folder in (include, f"{include}/third_party", *nvcc.folders().include)]
    flags = ["-std=c++17", "-w", "-fsyntax-only", "-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_NO_PYTHON"]
    source = ROOT / "ops" / "csrc" / "paddle" / "norm.cc"
    subprocess.run(["g++", *flags, "-DPADDLE_WITH_CUDA", *headers, source], check=True)


@pytest.mark.skipif(not (ops.DEVICE_RUNTIME / "libpm_cuda.so").exists(), reason="built without nvcc")
def test_a_build_with_cuda_runs_without_a_gpu():
    """Where there is a GPU, it is hidden."""
    arguments = ["predict/predictor.py", "--prompt", "The", "--max_length", "1", "--device"]
    cpu, gpu = (
        mock_device.run([*arguments, device], ops.DEVICE_RUNTIME, CUDA_VISIBLE_DEVICES="-1")
        for device in ("cpu", "gpu")
    )
    assert cpu.returncode == 0, cpu.stderr
    assert gpu.returncode == 1
    assert gpu.stderr.splitlines()[-1].startswith(
        "error: --device gpu: this machine shows no NVIDIA GPU (see nvidia-smi"
    )
