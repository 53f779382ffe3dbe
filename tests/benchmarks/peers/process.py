"""One child process at a time: its output in a log, a time limit, and a reason where it fails."""

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RUNNERS = "tests.benchmarks.peers.runners"


class ProcessFailed(RuntimeError):
    """A child that failed; the message is its reason: what it printed last."""


def run(command: list[str], log: Path, timeout_s: float, environment: dict[str, str] | None = None) -> None:
    """Runs ``command`` in the repository's root to its end, its output appended to ``log``.

    Raises:
        ProcessFailed: it ended with another status than 0, or was ended after ``timeout_s``, with all it had started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    with log.open("a") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            status = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"not done within {timeout_s:.0f} s (see {_short(log)})") from None
        finally:
            _end(child)
    if status:
        ended = f"ended by {signal.Signals(-status).name}: " if status < 0 else ""
        with log.open("rb") as output:
            output.seek(begin)
            raise ProcessFailed(f"{ended}{reason(output.read().decode(errors='replace'))} (see {_short(log)})")


def offline(threads: int) -> dict[str, str]:
    """Environment variables every peer gets: its threads, and no look at any hub."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def reason(text: str) -> str:
    """Of what a failed program printed, the last line that names an error, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # pip's very last lines are notes that explain what an error is.
    errors = [line for line in lines if re.search(r"error\b", line, re.IGNORECASE) and not line.startswith("note:")]
    return (errors or lines or ["it printed nothing"])[-1]


def _short(log: Path) -> Path:
    return log.relative_to(ROOT) if log.is_relative_to(ROOT) else log


def _end(child: subprocess.Popen) -> None:
    """Ends what is left of the child and of the processes it started, so that nothing runs beside the next peer."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
