"""What test_mock_device.py runs on a mock device whose kernels are the CUDA ones, compiled for the CPU."""

import os

import numpy as np
import pytest

from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.weights import DEMO

PROMPTS = [list(range(40, 59)), list(range(300, 305)), list(range(40, 58))]  # two begin with a page's worth of tokens
PARAMS = [
    SamplingParams(max_tokens=6),
    SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(max_tokens=4, repetition_penalty=1.1),
]
EVALUATION = DEMO / "eval.txt"
# Mean distance of a token's log-probability. bfloat16 on the CPU is 0.007 from float32 on this text: sums in another
# order round activations otherwise, and once in a while choose another expert.
TOLERANCE = 0.015


def open_llm(mode: str, quant_type: str, device: str, **settings) -> LLM:
    return LLM(
        DEMO if mode == "dynamic" else os.environ[f"EXPORTED_{quant_type}"],
        mode=mode,
        dtype="bfloat16",
        quant_type=quant_type or None,
        block_size=None if mode == "static" else 16,
        kv_cache_memory=4 << 20,
        threads=1,
        device=device,
        **settings,
    )


@pytest.mark.parametrize("quant_type", ["", "weight_only_int8"])
def test_the_network_on_the_cuda_kernels_thinks_as_on_the_cpus(quant_type):
    cpu, gpu = (open_llm("dynamic", quant_type, device) for device in ("cpu", "gpu"))
    ids = cpu.tokenizer.encode(EVALUATION.read_text(encoding="utf-8"))[:150]
    assert np.abs(np.subtract(gpu.score(ids), cpu.score(ids))).mean() < TOLERANCE


@pytest.mark.parametrize("quant_type", ["", "weight_only_int8"])
def test_tokens_do_not_depend_on_batch_chunks_cache_or_mode(quant_type):
    together = open_llm("dynamic", quant_type, "gpu").generate(PROMPTS, PARAMS)
    expected = [(c.token_ids, c.logprobs) for c in together]
    chunked = open_llm("dynamic", quant_type, "gpu", max_num_batched_tokens=7)
    alone = [chunked.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    assert [(c.token_ids, c.logprobs) for c in alone] == expected
    assert chunked.engine.stats().prefix_hit_tokens > 0
    static = open_llm("static", quant_type, "gpu").generate(PROMPTS, PARAMS)
    assert [(c.token_ids, c.logprobs) for c in static] == expected
