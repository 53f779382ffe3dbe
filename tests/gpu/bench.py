"""python -m tests.gpu.bench: every kernel at Mixtral-8x7B's sizes against what this GPU does at best, then the whole
model through Paddle: a table, JSON.

Few tokens: the bytes a kernel must read over its time, as a share of the copy bandwidth measured in the same run. Many:
its operations over its time, as a share of the bfloat16 matmul rate measured in the same run. Needs Python, NumPy,
PyTorch and nvcc; the model Paddle, too, and is left out without. --emulate: a tiny model on the emulation of CUDA; its
figures mean nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.gpu import pipeline
from tests.gpu.clock import EmulatedClock, GpuClock
from tests.gpu.collective_times import all_reduce_seconds
from tests.gpu.devices import EmulatedDevice, TorchDevice, gpu
from tests.gpu.workloads import FORMATS, MIXTRAL_8X7B, TINY, Model, Timed, all_timed


def step_seconds(timed: list[Timed], model: Model, weights: str, tokens: int, context: int) -> tuple[float, float]:
    """One decode step of `tokens` sequences: the sum of its kernels' times, and of the bytes they must read."""
    by_name = {
        t.operator: t for t in timed if t.tokens == tokens and t.weights in ("", weights) and t.context in (0, context)
    }
    layer = [by_name[name] for name in ("rms_norm", "qkv", "decode", "o", "rms_norm", "fused_moe")]
    once = [by_name[name] for name in ("embedding", "rms_norm", "lm_head", "sample greedy")]
    seconds = model.layers * sum(t.seconds for t in layer) + sum(t.seconds for t in once)
    return seconds, model.layers * sum(t.read_bytes for t in layer) + sum(t.read_bytes for t in once)


def table(timed: list[Timed], model: Model, device: str, bandwidth: float, rate: float) -> list[str]:
    """At most twelve lines."""
    sizes = (*model.few, *model.many)

    def shares(operator: str, weights: str, context: int = 0) -> list[str]:
        """Of the copy bandwidth where tokens are few, of the matmul rate where they are many."""
        cells = {}
        for t in timed:
            if (t.operator, t.weights, t.context) == (operator, weights, context):
                few = t.tokens in model.few
                share = t.read_bytes / t.seconds / bandwidth if few else t.operations / t.seconds / rate
                cells[t.tokens] = f"{share:.0%}"
        return [cells[size] for size in sizes if size in cells]

    def line(name: str, *groups: list[str]) -> str:
        return f"{name:<11}" + "   ".join(" ".join(f"{cell:>6}" for cell in group) for group in groups)

    def microseconds(operator: str) -> str:
        return "/".join(f"{t.seconds * 1e6:.1f}" for t in timed if t.operator == operator)

    heads = [f"T={size}" for size in sizes]
    lines = [
        f"{device}: copy {bandwidth / 1e12:.2f} TB/s (share for T <= {model.few[-1]}), "
        f"bf16 matmul {rate / 1e12:.0f} TFLOP/s (share beyond)",
        line("bf16 | int8", heads, heads),
    ]
    for operator in (*model.linears, "fused_moe"):
        lines.append(line(operator, *(shares(operator, weights) for weights in FORMATS)))
    groups = [f"{context}: " + " ".join(shares("decode", "", context)) for context in model.contexts]
    lines.append(f"decode attention, context {'; '.join(groups)}; prefill {' '.join(shares('prefill', ''))}")
    lines.append(f"us: norm {microseconds('rms_norm')}, embedding {microseconds('embedding')}")
    lines.append(f"us: sample greedy {microseconds('sample greedy')}, top-p {microseconds('sample top-p')}")
    for tokens in model.few[:2]:
        parts = []
        for weights in FORMATS:
            seconds, read = step_seconds(timed, model, weights, tokens, model.contexts[0])
            share = read / seconds / bandwidth
            parts.append(f"{weights} {seconds * 1e3:.2f} ms, {tokens / seconds:.0f} tokens/s, {share:.0%} of copy")
        lines.append(f"step of kernels, b{tokens}: " + "; ".join(parts))
    return lines


def all_runs(device: EmulatedDevice | TorchDevice) -> tuple[dict[tuple[str, str], dict], list[str]]:
    """The pipeline's runs by weights and mode, and a sentence for each that failed, or for all."""
    if not pipeline.is_possible():
        return {}, [pipeline.NO_PADDLE]
    runs: dict[tuple[str, str], dict] = {}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            if isinstance(device, EmulatedDevice):
                sizes, environment = pipeline.TINY, pipeline.prepare_mock(Path(folder), device.path)
            else:
                sizes, environment = pipeline.FULL, pipeline.prepare(device.architecture)
        except pipeline.PipelineError as error:
            return {}, [f"pipeline: {error}"]
        for weights in pipeline.WEIGHTS:
            for mode in pipeline.MODES:
                began = time.perf_counter()
                try:
                    runs[weights, mode] = pipeline.measure(weights, mode, sizes, environment)
                except pipeline.PipelineError as error:
                    failures.append(f"pipeline, {weights} {mode}: {error}")
                print(f"pipeline {weights} {mode}: {time.perf_counter() - began:.0f} s", flush=True)
    return runs, failures


def main() -> int:
    """0 where everything ran."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bench", description=__doc__)
    parser.add_argument("--emulate", action="store_true", help="a tiny model on the emulation of CUDA: a dry run")
    parser.add_argument("--json", type=Path, default=Path("build/gpu/bench.json"), help="where every figure goes")
    arguments = parser.parse_args()
    started = time.perf_counter()
    clock = EmulatedClock(EmulatedDevice()) if arguments.emulate else GpuClock(gpu())
    model = TINY if arguments.emulate else MIXTRAL_8X7B
    print(f"built for {clock.device.name} in {time.perf_counter() - started:.0f} s", flush=True)

    bandwidth, rate = clock.copy_bandwidth(), clock.matmul_rate()
    timed = []
    for t in all_timed(clock, model):
        timed.append(t)
        print(f"{t.operator} {t.weights} T={t.tokens} context={t.context}: {t.seconds * 1e6:.1f} us", flush=True)
    sizes = [model.hidden, model.many[-1] * model.hidden]
    reduced: dict[int, float] = {}
    runs, failures = all_runs(clock.device)
    try:
        reduced |= zip(sizes, all_reduce_seconds(clock.device, sizes), strict=True)
    except (RuntimeError, OSError) as error:
        failures.append(f"all_reduce: {error}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "device": clock.device.name,
        "copy_bytes_per_s": bandwidth,
        "matmul_operations_per_s": rate,
        "model": asdict(model),
        "kernels": [asdict(t) for t in timed],
        "all_reduce_seconds": reduced,
        "pipeline": [{"weights": weights, "mode": mode, "bench": run} for (weights, mode), run in runs.items()],
        "pipeline_failures": failures,
    }
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"every figure: {arguments.json} ({time.perf_counter() - started:.0f} s in all)\n")
    print("\n".join(table(timed, model, clock.device.name, bandwidth, rate)))
    told = ", ".join(f"{size} float32 {seconds * 1e6:.0f} us" for size, seconds in reduced.items())
    print(f"all_reduce of two ranks (on one GPU they take turns): {told or 'failed'}")
    if runs:
        print("\n".join([*pipeline.loading(runs), *pipeline.table(runs)]))
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if set(failures) - {pipeline.NO_PADDLE} else 0


if __name__ == "__main__":
    sys.exit(main())
