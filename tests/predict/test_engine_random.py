"""The engine under random requests, aborts and preemptions, without a model: nothing is lost, doubled or changed."""

import random

import pytest

from predict.engine.engine import Engine
from predict.engine.request import SamplingParams
from tests.predict.invariants import check_invariants
from tests.predict.paged_runner import PagedRunner, expected, tokens_of

EOS = 0
STEPS = 20_000  # of each of the five engines below
LONGEST = 32


class Crowd:
    """Users of an engine: they send requests, some of which begin alike, lose patience, and check every answer."""

    def __init__(self, engine: Engine, seed: int):
        self.engine, self.random = engine, random.Random(seed)
        self.runner: PagedRunner = engine.runner
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.deltas: dict[tuple[str, int], list] = {}
        self.open: dict[str, set[int]] = {}
        self.aborted: set[str] = set()
        self.added = self.finished = 0

    def add(self) -> None:
        choice = self.random
        trunk = [choice.randrange(2) for _ in range(2)] * 8  # one of four beginnings
        prompt = trunk[: choice.randrange(1, 16)] + [choice.randrange(50) for _ in range(choice.randrange(4))]
        max_tokens = choice.randrange(1, 20)
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=choice.choice([0, 0, choice.randrange(max_tokens + 1)]),
            seed=choice.randrange(3),
            n=choice.choice([1, 1, 1, 2, 4]),
            stop_token_ids=choice.choice([(), (1, 2, 3)]),
            ignore_eos=choice.random() < 0.5,
        )
        request_id = f"r{self.added}"
        self.engine.add(request_id, prompt, params)
        self.requests[request_id] = prompt, params
        self.open[request_id] = set(range(params.n))
        self.added += 1

    def abort(self, request_id: str) -> None:
        held = sum(len(s.block_ids) for s in self.engine.scheduler.running if s.request_id == request_id)
        before = self.engine.block_manager.num_available
        self.engine.abort(request_id)
        if self.requests.get(request_id, ([], SamplingParams()))[1].n == 1:  # samples share pages
            assert self.engine.block_manager.num_available >= before
        assert held == 0 or self.engine.block_manager.num_available > before
        if request_id in self.open:
            self.aborted.add(request_id)

    def listen(self) -> None:
        for delta in self.engine.step():
            of_sample = self.deltas.setdefault((delta.request_id, delta.index), [])
            of_sample.append(delta)
            assert delta.index in self.open[delta.request_id]
            if delta.finish_reason is None:
                continue
            self.open[delta.request_id].remove(delta.index)
            self.check(delta.request_id, delta.index)
            if not self.open[delta.request_id]:
                del self.open[delta.request_id]
                del self.requests[delta.request_id]

    def check(self, request_id: str, index: int) -> None:
        prompt, params = self.requests[request_id]
        deltas = self.deltas.pop((request_id, index))
        tokens, reason = expected(self.runner, prompt, params, index, EOS, self.engine.max_model_len)
        if deltas[-1].finish_reason == "abort":
            assert request_id in self.aborted
            assert tokens_of(deltas) == tokens[: len(tokens_of(deltas))]
        else:
            assert (tokens_of(deltas), deltas[-1].finish_reason) == (tokens, reason)
            self.finished += 1


@pytest.mark.parametrize(
    ("blocks", "block_size", "budget", "max_num_seqs", "prefix_caching"),
    [(16, 2, 6, 4, True), (9, 4, 3, 5, True), (9, 4, 64, 8, False), (40, 1, 5, 6, True), (12, 4, 16, 3, False)],
)
def test_a_hundred_thousand_random_steps(blocks, block_size, budget, max_num_seqs, prefix_caching):
    runner = PagedRunner(blocks, block_size)
    runner.keep_steps = False
    engine = Engine(
        runner,
        (EOS,),
        LONGEST,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        prefix_caching=prefix_caching,
    )
    crowd = Crowd(engine, seed=blocks * block_size)
    for _ in range(STEPS):
        if crowd.random.random() < 0.2 and len(crowd.open) < 8:
            crowd.add()
        if crowd.random.random() < 0.03:
            crowd.abort(crowd.random.choice([*crowd.open, "unknown"]))
        crowd.listen()
        check_invariants(engine)
    stats = engine.stats()
    # The run was worth watching.
    assert crowd.finished > STEPS / 20
    assert crowd.aborted
    assert stats.preemptions > 100
    assert (stats.prefix_hit_tokens > 0) == prefix_caching
    for request_id in list(crowd.open):
        crowd.abort(request_id)
    crowd.listen()
    assert not engine.has_work
    assert engine.block_manager.num_available == blocks
    assert engine.step() == []


@pytest.mark.parametrize("seed", range(10))
def test_no_request_starves(seed):
    """The bound of predict.engine.scheduler, for every request of a crowd that never stops coming."""
    blocks, budget = 10, 5
    runner = PagedRunner(blocks, block_size=4)
    engine = Engine(runner, (), LONGEST, max_num_batched_tokens=budget, max_num_seqs=4)
    choice = random.Random(seed)
    own: dict[str, int] = {}  # the bound's term of each unfinished request
    deadline: dict[str, int] = {}
    samples: dict[str, int] = {}
    for now in range(1, 3000):
        if choice.random() < 0.5 and len(own) < 30:
            length, max_tokens, n = choice.randrange(1, 24), choice.randrange(1, 9), choice.choice([1, 1, 3])
            request_id = f"r{now}"
            params = SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True)
            engine.add(request_id, [choice.randrange(50) for _ in range(length)], params)
            own[request_id] = n * (-(-(length + max_tokens) // budget) + max_tokens)
            deadline[request_id] = now - 1 + sum(own.values())
            samples[request_id] = n
        for delta in engine.step():
            if delta.finish_reason is not None:
                assert now <= deadline[delta.request_id]
                samples[delta.request_id] -= 1
                if samples[delta.request_id] == 0:
                    del own[delta.request_id]
        assert all(now < deadline[r] for r in own)
    assert engine.stats().preemptions > 0
    assert len(deadline) > 300
