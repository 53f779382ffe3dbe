"""How every command line of the project ends: an error is one message and an exit status, never a traceback."""

import io
import os
import signal
import sys
from collections.abc import Callable

from predict import parallel
from predict.parallel import Ranks

FAILED = 1
INTERRUPTED = 130  # what shells report for Ctrl-C


def run_command(main: Callable[[Ranks], None], step_timeout_s: float = parallel.STEP_TIMEOUT_S) -> int:
    """Joins the job's ranks, runs ``main`` and returns the exit status; what a user can mend is printed, not raised."""
    return parallel.run(lambda ranks: _status(main, ranks), step_timeout_s)


def _status(main: Callable[[Ranks], None], ranks: Ranks) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # predict.startup took it
    _mend_streams()
    where = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
    try:
        main(ranks)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough. Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        # One without a file's name is a write that failed.
        unwritten = error.strerror and not error.filename
        print(
            f"{where}error: {f'the output could not be written ({error.strerror})' if unwritten else error}",
            file=sys.stderr,
        )
        return FAILED
    except (ValueError, MemoryError) as error:
        print(f"{where}error: {error}", file=sys.stderr)
        return FAILED
    return 0


def _mend_streams() -> None:
    """Standard streams that are closed become empty ones; what the locale cannot print is printed as its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
