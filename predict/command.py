"""How every command line of the project ends: an error is one message and an exit status, never a traceback."""

import os
import sys
from collections.abc import Callable

from predict import parallel
from predict.parallel import Ranks

FAILED = 1
INTERRUPTED = 130  # what shells report for Ctrl-C


def run_command(main: Callable[[Ranks], None]) -> int:
    """Joins the job's ranks, runs ``main`` and returns the exit status; what a user can mend is printed, not raised."""
    return parallel.run(lambda ranks: _status(main, ranks))


def _status(main: Callable[[Ranks], None], ranks: Ranks) -> int:
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
    except (ValueError, MemoryError, OSError) as error:
        print(f"{where}error: {error}", file=sys.stderr)
        return FAILED
    return 0
