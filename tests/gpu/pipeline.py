"""The whole pipeline through Paddle: what `paddle-mixtral bench` finds of Mixtral-8x7B's full size, dynamic and static.

Each run is a process of its own, as anyone would start it; it makes the dummy's weights on the device and measures its
own ceilings. In a dry run the device is the mock device (tests/system/mock_device.py) with the CUDA kernels, emulated.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops import RUNTIME_VARIABLE
from ops.csrc import nvcc
from tests.ops.cuda_emulation import ROOT

WEIGHTS: dict[str, list[str]] = {"int8": ["--quant_type", "weight_only_int8"], "bf16": []}
MODES = ("dynamic", "static")
NO_PADDLE = (
    f"pipeline: not measured, because {sys.executable} is without Paddle or paddle-mixtral: `pip install .` with it, "
    "or `make bench-gpu PYTHON=...` with one that has them, NumPy and PyTorch"
)
# At 0 Paddle raises where it would copy to the CPU for want of a kernel.
NO_FALLBACK = {"FLAGS_enable_api_kernel_fallback": "0"}
BUILD_S, RUN_S = 900, 300  # far more than either takes: what hangs must not keep the rest from being told


@dataclass(frozen=True)
class Sizes:
    """What is run."""

    model: tuple[str, ...] = ("dummy:mixtral-8x7b",)
    context: int = 512
    batch: int = 8
    prompt: int = 2048
    gen_len: int = 64
    repeat: int = 3


FULL = Sizes()
TINY = Sizes(("dummy:demo", "--num_hidden_layers", "1"), context=9, batch=2, prompt=33, gen_len=2, repeat=1)


@dataclass(frozen=True)
class Target:
    """What a measurement is wanted to reach on one H200. ``share``: of the copy bandwidth, or of the matmul rate."""

    share: float | None = None
    tokens_per_s: float | None = None

    def __str__(self) -> str:
        return "" if self == Target() else f">= {self.share:.0%}" if self.share else f">= {self.tokens_per_s:.0f}/s"


# By measurement, in the order of the bench's: a prompt, one sequence, several; then by weights.
TARGETS = {
    "prefill": {"int8": Target(share=0.4), "bf16": Target(share=0.4)},
    "decode b1": {"int8": Target(share=0.75), "bf16": Target(share=0.8)},
    "decode": {"int8": Target(tokens_per_s=540), "bf16": Target()},
}


class PipelineError(RuntimeError):
    """A run of the pipeline failed; says what it said."""


def is_possible() -> bool:
    """Whether this Python has Paddle and this package's requirements; else NO_PADDLE says how to get them."""
    look = "import importlib.metadata, paddle; importlib.metadata.version('paddle-mixtral')"
    return subprocess.run([sys.executable, "-c", look], capture_output=True).returncode == 0


def prepare(architecture: str) -> dict[str, str]:
    """Builds the operators in place for a GPU of an architecture such as "90a"; gives the runs' environment.

    Raises:
        PipelineError: the build failed.
    """
    variables = {nvcc.ARCHITECTURES_VARIABLE: architecture}
    _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD_S, variables)
    return NO_FALLBACK


def prepare_mock(folder: Path, kernels: Path) -> dict[str, str]:
    """Builds the mock device in a folder, for the library of emulated kernels; gives the runs' environment."""
    from tests.system import mock_device  # asks Paddle where its headers are

    mock_device.build(folder)
    return {**NO_FALLBACK, RUNTIME_VARIABLE: str(folder), "PM_MOCK_KERNELS": str(kernels)}


def measure(weights: str, mode: str, sizes: Sizes, environment: dict[str, str]) -> dict[str, Any]:
    """One run: the JSON of predict.bench.report.

    Raises:
        PipelineError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "bench.json"
        flags = {
            "mode": mode,
            "device": "gpu",
            "dtype": "bfloat16",
            "prompt_len": sizes.prompt,
            "max_num_batched_tokens": sizes.prompt,
            "batch_size": f"1,{sizes.batch}",
            "context_len": sizes.context,
            "batch_context_len": sizes.context,
            "gen_len": sizes.gen_len,
            "repeat": sizes.repeat,
            "json": found,
        }
        listed = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        # As a module: of this folder's packages, whatever is installed.
        command = [sys.executable, "-m", "predict.main", "bench", *sizes.model, *WEIGHTS[weights], *listed]
        _run(command, RUN_S, environment)
        return json.loads(found.read_text(encoding="utf-8"))


def _run(command: list[str], limit: float, environment: dict[str, str]) -> None:
    shown = " ".join(command[1:])
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise PipelineError(f"{shown}: not done after {limit:.0f} s") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise PipelineError(f"{shown}: exit status {done.returncode}: {said[-1]}")


def table(runs: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """A line for each measurement and kind of weights: dynamic beside static; shares are static's, if it has run."""
    rows = [["pipeline, tokens/s", "weights", *MODES, "static/dynamic", "of copy", "of matmul", "target"]]
    for at, (name, targets) in enumerate(TARGETS.items()):
        for weights, target in targets.items():
            found = {mode: runs[weights, mode]["measurements"][at] for mode in MODES if (weights, mode) in runs}
            if not found:
                continue
            entry = list(found.values())[-1]
            full_name = f"prefill {entry['new_tokens']}" if name == "prefill" else f"decode b{entry['batch_size']}"
            speeds = [found[mode]["tokens_per_s"]["p50"] if mode in found else None for mode in MODES]
            told = ["failed" if speed is None else f"{speed:.1f}" for speed in speeds]
            ratio = f"{speeds[1] / speeds[0]:.2f}" if len(found) == len(MODES) else "-"
            shares = [_percent(entry["share_of_memory_rate"]), _percent(entry["share_of_matrix_rate"])]
            rows.append([full_name, weights, *told, ratio, *shares, str(target)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def loading(runs: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """How long models took to be ready, and the ceilings each run measured."""
    lines = []
    for (weights, mode), found in runs.items():
        ceilings = found["ceilings"]
        matrix = ceilings["matrix"].get(ceilings["matrix_unit"])
        rate = f"matmul {matrix['p50'] / 1e12:.0f} TFLOP/s" if matrix else f"no matmul rate ({ceilings['missing']})"
        seconds, peak = found["loading"]["seconds"], found["loading"]["peak_bytes"] / 1e9
        experts = found["measurements"][-1]["experts_hit"]
        lines.append(
            f"{weights} {mode}: ready in {seconds:.1f} s with {peak:.1f} GB on the host; copy "
            f"{ceilings['memory']['p50'] / 1e12:.2f} TB/s, {rate}; the batch hit {experts:.1f} experts a layer"
        )
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
