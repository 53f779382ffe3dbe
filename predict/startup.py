"""While a command's modules are imported, Ctrl-C and a broken installation end it without a traceback, too."""

import signal
import sys
from types import TracebackType


def begin() -> None:
    """For a command's first line, before Paddle is imported; predict.command takes over from it."""
    # A KeyboardInterrupt inside an extension's import comes out as one error or another.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if kind.__name__ == "OperatorLibraryError" or issubclass(kind, ModuleNotFoundError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
