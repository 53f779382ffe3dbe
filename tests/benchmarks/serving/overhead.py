"""What a step costs around the model: the engine on a runner that answers at once."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from predict.engine.batch import StepBatch, StepResult
from predict.engine.engine import Engine
from predict.engine.request import MAX_TOP_LOGPROBS, SamplingParams
from predict.llm import LLM
from predict.model.tokenizer import IncrementalDetokenizer
from tests.benchmarks.serving.measure import percentiles
from tests.benchmarks.serving.workload import FIRST_TOKEN, SEED

SEQUENCES = 64
STEPS = 500
PROMPT_LEN = 1000
MAX_LENGTH = 2048
LIMIT_S = 300e-6  # what a step without text may take


class NullRunner:
    """Draws tokens from a list made before."""

    block_size = 64
    num_blocks = SEQUENCES * MAX_LENGTH // block_size

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.tokens = np.random.default_rng(SEED).integers(FIRST_TOKEN, vocab_size, (STEPS, SEQUENCES), np.int32)
        self.logprobs = np.zeros(SEQUENCES, np.float32)
        self.top_ids = np.zeros((SEQUENCES, MAX_TOP_LOGPROBS), np.int32)
        self.top_logprobs = np.zeros((SEQUENCES, MAX_TOP_LOGPROBS), np.float32)
        self.steps = 0

    def step(self, batch: StepBatch) -> StepResult:
        rows = len(batch.sample_rows)
        self.steps += 1
        return StepResult(
            self.tokens[self.steps % STEPS, :rows], self.logprobs[:rows], self.top_ids[:rows], self.top_logprobs[:rows]
        )


def decoding_engine(runner: NullRunner, llm: LLM | None, **params: Any) -> Engine:
    """An engine whose every step, STEPS times over, decodes a token of each of its SEQUENCES.

    Args:
        llm: its tokenizer makes text; None: there is no text.
        params: of all requests.
    """
    text = None if llm is None else lambda prompt: IncrementalDetokenizer(llm.tokenizer, prompt)
    engine = Engine(runner, (), MAX_LENGTH, max_num_seqs=SEQUENCES, new_detokenizer=text)
    rng = np.random.default_rng(SEED)
    for i in range(SEQUENCES):
        # Of different lengths, so that they do not all need a page in the same step.
        prompt = rng.integers(FIRST_TOKEN, runner.vocab_size, PROMPT_LEN - i).tolist()
        engine.add(str(i), prompt, SamplingParams(max_tokens=MAX_LENGTH - PROMPT_LEN, **params))
    while len(engine.step()) < SEQUENCES:
        pass
    return engine


def overhead(llm: LLM, say: Callable[[str], object]) -> dict[str, Any]:
    """Seconds of decode steps of SEQUENCES sequences."""
    found = {}
    for name, text, params in (
        ("tokens only", None, {}),
        ("penalties, no text", None, {"repetition_penalty": 1.1}),
        ("text", llm, {}),
        ("text, two stop strings", llm, {"stop": ("\n\nUser:", "</answer>")}),
    ):
        found[name] = percentiles(step_seconds(decoding_engine(NullRunner(llm.tokenizer.vocab_size), text, **params)))
        say(f"engine alone, {name}: {1e6 * found[name]['p50']:.0f} us a step")
    return {
        "sequences": SEQUENCES,
        "steps": STEPS,
        "context_len": PROMPT_LEN,
        "limit_s": LIMIT_S,
        "within_limit": found["tokens only"]["p50"] < LIMIT_S,
        "step_s": found,
    }


def step_seconds(engine: Engine) -> list[float]:
    """How long each of STEPS steps took."""
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        deltas = engine.step()
        seconds.append(time.perf_counter() - began)
        assert len(deltas) == SEQUENCES, "a sequence has ended: the step was not one of all of them"
    return seconds
