"""Rank 0 runs the engine, the other ranks follow: the same steps, an orderly end, and an error when one dies."""

import hashlib
import os
import signal
import time

import numpy as np
import pytest

from ops.collective import join_group
from predict.engine.batch import pack
from predict.engine.engine import Engine
from predict.engine.request import SamplingParams
from predict.followers import RankedRunner, follow
from tests.ops.test_collective import JOIN_TIMEOUT, repeat, run_ranks
from tests.predict.paged_runner import PagedRunner, run, tokens_of
from tests.predict.test_engine import chunk


def digest(runner: PagedRunner) -> str:
    """SHA-256 of all that a runner was asked."""
    arrays = [array for batch in runner.steps for array in batch.arrays()]
    return hashlib.sha256(b"".join(a.tobytes() + str((a.shape, a.dtype)).encode() for a in arrays)).hexdigest()


def requests() -> list[tuple[list[int], SamplingParams]]:
    random = np.random.default_rng(0)
    found = []
    for i in range(20):
        options: dict = {"repetition_penalty": 1.5} if i % 3 == 0 else {"logit_bias": {i: 2.5}, "n": 2}
        prompt = random.integers(0, 50, random.integers(1, 60)).tolist()
        found.append((prompt, SamplingParams(max_tokens=8, temperature=0.5, seed=2**62 + i, **options)))
    return found


def serve(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT, step_timeout_s=np.inf)
    runner = PagedRunner()
    if rank > 0:
        follow(runner)
        return digest(runner), None
    ranked = RankedRunner(runner)
    engine = Engine(ranked, (3,), 100)
    for i, request in enumerate(requests()):
        engine.add(str(i), *request)
    tokens = {sample: tokens_of(deltas) for sample, deltas in run(engine).items()}
    ranked.check()
    ranked.close()
    return digest(runner), tokens


@pytest.mark.parametrize("world", [2, 3])
def test_followers_make_the_steps_of_rank_0(world):
    (first, tokens), *others = run_ranks(serve, world)
    assert [other for other, _ in others] == [first] * (world - 1)
    alone = Engine(PagedRunner(), (3,), 100)
    for i, request in enumerate(requests()):
        alone.add(str(i), *request)
    assert tokens == {sample: tokens_of(deltas) for sample, deltas in run(alone).items()}


def follower_dies(name, rank, world, while_it_computes):
    join_group(name, rank, world, JOIN_TIMEOUT, step_timeout_s=np.inf)
    runner = PagedRunner()
    if rank == 1:
        runner.step = lambda batch: os.kill(os.getpid(), signal.SIGKILL)
        follow(runner)
    ranked = RankedRunner(runner)
    ranked.step(pack([chunk([1, 2])]))
    start = time.monotonic()
    with pytest.raises(ValueError, match="another rank of this job died"):
        repeat((lambda: ranked.step(pack([chunk([1, 2])]))) if while_it_computes else ranked.check)
    return time.monotonic() - start


@pytest.mark.parametrize("while_it_computes", [True, False])
def test_a_follower_that_dies_is_noticed_busy_or_idle(while_it_computes):
    assert run_ranks(follower_dies, 2, while_it_computes, silent=[1])[0] < 3


def rank_0_dies(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT, step_timeout_s=np.inf)
    if rank == 0:
        RankedRunner(PagedRunner()).step(pack([chunk([1, 2])]))
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ValueError, match="broadcast: another rank of this job died"):
        follow(PagedRunner())
    return time.monotonic() - start


def test_followers_end_when_rank_0_dies():
    assert run_ranks(rank_0_dies, 2, silent=[0])[0] < 5


def sigterm(name, rank, world):
    join_group(name, rank, world, JOIN_TIMEOUT, step_timeout_s=np.inf)
    if rank > 0:
        runner = PagedRunner()
        runner.step = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
        follow(runner)
        return "ended in order"
    ranked = RankedRunner(PagedRunner())
    for _ in range(3):
        ranked.step(pack([chunk([1, 2])]))
    ranked.close()
    return "closed"


def test_sigterm_is_left_to_rank_0():
    assert run_ranks(sigterm, 2) == ["closed", "ended in order"]
