"""Random weights that a device makes: one block of random tiles is copied to it, and every weight is a window of that.

Tens of gigabytes of random numbers take minutes to draw, round, pack and copy; copies within a GPU's memory should take
tens of milliseconds. The block has a prime number of tiles, so that where a weight is longer than the block its tiles
recur in other columns: no two of its rows are alike. Nor are two layers, whose windows begin elsewhere.
"""

import zlib

import numpy as np

# By name: NumPy imports its random numbers when they are first used, and an interrupt inside that import is lost.
from numpy.random import SFC64, Generator
from paddle import nn
from paddle.base.core import Place

from ops.device import copy_on_device, synchronize
from predict.model.memory import empty, empty_on_device, host_view, on_device

TILES = 2**17 - 1  # a prime
TILE_BYTES = 2048  # of every packed layout: ops.quantize.packed_shape
CHUNK = 1 << 20  # weights drawn at a time: NumPy makes 8 bytes of each byte it looks a weight up by


class Noise:
    """A block of random tiles in a device's memory.

    Args:
        place: the device.
        words: the 256 weights there are, as packed layouts hold them: uint8, or of 16 bits as uint16.
        seed: another one, other weights.
    """

    def __init__(self, place: Place, words: np.ndarray, seed: int):
        self.place, self.seed = place, seed
        block = empty([TILES * TILE_BYTES // words.itemsize], "uint8" if words.itemsize == 1 else "bfloat16")
        random, drawn = Generator(SFC64(seed)), host_view(block)
        for at in range(0, len(drawn), CHUNK):
            part = drawn[at : at + CHUNK]
            part[...] = words[np.frombuffer(random.bytes(len(part)), np.uint8)]
        self.block = on_device(block, place)
        synchronize(place)  # what wrote the block, or used the memory that weights are given, is done

    @staticmethod
    def set_tokens_apart(embedding: np.ndarray) -> None:
        """Multiplies a table of bfloat16 (its bits as uint16) or float16 by 2^12, in place: from hundredths to tens.

        Each layer adds numbers of about 1 to the residual stream, which drown smaller ones: then attention makes all
        tokens alike, and they choose the same experts. Of 32 layers of 8 experts, 8 tokens hit 3, and 6 of them the
        same one; with this they hit 7, and 3 or 4 the same one.
        """
        bits, mantissa = embedding.view(np.uint16), 10 if embedding.dtype == np.float16 else 7
        bits += np.where(bits & 0x7FFF, np.uint16(12 << mantissa), np.uint16(0))

    def first_tile(self, name: str) -> int:
        """Where in the block the weight of a name begins."""
        return int(Generator(SFC64([self.seed, zlib.crc32(name.encode())])).integers(TILES))

    def make(self, layer: nn.Layer, weight: str, name: str) -> int:
        """Puts random tiles on the device in the place of a layer's packed ``weight``, a tensor on the CPU.

        The device may still be at work when this returns: :func:`ops.device.synchronize`.

        Args:
            name: another one, other weights.

        Returns:
            How many weights they are.

        Raises:
            MemoryError: the device has no room for it.
        """
        old = getattr(layer, weight)
        made = empty_on_device(old.shape, str(old.dtype).removeprefix("paddle."), self.place)
        done, size, at = 0, made.size * made.element_size(), self.first_tile(name) * TILE_BYTES
        while done < size:
            count = min(size - done, TILES * TILE_BYTES - at)
            copy_on_device(self.place, made.data_ptr() + done, self.block.data_ptr() + at, count)
            done, at = done + count, 0
        setattr(layer, weight, made)
        return made.size
