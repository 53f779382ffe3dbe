"""What test_mock_device.py runs on a mock device whose kernels are the CUDA ones, compiled for the CPU."""

import functools
import json
import os
import shutil

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.checkpoint import Checkpoint
from predict.model.weights import DEMO, convert
from predict.parallel import Ranks

PROMPTS = [list(range(40, 59)), list(range(300, 305)), list(range(40, 58))]  # two begin with a page's worth of tokens
PARAMS = [
    SamplingParams(max_tokens=6),
    SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(max_tokens=4, repetition_penalty=1.1),
]
KINDS = [
    *(("bfloat16", ""), ("bfloat16", "weight_only_int8")),
    *(("float16", ""), ("float16", "weight_only_int8"), ("float16", "a8w8")),
]
EVALUATION = DEMO / "eval.txt"
# Mean distance of a token's log-probability. bfloat16 on the CPU is 0.007 from float32 on this text: sums in another
# order round activations otherwise, and once in a while choose another expert.
TOLERANCE = 0.015


def open_llm(
    mode: str, dtype: str | None, quant_type: str, device: str, model=DEMO, ranks: Ranks | None = None, **settings
):
    return LLM(
        model if mode == "dynamic" else os.environ[f"EXPORTED_{dtype}_{quant_type}"],
        mode=mode,
        dtype=dtype,
        quant_type=quant_type or None,
        block_size=None if mode == "static" else 16,
        kv_cache_memory=4 << 20,
        threads=1,
        device=device,
        ranks=ranks,
        **settings,
    )


def answers(llm: LLM) -> list:
    return [(c.token_ids, c.logprobs) for c in llm.generate(PROMPTS, PARAMS)]


@functools.cache
def scored(dtype: str, quant_type: str, device: str, ranks: Ranks | None = None) -> np.ndarray:
    """Log-probabilities of the beginning of the held-out text."""
    llm = open_llm("dynamic", dtype, quant_type, device, ranks=ranks)
    return np.array(llm.score(llm.tokenizer.encode(EVALUATION.read_text(encoding="utf-8"))[:150]))


@pytest.mark.parametrize("quant_type", ["", "weight_only_int8"])
def test_the_network_on_the_cuda_kernels_thinks_as_on_the_cpus(quant_type):
    cpu, gpu = (scored("bfloat16", quant_type, device) for device in ("cpu", "gpu"))
    assert np.abs(gpu - cpu).mean() < TOLERANCE


@pytest.mark.parametrize("quant_type", ["", "weight_only_int8"])
def test_float16_is_nearer_to_float32_than_bfloat16(quant_type):
    """Ten bits of mantissa against seven: an eighth of the distance (measured: 1/7.9, with int8 weights 1/9.6). In the
    median, because a single token that chooses another expert outweighs all others in the mean."""
    exact = scored("float32", quant_type, "cpu")
    distance = {dtype: np.median(np.abs(scored(dtype, quant_type, "gpu") - exact)) for dtype in ("bfloat16", "float16")}
    assert 0 < distance["float16"] < distance["bfloat16"] / 5


@pytest.mark.parametrize(("dtype", "quant_type"), KINDS)
def test_tokens_do_not_depend_on_batch_chunks_cache_or_mode(dtype, quant_type):
    expected = answers(open_llm("dynamic", dtype, quant_type, "gpu"))
    chunked = open_llm("dynamic", dtype, quant_type, "gpu", max_num_batched_tokens=7)
    alone = [chunked.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    assert [(c.token_ids, c.logprobs) for c in alone] == expected
    assert chunked.engine.stats().prefix_hit_tokens > 0
    assert answers(open_llm("static", dtype, quant_type, "gpu")) == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_checkpoints_type_does_not_show_where_it_holds_the_same_numbers(dtype, tmp_path):
    """In float16, which a checkpoint of float16 runs in unless told otherwise. The demo's is bfloat16."""
    demo = Checkpoint(DEMO)
    weights = {name: convert(*demo.read(name), to="float16") for name in demo.entries}
    save_file({n: convert(w, "float16", dtype) for n, w in weights.items()}, tmp_path / "model.safetensors")
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    llm = open_llm("dynamic", None if dtype == "float16" else "float16", "", "gpu", tmp_path)
    assert llm.dtype == "float16"
    assert {str(cache.dtype) for cache in llm.runner.caches} == {"paddle.float16"}
    assert answers(llm) == answers(open_llm("dynamic", "float16", "", "gpu"))


@pytest.mark.parametrize(
    ("dtype", "quant_type", "fits"),
    [("float16", "", False), ("bfloat16", "", True), ("float16", "weight_only_int8", True)],
)
def test_experts_beyond_float16_are_an_error_not_garbage(dtype, quant_type, fits):
    """What the second product takes grows with the square of x: with these norms to about 10^6. Beside int8 weights it
    is fixed point, whose range is that of float32."""
    llm = open_llm("dynamic", dtype, quant_type, "gpu")
    for layer in llm.runner.model.layers:
        larger = layer.post_attention_layernorm.numpy() * np.float32(1000)
        layer.post_attention_layernorm = paddle.to_tensor(larger, place=llm.place)
    if fits:
        assert all(np.isfinite(c.logprobs).all() for c in llm.generate(PROMPTS, PARAMS))
    else:
        with pytest.raises(ValueError, match="sample: row 0 of logits holds NaN or"):
            llm.generate(PROMPTS, PARAMS)


def test_a_dummy_is_made_on_the_device():
    llm = open_llm("dynamic", "float16", "", "gpu", "dummy:demo")
    model = llm.runner.model
    assert {str(weight.dtype) for weight in (model.embed_tokens, model.layers[0].w13, model.lm_head.weight)} == {
        "paddle.float16"
    }
    assert all(np.isfinite(c.logprobs).all() for c in llm.generate(PROMPTS, PARAMS))
