"""``python -m tests.benchmarks.serving``: measures the engine under a server's load, and writes what it found."""

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from predict import startup

if __name__ == "__main__":
    startup.begin()  # before Paddle is imported

import paddle

from ops import library
from predict.arguments import add_model_flags, check_device, check_output_file, count, nonempty
from predict.bench.machine import processor, total_memory
from predict.command import run_command
from predict.engine.engine import DEFAULT_MAX_NUM_SEQS
from predict.llm import LLM
from predict.model.weights import DEMO
from predict.parallel import Ranks
from tests.benchmarks.serving import measure
from tests.benchmarks.serving.models import Models
from tests.benchmarks.serving.overhead import overhead
from tests.benchmarks.serving.report import SCHEMA_VERSION, SECTIONS, page


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Makes the measurements of args.only; report.py says what comes back.

    Args:
        folder: an empty one, for an exported program.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request
    began = time.perf_counter()
    load = os.getloadavg()[0]
    models = Models(args, folder)
    llm, requests = models.chosen, measure.workload(models.chosen, args.num_requests)
    measure.warm_up(llm)
    found: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "facts": _facts(args, llm, requests, load), "notes": []}
    if "batching" in args.only:
        found["batching"] = measure.batching(llm, requests, args.repeat, _say)
    if "arrivals" in args.only:
        found["arrivals"] = measure.arrivals(llm, models.server_flags, args.num_requests, args.rates, _say)
    if "prefix" in args.only:
        found["prefix"] = measure.prefix(llm, args.repeat, _say)
    if "overhead" in args.only:
        found["overhead"] = overhead(llm, _say)
    if "modes" in args.only and models.exported:
        found["notes"].append("static against dynamic is left out: an exported folder has no dynamic graph")
    elif "modes" in args.only:
        for each in (models.dynamic, models.static):
            measure.warm_up(each)
        found["modes"] = measure.modes(models.dynamic, models.static, requests, args.repeat, _say)
    found["seconds"] = time.perf_counter() - began
    return found


def _facts(args: argparse.Namespace, llm: LLM, requests: list[measure.Request], load: float) -> dict[str, str]:
    prompts, outputs = [len(r.prompt) for r in requests], [r.params.max_tokens for r in requests]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} processors, {total_memory() / 1e9:.1f} GB, "
        f"{library.cpu_isa()} kernels on {library.num_threads()} threads; load average {load:.1f} before the run",
        "model": f"{args.model}, {llm.config.num_hidden_layers} layers, {llm.dtype}, "
        f"{llm.quant_type + ', ' if llm.quant_type else ''}{llm.runner.mode}; Paddle {paddle.__version__}",
        "requests": f"{len(requests)}; prompts of {_range(prompts)} tokens, answers of {_range(outputs)}",
        "engine": f"max_num_seqs {llm.max_num_seqs}, max_num_batched_tokens {llm.max_num_batched_tokens}",
    }


def _range(lengths: list[int]) -> str:
    return f"{min(lengths)} to {max(lengths)} (mean {sum(lengths) / len(lengths):.0f})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser("python -m tests.benchmarks.serving", description=__doc__, allow_abbrev=False)
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        type=nonempty,
        default=str(DEMO),
        help="checkpoint folder, exported folder, dummy:mixtral-8x7b, or a remote name; default: the demo checkpoint",
    )
    add_model_flags(model, default_mode="what the model is")
    what = p.add_argument_group("measurements")
    what.add_argument(
        "--only", type=_sections, default=tuple(SECTIONS), metavar="NAME,...", help=f"default: {','.join(SECTIONS)}"
    )
    what.add_argument("--num_requests", type=count, default=256, metavar="N", help="of mixed lengths; default: 256")
    what.add_argument(
        "--rates",
        type=_rates,
        metavar="X,...",
        help="requests a second; default: 50, 80 and 120 %% of what the server can answer",
    )
    what.add_argument("--repeat", type=count, default=3, metavar="N", help="turns of each comparison; default: 3")
    what.add_argument(
        "--max_num_seqs",
        type=count,
        default=DEFAULT_MAX_NUM_SEQS,
        metavar="N",
        help=f"requests that run together; default: {DEFAULT_MAX_NUM_SEQS}",
    )
    p.add_argument("--json", type=nonempty, metavar="FILE", help="everything that was measured, for programs")
    return p


def _sections(text: str) -> tuple[str, ...]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a measurement twice; name each once")
    return tuple(names)


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, text.split(",")))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}, needs positive numbers with commas between, such as 2,8")
    if len(set(rates)) < len(rates):
        raise argparse.ArgumentTypeError(f"{text!r} names a rate twice; name each once")
    return rates


def _check(args: argparse.Namespace, ranks: Ranks) -> None:
    """Refuses what cannot be measured, before anything is loaded."""
    check_device(args)
    if ranks.world_size > 1:
        raise ValueError("this measures one process; start it without paddle.distributed.launch")
    if args.json is not None:
        check_output_file("json", Path(args.json))
    if args.rates is not None and "arrivals" not in args.only:
        raise ValueError("--rates has no effect without the measurement of arrivals; add it to --only")


def _run(args: argparse.Namespace, ranks: Ranks) -> None:
    _check(args, ranks)
    with tempfile.TemporaryDirectory() as folder:
        found = bench(args, Path(folder))
    print(page(found), flush=True)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda ranks: _run(args, ranks))


if __name__ == "__main__":
    sys.exit(main())
