"""Logits and greedy tokens of our network for a checkpoint folder, for the comparisons with transformers."""

from pathlib import Path

import numpy as np

from predict.engine.batch import StepBatch, pack_scoring
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
    return pack_scoring(sequence, num_tokens)._replace(sample_rows=np.arange(num_tokens, dtype=np.int32))


def logits_in_chunks(runner: DynamicRunner, token_ids: list[int], sizes: list[int]) -> np.ndarray:
    """Logits [L, V] of every position, computed in chunks of the given sizes (which add up to L)."""
    sequence = Sequence(token_ids, SamplingParams())
    # Pages in an order of their own: nothing may depend on where they lie.
    needed = -(-len(token_ids) // runner.block_size)
    sequence.block_ids.extend(np.random.default_rng(len(token_ids)).permutation(runner.num_blocks)[:needed].tolist())
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
    engine = Engine(ours, (), max_model_len=ours.num_blocks * BLOCK_SIZE)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for delta in engine.step():
            outputs[int(delta.request_id)] += delta.token_ids
    return outputs
