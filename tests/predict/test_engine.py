"""The engine on integers: a runner that computes nothing but remembers what it was asked."""

import numpy as np
import pytest

from predict.engine.batch import Chunk, pack
from predict.engine.block_manager import BlockManager
from predict.engine.engine import Engine
from predict.engine.request import SamplingParams, Sequence

EOS = 2


class Counting:
    """A runner whose next token is the last one plus one, and which checks that every position is written once."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.steps: list = []

    def step(self, batch):
        self.steps.append(batch)
        assert batch.cu_seqlens[-1] == len(batch.token_ids)
        assert (np.diff(batch.cu_seqlens) > 0).all()
        for i, table in enumerate(batch.block_tables):
            needed = batch.context_lens[i] + batch.cu_seqlens[i + 1] - batch.cu_seqlens[i]
            assert (table[: -(-needed // self.block_size)] >= 0).all()
        tokens = batch.token_ids[batch.sample_rows] + 1
        return tokens.astype(np.int32), -tokens.astype(np.float32)


def generate(prompts, runner=None, total=100, budget=2048, **params):
    sequences = [Sequence(list(p), SamplingParams(**params)) for p in prompts]
    engine = Engine(runner or Counting(), (EOS,), total, budget)
    engine.generate(sequences)
    assert engine.block_manager.num_free == engine.block_manager.num_blocks
    return sequences


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 2048])
def test_chunks_change_nothing(budget):
    prompts = [[10], [20, 30, 40], list(range(50, 63))]
    sequences = generate(prompts, budget=budget, max_tokens=5)
    assert [s.output_ids for s in sequences] == [[p[-1] + i for i in range(1, 6)] for p in prompts]
    assert [s.finish_reason for s in sequences] == ["length"] * 3
    assert sequences[1].logprobs == [-41.0, -42.0, -43.0, -44.0, -45.0]


def test_no_step_is_larger_than_its_budget():
    runner = Counting()
    generate([list(range(100, 120)), list(range(200, 230))], runner, max_tokens=3, budget=8)
    assert max(len(s.token_ids) for s in runner.steps) == 8


def test_end_of_sequence_stops_unless_ignored():
    [stopped] = generate([[0]], max_tokens=10)
    assert (stopped.output_ids, stopped.finish_reason) == ([1, EOS], "stop")
    [ignored] = generate([[0]], max_tokens=4, ignore_eos=True)
    assert (ignored.output_ids, ignored.finish_reason) == ([1, 2, 3, 4], "length")


def test_total_length_is_a_bound():
    [sequence] = generate([[10, 11, 12]], total=5, max_tokens=50)
    assert (sequence.output_ids, sequence.finish_reason) == ([13, 14], "length")


def test_finished_sequences_leave_the_batch():
    runner = Counting()
    generate([[0], [10]], runner, max_tokens=4)
    assert [len(s.context_lens) for s in runner.steps] == [2, 2, 1, 1]


def test_every_token_is_announced_in_order():
    seen = []
    sequences = [Sequence([5], SamplingParams(max_tokens=3)), Sequence([50], SamplingParams(max_tokens=2))]
    Engine(Counting(), (EOS,), 100).generate(sequences, lambda sequence, token: seen.append(token))
    assert seen == [6, 51, 7, 52, 8]


def test_too_little_memory_is_an_error_with_numbers_and_loses_no_block():
    engine = Engine(Counting(num_blocks=3), (EOS,), 100)
    with pytest.raises(MemoryError, match="9 tokens need 3 KV cache blocks of 4, 2 of 3 are free"):
        engine.generate([Sequence([1], SamplingParams(max_tokens=2)), Sequence([1], SamplingParams(max_tokens=8))])
    assert engine.block_manager.num_free == 3


def test_scoring_asks_for_every_following_token():
    runner = Counting()
    sequence = Sequence([7, 8, 9, 10, 11], SamplingParams())
    Engine(runner, (EOS,), 100, max_num_batched_tokens=3).score(sequence)
    assert len(sequence.logprobs) == 4
    forced = np.concatenate([s.sampling_ints[:, 3] for s in runner.steps])
    assert forced.tolist() == [8, 9, 10, 11]


def test_history_is_sent_only_for_penalties():
    plain, penalised = Sequence([5, 6], SamplingParams()), Sequence([7, 8, 9], SamplingParams(repetition_penalty=1.5))
    plain.block_ids = penalised.block_ids = [0, 1]
    penalised.token_ids.append(10)
    batch = pack([Chunk(plain, 2), Chunk(penalised, 4)])
    assert batch.history_offsets.tolist() == [0, 0, 4]
    assert batch.history_ids.tolist() == [7, 8, 9, 10]
    assert batch.sampling_ints[1].tolist() == [0, 4, 0, -1, 3]
    assert batch.sample_rows.tolist() == [1, 5]


def test_a_step_in_mid_prompt_still_samples_one_row():
    sequence = Sequence([5, 6, 7], SamplingParams(temperature=1.0))
    sequence.block_ids = [0]
    batch = pack([Chunk(sequence, 2)])
    assert batch.sample_rows.tolist() == [1]
    assert batch.sampling_floats[0, 0] == 0.0


def test_blocks_come_back():
    manager = BlockManager(4, 8)
    first, second = manager.allocate(9), manager.allocate(8)
    assert (first, second, manager.num_free) == ([0, 1], [2], 1)
    manager.free(first)
    assert manager.num_free == 3
    assert manager.allocate(17) == [0, 1, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("seed", -1),
    ],
)
def test_sampling_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*, needs"):
        SamplingParams(**{name: value})
