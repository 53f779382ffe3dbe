"""AMX's tile unit where the processor has none: trap.cc, preloaded into a process, emulates its instructions."""

import numpy as np


def configuration(tiles: dict[int, tuple[int, int]], palette: int = 1) -> np.ndarray:
    """The 64 bytes that ldtilecfg reads; tiles: (rows, bytes of a row) by number."""
    found = np.zeros(64, np.uint8)
    found[0] = palette
    for tile, (rows, row_bytes) in tiles.items():
        found[48 + tile], found[16 + 2 * tile] = rows, row_bytes
    return found
