"""``python -m tests.benchmarks.peers``: builds what is missing, measures every engine in turns, writes the table."""

import argparse
import json
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path

from tests.benchmarks.peers import environments, process
from tests.benchmarks.peers.checkpoint import SIZES, make_checkpoint, sized_config
from tests.benchmarks.peers.entries import CHECKPOINT, ENTRIES, Entry, active_bytes, convert, is_ready
from tests.benchmarks.peers.machine import Machine
from tests.benchmarks.peers.protocol import Answer, Case, Request, write
from tests.benchmarks.peers.rounds import Results, Run, interleave
from tests.benchmarks.peers.table import figures, page

FOLDER = process.ROOT / "build" / "peers"
STEPS = 16
CASES = (
    Case(batch=1, context=5, new_tokens=STEPS + 1),
    Case(batch=1, context=512, new_tokens=STEPS + 1),
    Case(batch=8, context=32, new_tokens=STEPS + 1),
    Case(batch=32, context=32, new_tokens=STEPS + 1),
    Case(batch=1, context=512, new_tokens=1),
    Case(batch=1, context=2048, new_tokens=1),
)


def main() -> int:
    """Exit status 0 where every engine asked for has run in every round, 1 where one has not, 130 after Ctrl-C."""
    args = _parser().parse_args()
    # Engines are in sessions of their own, which no signal to this one reaches: they are ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _compare(args)
    except KeyboardInterrupt:
        return 130


def _compare(args: argparse.Namespace) -> int:
    entries = [ENTRIES[key] for key in args.peers]
    results = Results()
    models = FOLDER / "models" / args.size
    _build(entries, results, models, args.jobs, args.threads)
    if not args.build_only:
        _measure(entries, results, models, args)
    for key, reason in results.failed.items():
        print(f"{ENTRIES[key].title} did not run: {reason}", file=sys.stderr)
    return 1 if results.failed else 0


def _build(entries: list[Entry], results: Results, models: Path, jobs: int, threads: int) -> None:
    """Makes environments, checkpoint and converted models that are missing; notes engines that do without."""
    if not (models / CHECKPOINT).exists():
        _say(f"writing the random checkpoint {models / CHECKPOINT}")
        make_checkpoint(models / CHECKPOINT, models.name)
    broken: dict[str, str] = {}
    for entry in entries:
        try:
            if entry.environment in broken:
                raise process.ProcessFailed(broken[entry.environment])
            environment = environments.ENVIRONMENTS.get(entry.environment or "")
            if environment is not None and not environments.is_built(environment, FOLDER):
                _say(f"installing {', '.join(environment.requirements)} {environment.source or ''}")
                try:
                    environments.build(environment, FOLDER, jobs)
                except process.ProcessFailed as failure:
                    broken[environment.name] = str(failure)
                    raise
            if not is_ready(entry, models):
                _say(f"converting the checkpoint for {entry.title}")
                convert(entry, FOLDER, models, threads)
        except process.ProcessFailed as failure:
            results.failed[entry.key] = str(failure)


def _measure(entries: list[Entry], results: Results, models: Path, args: argparse.Namespace) -> None:
    config = sized_config(args.size)
    read = {entry.key: active_bytes(entry, models, config) for entry in entries if entry.key not in results.failed}
    machine = Machine(args.threads)
    now = datetime.now(timezone.utc)
    facts = {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        **machine.describe(),
        "model": f"{args.size}: random weights, {config.num_hidden_layers} layers, vocabulary {config.vocab_size}",
        "rounds": str(args.rounds),
    }
    output = args.output or FOLDER / "results" / now.strftime("%Y-%m-%d-%H%M")
    output.mkdir(parents=True, exist_ok=True)

    def run(key: str, number: int) -> Answer:
        return _run(ENTRIES[key], number, models, config.vocab_size, args)

    text = ""
    keys = [entry.key for entry in entries]
    for done in interleave(results, keys, args.rounds, run, machine.bandwidth, machine.busy):
        _say(_line(done))
        # After every run, so that what was measured survives an interruption.
        text = page(results, entries, CASES, read, facts)
        (output / "table.md").write_text(text)
        (output / "figures.json").write_text(json.dumps(figures(results, entries, CASES, read, facts), indent=1))
    print(text)
    _say(f"written to {output}")


def _run(entry: Entry, number: int, models: Path, vocab_size: int, args: argparse.Namespace) -> Answer:
    """One process of an engine, its files read once before it starts so that all load from the page cache."""
    runs = FOLDER / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    request, answer = runs / f"{entry.key}.request.json", runs / f"{entry.key}.answer.json"
    answer.unlink(missing_ok=True)
    model = models / entry.model
    _read(model)
    write(request, Request(str(model), entry.weight_format, vocab_size, args.threads, number, CASES))
    command = [entry.python(FOLDER), "-m", f"{process.RUNNERS}.{entry.runner}", str(request), str(answer)]
    log = FOLDER / "logs" / f"{entry.key}.log"
    process.run(command, log, args.timeout_s, process.offline(args.threads) | entry.variables(FOLDER))
    return Answer.read(answer)


def _read(model: Path) -> None:
    for file in sorted(model.rglob("*")) if model.is_dir() else [model]:
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass


def _line(done: Run | str) -> str:
    if isinstance(done, str):
        return f"{ENTRIES[done].title} failed"
    rates = ", ".join(f"{case.name} {rate:.1f}" for case in CASES if (rate := done.rate(case.name)) is not None)
    return f"round {done.round + 1}, {ENTRIES[done.entry].title}: {rates} tokens/s"


def _say(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m tests.benchmarks.peers", description=__doc__, allow_abbrev=False)
    p.add_argument(
        "--peers", type=_keys, default=list(ENTRIES), metavar="NAME,...", help=f"engines; default: {','.join(ENTRIES)}"
    )
    p.add_argument("--rounds", type=_positive, default=3, help="times every engine runs, in turns; default: 3")
    p.add_argument("--threads", type=_positive, default=2, help="of every engine; default: 2")
    p.add_argument("--size", choices=list(SIZES), default="8x7b", help="small: only whether all run; default: 8x7b")
    p.add_argument("--timeout_s", type=_positive, default=600, help="for one run of one engine; default: 600")
    p.add_argument("--jobs", type=_positive, default=1, help="compilers at once while building; default: 1")
    p.add_argument("--build_only", action="store_true", help="build environments and models, measure nothing")
    p.add_argument("--output", type=Path, metavar="DIR", help="default: build/peers/results/DATE")
    return p


def _keys(text: str) -> list[str]:
    keys = text.split(",")
    if unknown := [key for key in keys if key not in ENTRIES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(ENTRIES)}")
    return [key for key in ENTRIES if key in keys]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, needs a positive integer")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
