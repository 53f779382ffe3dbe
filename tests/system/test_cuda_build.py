"""What the build makes of nvcc and of its absence, and what a build with CUDA does on a machine without a GPU."""

import subprocess
from pathlib import Path

import paddle
import pytest

import cuda_flags
import ops
from tests.system import mock_device

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = cuda_flags.find_toolkit()


@pytest.mark.parametrize(
    ("asked", "nvcc", "archs"),
    [
        (None, True, ["80", "90a"]),
        (None, False, []),
        ("", True, []),
        ("", False, []),
        ("90a", True, ["90a"]),
        ("80;100a;120f", True, ["80", "100a", "120f"]),
    ],
)
def test_architectures_are_those_asked_for(monkeypatch, asked, nvcc, archs):
    monkeypatch.delenv(cuda_flags.ARCHS_VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(cuda_flags.ARCHS_VARIABLE, asked)
    assert cuda_flags.wanted_archs(nvcc) == archs


@pytest.mark.parametrize(
    ("asked", "nvcc", "message"),
    [
        ("90a", False, r"asks for CUDA kernels \(90a\), but there is no nvcc .*; install the CUDA toolkit, or leave"),
        ("75", True, "is '75', needs numbers of 80 or more such as 80;90a"),
        ("sm_90", True, "is 'sm_90', needs numbers of 80 or more"),
        ("90,80", True, "is '90,80', needs numbers of 80 or more"),
    ],
)
def test_what_cannot_be_built_is_refused(monkeypatch, asked, nvcc, message):
    monkeypatch.setenv(cuda_flags.ARCHS_VARIABLE, asked)
    with pytest.raises(ValueError, match=f"PADDLE_MIXTRAL_CUDA_ARCHS {message}"):
        cuda_flags.wanted_archs(nvcc)


def test_newer_gpus_can_compile_what_was_built_for_older_ones():
    assert cuda_flags.gencode(["80", "90a"]) == [
        *("-gencode", "arch=compute_80,code=[sm_80,compute_80]"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
    ]


@pytest.mark.skipif(TOOLKIT is None, reason="the headers of a Paddle for GPUs include CUDA's, and there is no nvcc")
def test_bindings_compile_for_paddlepaddle_gpu():
    """One of them: all differences are in target.h."""
    include = paddle.sysconfig.get_include()
    headers = [f"-isystem{folder}" for folder in (include, f"{include}/third_party", *TOOLKIT.include)]
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
