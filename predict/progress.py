"""Progress of long work on standard error: a live bar in a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm

LOG_INTERVAL_S = 10.0


def progress(description: str, total: int, unit: str, enabled: bool = True) -> tqdm:
    """A tqdm bar; units other than "row" and "step" are counted in thousands and millions. Only rank 0 enables it."""
    live = sys.stderr.isatty()
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        unit_scale=unit not in ("row", "step"),
        disable=not enabled,
        mininterval=0.1 if live else LOG_INTERVAL_S,
        maxinterval=LOG_INTERVAL_S,
        dynamic_ncols=live,
        file=sys.stderr,
    )
