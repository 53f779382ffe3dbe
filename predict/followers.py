"""One engine for many ranks: rank 0 decides what each step computes, the other ranks follow.

Where requests come from outside (a server), only rank 0 sees them, so only it runs an engine, on a RankedRunner; the
other ranks are in ``follow`` until it ends them. Runs whose requests every rank reads for itself (LLM.generate, the
predictor) need none of this: the engine is deterministic, so each rank runs its own and makes the same steps.
"""

import signal

import numpy as np

from ops.collective import broadcast, check_group
from predict.engine.batch import INPUTS, StepBatch, StepResult
from predict.engine.engine import Runner

END, STEP = 0, 1
HEADER = 1 + sum(rank for rank, _ in INPUTS.values())  # what is to be done, and every size of every array


class RankedRunner:
    """Rank 0's runner: each step is sent to the followers, then run here as they run it.

    Whoever makes one ends it with :meth:`close`; leaving the process without also ends the followers, with an error.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.num_blocks, self.block_size, self.vocab_size = runner.num_blocks, runner.block_size, runner.vocab_size

    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step on every rank.

        Raises:
            ValueError: another rank has died.
        """
        arrays = batch.arrays()
        header = np.array([STEP, *(size for array in arrays for size in array.shape)], np.int64)
        broadcast(header)
        broadcast(np.frombuffer(bytearray().join(array.tobytes() for array in arrays), np.uint8))
        return self.runner.step(batch)

    def check(self) -> None:
        """Returns at once, if all ranks live: for a server that has nothing to compute, once a second or so.

        Raises:
            ValueError: one has died.
        """
        check_group()

    def close(self) -> None:
        """Ends the followers: their :func:`follow` returns."""
        broadcast(np.array([END] + [0] * (HEADER - 1), np.int64))


def follow(runner: Runner) -> None:
    """Runs rank 0's steps on another rank until rank 0 ends it; waits for the next as long as it takes.

    The group needs a time-out that allows that: predict.parallel.run(..., step_timeout_s=math.inf). SIGTERM, which the
    launcher sends to all ranks, is left to rank 0: it may have requests to finish first. Only in a main thread.

    Raises:
        ValueError: another rank has died.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    header = np.zeros(HEADER, np.int64)
    while True:
        broadcast(header)
        what, *sizes = header.tolist()
        if what == END:
            return
        runner.step(_receive(sizes))


def _receive(sizes: list[int]) -> StepBatch:
    arrays = {}
    for name, (rank, dtype) in INPUTS.items():
        arrays[name] = np.empty(sizes[:rank], dtype)
        sizes = sizes[rank:]
    together = np.empty(sum(array.nbytes for array in arrays.values()), np.uint8)
    broadcast(together)
    start = 0
    for array in arrays.values():
        array.reshape(-1).view(np.uint8)[:] = together[start : start + array.nbytes]
        start += array.nbytes
    return StepBatch(**arrays)
