"""The command line: paddle-mixtral bench MODEL, alone or under python -m paddle.distributed.launch."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import paddle
from paddle.base.core import Place

from export.program import as_program
from ops import library
from ops.device import device_memory, device_model, gpu_place
from predict.arguments import add_model_flags, check_device, check_output_file, count, nonempty
from predict.bench import plan as planning
from predict.bench.machine import forget_peak, peak_memory, processor, total_memory
from predict.bench.measure import Bench
from predict.bench.plan import Options, Plan, make_plan
from predict.bench.report import SCHEMA_VERSION, measurement, percentiles, table
from predict.command import run_command
from predict.engine.engine import DEFAULT_MAX_NUM_BATCHED_TOKENS
from predict.llm import LLM
from predict.parallel import Ranks, barrier
from predict.processors import processors
from predict.progress import progress
from predict.runner import DynamicRunner, StaticRunner, bytes_per_token

MODEL_FLAGS = ("mode", "dtype", "quant_type", "block_size", "num_hidden_layers", "threads")
MEASUREMENT_FLAGS = (
    *("prompt_len", "gen_len", "batch_size", "context_len", "batch_context_len", "repeat"),
    "max_num_batched_tokens",
)


def bench(options: Options, ranks: Ranks, arguments: list[str]) -> dict[str, Any] | None:
    """Loads the model and measures it on every rank.

    Args:
        arguments: the command line, for the record.

    Returns:
        On rank 0, everything that was found (see predict.bench.report); None on the others.

    Raises:
        ValueError, MemoryError: whatever does not fit, before anything large is loaded where that can be known.
    """
    place = gpu_place(ranks.rank) if options.device == "gpu" else None
    plan = make_plan(options, ranks.world_size, place)
    first = ranks.rank == 0
    if ranks.world_size > 1:
        barrier()  # no rank takes memory before every rank has looked whether there is enough
    load_average = os.getloadavg()[0]
    if first:
        for sentence in plan.left_out:
            print(sentence, file=sys.stderr)
    before = peak_memory()
    started = time.perf_counter()
    runner = _open(options, plan, ranks)
    loading = {"seconds": time.perf_counter() - started, "peak_bytes": peak_memory(), "before_bytes": before}
    forget_peak()
    with progress("measuring", Bench.num_steps(plan), "step", first) as bar:
        runs = Bench(plan, runner, ranks, bar.update, place)
        samples = runs.run()
    ceilings = runs.ceilings
    ceilings.close()
    if not first:
        return None
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "version": importlib.metadata.version("paddle-mixtral"),
        "paddle_version": paddle.__version__,
        "command": arguments,
        "machine": {
            "processor": processor(),
            "processors": processors(),
            "memory": total_memory(),
            "instruction_set": library.cpu_isa(),
            "load_average": load_average,
            "device": None if place is None else _device(place),
        },
        "model": {
            "name": options.model,
            "mode": runner.mode,
            "dtype": plan.dtype,
            "quant_type": plan.quant_type,
            "num_hidden_layers": plan.config.num_hidden_layers,
            "num_local_experts": plan.config.num_local_experts,
            "weight_bytes": plan.weight_bytes,
            "ranks": ranks.world_size,
            "threads": library.num_threads(),
            "block_size": plan.block_size,
            "max_position_embeddings": plan.config.max_position_embeddings,
        },
        "loading": loading,
        "running": {"peak_bytes": peak_memory(), "buffer_bytes": ceilings.buffer_bytes},
        "ceilings": {
            "memory_kind": ceilings.memory_kind,
            "memory": _readings(ceilings.memory),
            "matrix": {unit: _readings(rates) for unit, rates in ceilings.matrix.items()},
            "matrix_unit": ceilings.unit,
            "missing": ceilings.missing,
        },
        "left_out": list(plan.left_out),
        "measurements": [measurement(what, found, plan.gen_len) for what, found in samples.items()],
    }


def _device(place: Place) -> dict[str, Any]:
    total, free = device_memory(place)
    return {"name": device_model(place), "memory": total, "used_bytes": total - free}


def _open(options: Options, plan: Plan, ranks: Ranks) -> DynamicRunner | StaticRunner:
    """Runs the model, with at least the pages of KV cache the plan needs."""
    pages_each = -(-plan.longest // plan.block_size)
    max_num_seqs = -(-plan.num_pages // pages_each)
    page_bytes = plan.block_size * bytes_per_token(plan.config, ranks.world_size, plan.dtype)
    llm = LLM(
        options.model,
        mode="static" if plan.static and not options.traces else "dynamic",
        dtype=options.dtype,
        quant_type=options.quant_type,
        max_num_seqs=max_num_seqs,
        kv_cache_memory=max_num_seqs * pages_each * page_bytes,
        total_max_length=plan.longest,
        block_size=options.block_size,
        threads=options.threads,
        verify=options.verify,
        num_hidden_layers=options.num_hidden_layers,
        device=options.device,
        ranks=ranks,
    )
    if options.traces and isinstance(llm.runner, DynamicRunner):
        return as_program(llm.runner)
    return llm.runner


def _readings(rates: list[float]) -> dict[str, Any]:
    return {**percentiles(rates), "readings": rates}


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}, needs integers of at least 1 with commas between, such as 8,32")
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice; name each once")
    return numbers


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "paddle-mixtral bench",
        description="Measures prefill and decoding on random tokens, against the memory's and the matrix rate of this "
        "machine, or of its GPU, in the same run.",
        allow_abbrev=False,
    )
    model = p.add_argument_group("model")
    model.add_argument(
        "model",
        metavar="MODEL",
        type=nonempty,
        help="checkpoint folder, exported folder, dummy:mixtral-8x7b (random weights of that size), or a remote name",
    )
    add_model_flags(model, default_mode="what MODEL is; static, of a dummy: the program an export of it would have")
    what = p.add_argument_group("measurements; N,... is a list with commas")
    for flag, default, text in (
        ("prompt_len", planning.DEFAULT_PROMPT_LEN, "tokens of the prompts whose prefill is timed"),
        ("batch_size", planning.DEFAULT_BATCH_SIZE, "sequences that decode together"),
        ("context_len", planning.DEFAULT_CONTEXT_LEN, "tokens in the cache when one sequence begins to decode"),
        ("batch_context_len", planning.DEFAULT_BATCH_CONTEXT_LEN, "the same for each sequence of a larger batch"),
    ):
        listed = ",".join(map(str, default))
        what.add_argument(f"--{flag}", type=_counts, metavar="N,...", help=f"{text}; default: {listed}")
    what.add_argument(
        "--gen_len",
        type=count,
        metavar="N",
        default=planning.DEFAULT_GEN_LEN,
        help="decode steps a turn; default: 64",
    )
    what.add_argument(
        "--max_num_batched_tokens",
        type=count,
        metavar="N",
        default=DEFAULT_MAX_NUM_BATCHED_TOKENS,
        help=f"tokens of a step at the most; a longer prompt takes several; default: {DEFAULT_MAX_NUM_BATCHED_TOKENS}",
    )
    what.add_argument(
        "--repeat",
        type=count,
        metavar="N",
        default=planning.DEFAULT_REPEAT,
        help="turns of everything; default: 5",
    )
    out = p.add_argument_group("output, besides the table")
    out.add_argument("--json", type=nonempty, metavar="FILE", help="everything that was measured, every step of it")
    out.add_argument("--plot", type=nonempty, metavar="FILE.png", help="a roofline picture")
    return p


def _run(args: argparse.Namespace, ranks: Ranks, arguments: list[str]) -> None:
    check_device(args)
    for flag, path in (("json", args.json), ("plot", args.plot)):
        if path is not None:
            check_output_file(flag, Path(path))
    if args.plot is not None and not args.plot.endswith(".png"):
        raise ValueError(f"--plot {args.plot}: the picture is a PNG; give a name that ends in .png")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed; run `pip install '.[plot]'`")
    if args.json is not None and args.json == args.plot:
        raise ValueError(f"--json and --plot are both {args.json}; give two files")
    if args.plot is not None and args.device == "gpu":
        raise ValueError("--plot draws the CPU's kernels under its ceilings; leave it out beside --device gpu")
    found = bench(_options(args, args.model, MEASUREMENT_FLAGS), ranks, arguments)
    if found is None:
        return
    print(table(found), flush=True)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(found) + "\n", encoding="utf-8")
    if args.plot is not None:
        from predict.bench.roofline import draw  # matplotlib is an extra, and takes a second to import

        draw(found, Path(args.plot))


def run_bench(args: argparse.Namespace, ranks: Ranks) -> None:
    """What predictor.py --benchmark does: the bench with its defaults, of the predictor's model."""
    options = replace(_options(args, args.model_name_or_path), mode=args.mode or "dynamic")
    found = bench(options, ranks, sys.argv[1:])
    if found is not None:
        print(table(found), flush=True)


def _options(args: argparse.Namespace, model: str, measurements: tuple[str, ...] = ()) -> Options:
    flags = {flag: getattr(args, flag) for flag in (*MODEL_FLAGS, *measurements)}
    return Options(model, **flags, verify=bool(args.verify), device=args.device or "cpu")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(arguments)
    return run_command(lambda ranks: _run(args, ranks, arguments))
