"""Logits and greedy tokens of our network for a checkpoint folder, for the comparisons with transformers."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from predict.engine.batch import Chunk, StepBatch, pack
from predict.engine.engine import Engine
from predict.engine.request import SamplingParams, Sequence
from predict.model.source import find_model
from predict.model.weights import load
from predict.runner import DynamicRunner

BLOCK_SIZE = 16


def runner(
    checkpoint_dir: str | Path, dtype: str = "float32", num_blocks: int = 64, block_size: int = BLOCK_SIZE
) -> DynamicRunner:
    """The checkpoint on one rank, dynamic."""
    source = find_model(checkpoint_dir)
    return DynamicRunner(load(source.config, source.weights(), dtype), num_blocks, block_size)


def all_rows(sequence: Sequence, num_tokens: int) -> StepBatch:
    """A step over the sequence's next num_tokens tokens that samples every one of them."""
    batch = pack([Chunk(sequence, num_tokens, score=True)])
    return replace(batch, sample_rows=np.arange(num_tokens, dtype=np.int32))


def logits_in_chunks(runner: DynamicRunner, token_ids: list[int], sizes: list[int]) -> np.ndarray:
    """Logits [L, V] of every position, computed in chunks of the given sizes (which add up to L)."""
    sequence = Sequence(list(token_ids), SamplingParams())
    # Pages in an order of their own: nothing may depend on where they lie.
    needed = -(-len(token_ids) // runner.block_size)
    sequence.block_ids = np.random.default_rng(len(token_ids)).permutation(runner.num_blocks)[:needed].tolist()
    rows = []
    for size in sizes:
        rows.append(runner.logits(all_rows(sequence, size)))
        sequence.num_computed += size
    return np.concatenate(rows)


def all_logits(checkpoint_dir: str | Path, prompts: list[list[int]], dtype: str = "float32") -> list[np.ndarray]:
    """Logits [L, V] of every position of each prompt."""
    ours = runner(checkpoint_dir, dtype)
    return [logits_in_chunks(ours, list(p), [len(p)]) for p in prompts]


def greedy(
    checkpoint_dir: str | Path, prompts: list[list[int]], new_tokens: int, dtype: str = "float32"
) -> list[list[int]]:
    """new_tokens greedy tokens after each prompt, all prompts as one batch."""
    ours = runner(checkpoint_dir, dtype, num_blocks=16 * len(prompts))
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    sequences = [Sequence(list(p), params) for p in prompts]
    Engine(ours, (), total_max_length=ours.num_blocks * BLOCK_SIZE).generate(sequences)
    return [s.output_ids for s in sequences]
