"""Progress of long work on standard error: a live bar in a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm

LOG_INTERVAL_S = 10.0


def progress(description: str, total: int, unit: str, enabled: bool = True, initial: int = 0) -> tqdm:
    """A tqdm bar; units other than "row" and "step" are counted in thousands and millions. Only rank 0 enables it.

    What an earlier run has done is ``initial``. Every update, be it by 0, may draw the bar anew.
    """
    live = sys.stderr.isatty()
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit not in ("row", "step"),
        disable=not enabled,
        miniters=0,
        mininterval=0.1 if live else LOG_INTERVAL_S,
        maxinterval=LOG_INTERVAL_S,
        dynamic_ncols=live,
        file=sys.stderr,
    )
