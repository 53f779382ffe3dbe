"""This project, static mode, through ``paddle-mixtral bench``, which feeds random tokens as the other runners do."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.protocol import Answer, Case, Request, write

REPEAT = 3


def command(request: Request, output: Path) -> list[str]:
    """``paddle-mixtral bench`` with the request's cases as its flags."""
    prefills = [case for case in request.cases if case.new_tokens == 1]
    singles = [case for case in request.cases if case.new_tokens > 1 and case.batch == 1]
    batches = [case for case in request.cases if case.new_tokens > 1 and case.batch > 1]
    return [
        *(sys.executable, "-m", "predict.main", "bench", request.model),
        *("--threads", str(request.threads), "--repeat", str(REPEAT), "--json", str(output)),
        *("--prompt_len", _list(case.context for case in prefills)),
        *("--batch_size", _list(case.batch for case in singles + batches)),
        *("--context_len", _list(case.context for case in singles)),
        *("--batch_context_len", _list(case.context for case in batches)),
        *("--gen_len", _list(case.new_tokens - 1 for case in singles + batches)),
    ]


def answer(found: dict[str, Any], cases: tuple[Case, ...]) -> Answer:
    """The bench's JSON as every other engine answers: a rate for each repetition.

    Raises:
        KeyError: the bench has not measured one of the cases.
    """
    rates = {}
    for entry in found["measurements"]:
        seconds = [sample["seconds"] for sample in entry["samples"]]
        if entry["kind"] == "prefill":
            case = Case(1, entry["new_tokens"], 1)
            rates[case.name] = [entry["new_tokens"] / s for s in seconds]
        else:
            steps = entry["new_tokens"]  # of one repetition
            case = Case(entry["batch_size"], entry["context_len"], steps + 1)
            turns = [seconds[i : i + steps] for i in range(0, len(seconds), steps)]
            rates[case.name] = [case.batch * steps / sum(turn) for turn in turns]
    loading, running = found["loading"], found["running"]
    return Answer(
        rates={case.name: rates[case.name] for case in cases},
        load_s=loading["seconds"],
        # Without the buffer that the bench reads to know the memory's rate.
        peak_bytes=max(loading["peak_bytes"], running["peak_bytes"] - running["buffer_bytes"]),
        versions={"paddle-mixtral": found["version"], "paddlepaddle": found["paddle_version"]},
    )


def _list(numbers) -> str:
    return ",".join(map(str, sorted(set(numbers))))


def main() -> None:
    request = Request.read(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bench.json"
        status = subprocess.run(command(request, output)).returncode
        if status:
            sys.exit(status)
        write(sys.argv[2], answer(json.loads(output.read_text()), request.cases))


if __name__ == "__main__":
    main()
