"""What test_mock_device.py runs in a process that has had the mock device since it imported Paddle."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import paddle
import pytest

from ops.counters import Counters
from ops.device import device_memory, gpu_place, runtime
from ops.embedding import embedding
from ops.linear import linear
from ops.norm import rms_norm
from ops.quantize import quantize_int8
from predict.bench.command import main as bench
from predict.engine.batch import INPUT_NAMES, StepResult
from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.config import MixtralConfig
from predict.model.noise import TILE_BYTES, TILES
from predict.model.weights import DEMO, DummyWeights, convert, dummy_config, load
from predict.parallel import Ranks

PROMPT = list(range(40, 180))
# Sampling of every kind, several samples, log-probabilities; and prompts that begin alike, longer than a step's tokens.
REQUESTS = [
    (PROMPT, SamplingParams(max_tokens=12, logprobs=5)),
    (PROMPT[:9], SamplingParams(max_tokens=9, temperature=0.9, top_p=0.8, top_k=50, min_p=0.01, seed=7, n=3)),
    ([*PROMPT, 5, 6], SamplingParams(max_tokens=12, temperature=1.0, seed=1, repetition_penalty=1.2, logprobs=20)),
    (PROMPT[:20], SamplingParams(max_tokens=5, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={13: -4.0})),
]
KINDS = [(mode, quant_type) for mode in ("dynamic", "static") for quant_type in ("", "weight_only_int8")]
PLACE = gpu_place()


def open_llm(mode: str, quant_type: str, device: str, ranks: Ranks | None = None) -> LLM:
    model = DEMO if mode == "dynamic" else os.environ[f"EXPORTED_bfloat16_{quant_type}"]
    return LLM(
        model,
        mode=mode,
        dtype="bfloat16",
        quant_type=quant_type or None,
        max_num_batched_tokens=16,  # prompts are cut into chunks
        block_size=None if mode == "static" else 8,  # small enough for prompts to share pages
        kv_cache_memory=8 << 20,
        threads=1,
        device=device,
        ranks=ranks,
    )


def answers(llm: LLM) -> list:
    """All requests at once, and once more, when their prompts are in the cache."""
    prompts, params = map(list, zip(*REQUESTS, strict=True))
    found = [llm.generate(prompts, params) for _ in range(2)]
    return [(c.token_ids, c.logprobs, c.top_logprobs, c.finish_reason) for run in found for c in run]


@pytest.mark.parametrize(("mode", "quant_type"), KINDS)
def test_tokens_and_logprobs_are_the_cpus(mode, quant_type):
    cpu, gpu = (open_llm(mode, quant_type, device) for device in ("cpu", "gpu"))
    assert answers(gpu) == answers(cpu)
    # llm.score takes another way through the step.
    assert gpu.score(PROMPT) == cpu.score(PROMPT)
    assert gpu.engine.stats().prefix_hit_tokens > 0
    weights = gpu.runner.model.buffers() if mode == "dynamic" else gpu.runner.weights.values()
    assert all(tensor.place.is_custom_place() for tensor in [*weights, *gpu.runner.caches])


@pytest.mark.parametrize(("mode", "quant_type"), KINDS)
def test_a_step_copies_the_inputs_that_changed_up_and_the_outputs_asked_for_down(mode, quant_type):
    llm = open_llm(mode, quant_type, "gpu")
    steps, before = [], runtime().copies()
    step = llm.runner.step
    llm.runner.step = lambda batch: steps.append(batch) or step(batch)
    answers(llm)
    up, down, across = (b - a for a, b in zip(before, runtime().copies(), strict=True))
    assert len(steps) > 20
    pairs = [zip(old.arrays(), new.arrays(), strict=True) for old, new in pairwise(steps)]
    changed = [not np.array_equal(old, new) for pair in pairs for old, new in pair]
    assert up == len(INPUT_NAMES) + sum(changed)
    assert not all(changed)
    asking = sum(batch.wants_top_logprobs for batch in steps)
    assert 0 < asking < len(steps)
    assert down == len(steps) * 2 + asking * (len(StepResult._fields) - 2)
    assert across == 0


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_row_without_an_answer_is_the_cpus_sentence(mode):
    llm = open_llm(mode, "", "gpu")
    norm = llm.runner.model.norm if mode == "dynamic" else llm.runner.weights["norm"]
    bad = paddle.full(norm.shape, float("nan"), device=paddle.CPUPlace())._copy_to(PLACE, True)
    if mode == "dynamic":
        llm.runner.model.norm = bad
    else:
        llm.runner.predictor.get_input_handle("norm").share_external_data(bad)
    with pytest.raises(ValueError, match="sample: row 0 of logits holds NaN or"):
        llm.generate([PROMPT], SamplingParams(max_tokens=1))


@pytest.mark.parametrize("quant_type", [None, "weight_only_int8"])
def test_a_device_makes_a_dummys_large_weights_itself(quant_type):
    config = dummy_config("dummy:demo", None)
    before = runtime().copies()
    made = dict(load(config, DummyWeights(config), "bfloat16", quant_type, place=PLACE).named_buffers())
    across = runtime().copies()[2] - before[2]
    of_cpu = dict(load(config, DummyWeights(config), "bfloat16", quant_type).named_buffers())
    noise = DummyWeights(config).noise(PLACE, "bfloat16", quant_type)
    tiles = noise.block.numpy().view(np.uint8).reshape(TILES, TILE_BYTES)
    starts = {}
    for name, buffer in made.items():
        assert buffer.place.is_custom_place()
        if name.endswith(("weight", "w13", "w2")):  # a window of the block, and each another one
            found = buffer.numpy().view(np.uint8).reshape(-1, TILE_BYTES)
            [starts[name]] = np.flatnonzero((tiles == found[0]).all(axis=1))
            assert np.array_equal(found, tiles[(starts[name] + np.arange(len(found))) % TILES])
        elif name.endswith("scale"):  # a row of the CPU's may lack the largest weight, 127
            assert np.allclose(buffer.numpy(), of_cpu[name].numpy(), rtol=0.1)
        elif name != "embed_tokens":
            assert np.array_equal(buffer.numpy(), of_cpu[name].numpy())
    assert len(set(starts.values())) == len(starts) == 4 * config.num_hidden_layers + 1
    assert len(starts) <= across <= 2 * len(starts)


def test_a_devices_dummy_has_the_same_numbers_in_float16():
    config = dummy_config("dummy:demo", 1)
    made = [load(config, DummyWeights(config), dtype, place=PLACE) for dtype in ("bfloat16", "float16")]
    for (name, of_bfloat16), (_, of_float16) in zip(*(model.named_buffers() for model in made), strict=True):
        found, expected = of_float16.numpy(), of_bfloat16.numpy()
        expected = convert(expected, "bfloat16", "float16") if expected.dtype == np.uint16 else expected
        assert found.dtype == expected.dtype, name
        assert np.array_equal(found, expected), name


@pytest.mark.parametrize("quant_type", [None, "weight_only_int8"])
def test_a_windows_end_is_followed_by_the_blocks_beginning(quant_type, monkeypatch):
    monkeypatch.setattr("predict.model.noise.TILES", 7)
    config = dummy_config("dummy:demo", 1)
    made = load(config, DummyWeights(config), "bfloat16", quant_type, place=PLACE).layers[0].w13
    tiles = made.numpy().view(np.uint8).reshape(-1, TILE_BYTES)
    assert len(tiles) > 4 * 7
    assert np.array_equal(tiles[7:], tiles[:-7])
    assert len(np.unique(tiles, axis=0)) == 7


def test_a_dummys_experts_are_all_hit():
    llm = LLM("dummy:demo", dtype="bfloat16", kv_cache_memory=8 << 20, threads=1, device="gpu")
    before = Counters.read()
    scores = llm.score(np.random.default_rng(0).integers(0, llm.config.vocab_size, 64).tolist())
    added = Counters.read().since(before)
    assert np.isfinite(scores).all()
    assert added.experts_hit / added.moe_calls > 7.5  # of 8
    assert added.busiest_tokens / added.moe_calls < 32  # of 64; 16 if they were even


def test_a_dummy_whose_tiles_are_not_full_is_packed_by_the_cpu():
    config = MixtralConfig.read(Path("tests/golden/odd_sizes/config.json"))
    made, of_cpu = (
        dict(load(config, DummyWeights(config), "bfloat16", "a8w8", place=place).named_buffers())
        for place in (PLACE, None)
    )
    for name in made.keys() - {"embed_tokens"}:
        assert np.array_equal(made[name].numpy(), of_cpu[name].numpy()), name


def test_memory_is_given_back():
    """Eight times what the device has, piece by piece."""
    free = device_memory(PLACE)[1]
    for _ in range(16):
        held = paddle.empty([1 << 29], "uint8", device=PLACE)
        assert device_memory(PLACE)[1] <= free - (1 << 29)
        del held


def test_more_cache_than_memory_is_refused():
    with pytest.raises(MemoryError, match=r"kv_cache_memory is 2\.000 GB, more than there is free for a rank"):
        LLM(DEMO, dtype="bfloat16", kv_cache_memory=2_000_000_000, device="gpu")


def test_tensors_of_two_devices_are_refused_by_name():
    x, weight = paddle.zeros([2, 16])._copy_to(PLACE, True), paddle.ones([16])
    with pytest.raises(
        ValueError, match=r"rms_norm: weight is on Place\(cpu\), but residual is on Place\(pm_mock:0\); m"
    ):
        rms_norm(x, weight, 1e-5, "bfloat16")


def test_types_without_a_kernel_on_devices_are_refused_by_name():
    x = paddle.zeros([2, 16])._copy_to(PLACE, True)
    with pytest.raises(ValueError, match="linear: x is float32, needs bfloat16 or float16"):
        linear(x, x, 2, "float32")
    with pytest.raises(ValueError, match="rms_norm: out_dtype is 'float32', needs bfloat16 or float16"):
        rms_norm(x, paddle.ones([16])._copy_to(PLACE, True), 1e-5, "float32")
    with pytest.raises(ValueError, match="weights are quantised on the CPU, before they are copied to a device"):
        quantize_int8(x)


def test_the_kernels_own_words_reach_the_caller():
    table = paddle.zeros([4, 8], "float16")._copy_to(PLACE, True)  # which the CPU's kernels do not have
    ids = paddle.to_tensor(np.zeros(2, np.int32), place=PLACE)
    with pytest.raises(ValueError, match="embedding: mock device: an argument is float16, or points to what is no mem"):
        embedding(ids, table)


TINY_BENCH = ["--dtype", "bfloat16", "--quant_type", "wint8", "--gen_len", "3", "--repeat", "2", "--batch_size", "1,4"]
TINY_BENCH += ["--prompt_len", "70", "--context_len", "9", "--batch_context_len", "9", "--max_num_batched_tokens", "64"]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_bench_of_a_device(mode, tmp_path, capsys):
    before, json_file = Counters.read(), tmp_path / "run.json"
    assert bench(["dummy:demo", "--device", "gpu", "--mode", mode, *TINY_BENCH, "--json", str(json_file)]) == 0
    added = Counters.read().since(before)  # the mock device's kernels are the CPU's
    table, found = capsys.readouterr().out, json.loads(json_file.read_text())
    assert found["model"]["mode"] == mode
    assert found["machine"]["device"]["name"] == "host memory"
    assert added.moe_calls == 5 * (1 + 2 * (2 + 4 + 4))  # contexts; twice: a prompt in two steps, and four steps each
    prefill, alone, together = found["measurements"]
    assert alone["experts_hit"] == 2
    assert 2 < together["experts_hit"] <= 8
    assert prefill["busiest_share"] < 0.5
    assert all(entry["share_of_memory_rate"] > 0 for entry in found["measurements"])
    # What cannot be measured here is not made up.
    for entry in found["measurements"]:
        assert entry["share_of_matrix_rate"] is entry["outside_kernels_s"] is entry["share_outside_kernels"] is None
        assert entry["kernel_share"] == {}
    assert found["ceilings"]["memory_kind"] == "copy"
    assert found["ceilings"]["matrix"] == {}
    assert "matrix rate: not measured (this device is no NVIDIA GPU)" in table
    assert "share of the time" not in table


BENCH_REFUSED = {
    "dummy:mixtral-8x7b --dtype bfloat16": "the weights need 93.4 GB and the KV cache 1.6 GB, the GPU has ",
    "dummy:demo --dtype float32": "--dtype is float32, which runs on CPUs only; use --dtype bfloat16 or float16",
    "dummy:demo --plot a.png": "--plot draws the CPU's kernels under its ceilings; leave it out beside --device gpu",
}


@pytest.mark.parametrize("flags", BENCH_REFUSED)
def test_the_bench_refuses_what_a_device_cannot_do(flags, capsys):
    assert bench([*flags.split(), "--device", "gpu"]) == 1
    assert BENCH_REFUSED[flags] in capsys.readouterr().err
