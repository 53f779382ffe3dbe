"""paddle-mixtral bench: what it counts, what it writes and what it refuses; not how fast anything is."""

import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest

from ops.counters import Counters
from predict.bench import ceilings
from predict.bench import plan as planning
from predict.bench.command import main
from predict.bench.machine import forget_peak, peak_memory
from predict.bench.matmul import MatmulRate
from predict.bench.measure import Bench, Sample
from predict.bench.plan import Decode, Options, make_plan
from predict.bench.traffic import Traffic
from predict.llm import LLM
from predict.model.config import MixtralConfig
from predict.model.weights import DEMO
from predict.parallel import alone
from predict.predictor import main as predict

TINY = ["--prompt_len", "3,70", "--batch_size", "1,4", "--context_len", "5,130", "--batch_context_len", "9"]
TINY += ["--gen_len", "3", "--repeat", "2"]
# kind, batch_size, context_len, new_tokens
MEASURED = [("prefill", 1, 0, 3), ("prefill", 1, 0, 70)]
MEASURED += [("decode", 1, 5, 3), ("decode", 1, 130, 3), ("decode", 4, 9, 3)]
MODELS = {"demo": [], "dummy:demo": ["--num_hidden_layers", "1", "--quant_type", "wint8", "--threads", "1"]}
MODELS |= {"static": [], "traced": ["--num_hidden_layers", "1", "--mode", "static"]}


@pytest.fixture(autouse=True)
def small_read_buffer(monkeypatch):
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def eight_x_seven() -> MixtralConfig:
    return make_plan(Options("dummy:mixtral-8x7b", num_hidden_layers=2, quant_type="weight_only_int8"), 1).config


def run(flags, capsys) -> tuple[int, str, str]:
    try:
        code = main(flags)
    except SystemExit as end:  # argparse
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("model", MODELS)
def test_a_run_measures_what_was_asked_and_writes_it_down(model, exported, tmp_path, capsys):
    places = {"demo": str(DEMO), "static": str(exported("bfloat16", None)), "traced": "dummy:demo"}
    place = places.get(model, model)
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.png")]
    code, out, err = run([place, *TINY, *MODELS[model], *files], capsys)
    assert code == 0, err
    assert "measuring" in err

    found = json.loads((tmp_path / "run.json").read_text())
    entries = found["measurements"]
    keys = ("kind", "batch_size", "context_len", "new_tokens")
    assert [tuple(entry[key] for key in keys) for entry in entries] == MEASURED
    assert found["schema_version"] == 2
    assert found["command"] == [place, *TINY, *MODELS[model], *files]
    assert found["model"]["mode"] == ("static" if model in ("static", "traced") else "dynamic")
    assert found["model"]["num_hidden_layers"] == (1 if "dummy" in place else 5)
    assert found["machine"]["device"] is None
    memory = found["ceilings"]["memory"]
    assert memory["p10"] <= memory["p50"] <= memory["p90"]
    assert found["ceilings"]["matrix_unit"] in found["ceilings"]["matrix"]
    assert 0 < found["loading"]["before_bytes"] <= found["loading"]["peak_bytes"]
    for entry in entries:
        assert len(entry["samples"]) == 2 * (1 if entry["kind"] == "prefill" else 3)
        assert all(sample.keys() == {f.name for f in fields(Sample)} for sample in entry["samples"])
        assert all(0 < sum(s["kernel_s"].values()) < s["seconds"] for s in entry["samples"])
        assert {"linear", "fused_moe", "append_attention", "sample"} <= entry["kernel_share"].keys()
    assert [e["experts_hit"] for e in entries if e["batch_size"] == 1 and e["kind"] == "decode"] == [2.0, 2.0]

    header, speeds, shares, _ = out.split("\n\n")
    assert [line.split()[0] for line in header.splitlines()] == ["model", "machine", "loading", "ceilings"]
    assert len(speeds.splitlines()) == len(shares.splitlines()) == 1 + len(MEASURED)
    assert len({len(line) for line in speeds.splitlines()}) == 1, "columns are aligned"
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_active_bytes_of_8x7b(eight_x_seven):
    """919.7 M weights a token in 2 layers (attention, router, 2 of 8 experts and lm_head), as counted by hand."""
    bfloat16 = Traffic(eight_x_seven, "bfloat16", None, 1)
    weights = bfloat16.step_bytes(experts_hit=4, visible=[0])
    router = 2 * 8 * 4096
    assert weights == 2 * 919_666_688 + 2 * router  # the router is float32
    cache = bfloat16.step_bytes(4, [100, 1]) - weights
    assert cache == 101 * 2 * 2 * 8 * 128 * 2  # layers, keys and values, heads, their size, bytes
    expert = bfloat16.step_bytes(5, [0]) - weights
    assert expert == 2 * 3 * 4096 * 14336
    int8 = Traffic(eight_x_seven, "bfloat16", "weight_only_int8", 1)
    assert int8.step_bytes(5, [0]) - int8.step_bytes(4, [0]) == expert // 2 + 4 * (2 * 14336 + 4096)
    halves = Traffic(eight_x_seven, "bfloat16", None, 2)
    assert 2 * (halves.step_bytes(4, [100]) - 4 * router) == bfloat16.step_bytes(4, [100]) - 4 * router
    assert replace(bfloat16, dtype="float16").step_bytes(4, [100]) == bfloat16.step_bytes(4, [100])


def test_operations_of_8x7b(eight_x_seven):
    traffic = Traffic(eight_x_seven, "bfloat16", None, 1)
    head, keys = 32000 * 4096, 2 * 2 * 32 * 128  # two layers; q k^T and the sum of v; heads and their size
    assert traffic.step_operations([(0, 1)], rows=1) == 2 * (919_666_688 + keys)
    assert traffic.step_operations([(9, 1)], rows=1) == 2 * (919_666_688 + 10 * keys)
    assert traffic.step_operations([(0, 3)], rows=1) == 2 * (3 * (919_666_688 - head) + head + (1 + 2 + 3) * keys)
    assert traffic.step_operations([(0, 2), (5, 1)], rows=2) == sum(
        traffic.step_operations([chunk], rows=1) for chunk in [(0, 2), (5, 1)]
    )
    windowed = replace(traffic, config=replace(eight_x_seven, sliding_window=4))
    assert windowed.step_operations([(9, 1)], rows=1) == 2 * (919_666_688 + 4 * keys)


class Recorder:
    """A runner that passes steps on and keeps them."""

    def __init__(self, runner):
        self.runner, self.steps, self.experts = runner, [], []

    def step(self, batch):
        before = Counters.read()
        self.runner.step(batch)
        self.steps.append(batch)
        self.experts.append(Counters.read().since(before).experts_hit)


def test_steps_are_random_tokens_at_the_contexts_asked_for():
    options = Options(str(DEMO), prompt_len=(7,), gen_len=4, batch_size=(1, 3), context_len=(5, 80))
    options = replace(options, batch_context_len=(9,), repeat=2)
    plan = make_plan(options, 1)
    assert plan.decodes == (Decode(1, 5), Decode(1, 80), Decode(3, 9))
    assert plan.contexts == [(1, 80), (2, 9)]
    assert plan.pages == [range(2), range(2, 3), range(3, 4), range(4, 5)]  # of 64 tokens
    llm = LLM(DEMO, max_num_seqs=plan.num_pages, total_max_length=plan.longest)
    runner, advanced = Recorder(llm.runner), []
    samples = Bench(plan, runner, alone(), advanced.append).run()
    assert sum(advanced) == Bench.num_steps(plan) == 1 + 2 * (1 + 3 * 4)
    # The contexts; then, twice: a prompt, and each decode with one step more, before the first one that counts.
    turn = [[0], *[[5 + i] for i in (0, 0, 1, 2, 3)], *[[80 + i] for i in (0, 0, 1, 2, 3)]]
    turn += [[9 + i] * 3 for i in (0, 0, 1, 2, 3)]
    assert [s.context_lens.tolist() for s in runner.steps] == [[0, 0, 0], *turn, *turn]
    assert [len(samples[what]) for what in (7, *plan.decodes)] == [2, 8, 8, 8]
    decoded = np.concatenate([s.token_ids for s in runner.steps if len(s.token_ids) == 3])
    assert len(set(decoded.tolist())) > 20  # of a vocabulary of 1,536, 24 drawn: two turns of four steps
    prompts = [s.token_ids.tolist() for s in runner.steps if s.context_lens.tolist() == [0]]
    assert prompts[0] != prompts[1]
    # Every sequence keeps to its own pages.
    for step in runner.steps:
        used = step.block_tables[step.block_tables >= 0].tolist()
        assert len(set(used)) == len(used)
    # What is counted is what the router chose: two experts a layer and token at the least, all at the most.
    first = next(i for i, s in enumerate(runner.steps) if len(s.context_lens) == 3 and s.context_lens[0] == 9)
    assert samples[Decode(3, 9)][0].experts_hit == runner.experts[first + 1] / 5
    assert all(2 <= s.experts_hit <= 6 for s in samples[Decode(3, 9)])


def test_a_peak_can_be_forgotten():
    before = peak_memory()
    held = np.ones(1 << 27, np.uint8)  # 128 MB
    peak = peak_memory()
    assert peak > before
    del held
    forget_peak()
    assert peak_memory() < peak


def test_lengths_the_model_is_too_short_for_are_left_out_of_the_defaults_and_named():
    plan = make_plan(Options(str(DEMO), gen_len=1600), 1)
    assert plan.prompt_lens == (512, 2048)
    assert plan.decodes == (Decode(1, 5), Decode(8, 128), Decode(32, 128))
    assert plan.left_out == (
        "--context_len 512 and 1600 new tokens (--gen_len) is left out: the model's max_position_embeddings is 2048",
        "--context_len 4096 and 1600 new tokens (--gen_len) is left out: the model's max_position_embeddings is 2048",
    )


def test_predictor_benchmark_is_the_bench(monkeypatch, capsys):
    for name, value in {"PROMPT_LEN": (3,), "BATCH_SIZE": (1,), "CONTEXT_LEN": (5,)}.items():
        monkeypatch.setattr(planning, f"DEFAULT_{name}", value)
    assert predict(["--benchmark", "--quant_type", "wint8", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16, weight_only_int8 (" in out
    assert "decode, batch 1, context 5" in out


DEMO_FLAGS = f"{DEMO} --prompt_len 8 --batch_size 1 --context_len 8"
REFUSED = {
    "MODEL /nope": "/nope does not exist; needs a checkpoint folder",
    f"{DEMO} --mode static": "no manifest.json, so this is no exported model",
    f"{DEMO} --num_hidden_layers 1": "--num_hidden_layers is for dummy models",
    f"{DEMO} --dtype float16": "--dtype is float16, which runs on GPUs only; use --dtype bfloat16 or float32",
    f"{DEMO} --prompt_len 2049": "--prompt_len 2049 is more than the 2048 tokens of the model's max_position",
    f"{DEMO} --context_len 5,2000": "--context_len 2000 and 64 new tokens (--gen_len) is more than the 2048 tokens",
    f"{DEMO} --batch_context_len 2000 --gen_len 49": "--batch_context_len 2000 and 49 new tokens (--gen_len) is more",
    f"{DEMO} --gen_len 3000 --context_len 5": "--context_len 5 and 3000 new tokens (--gen_len) is more than the 2048",
    f"{DEMO} --batch_size 8 --context_len 5": "--context_len is for decoding one sequence, and --batch_size has no 1",
    f"{DEMO} --batch_size 1 --batch_context_len 5": "--batch_context_len is for decoding several sequences",
    "dummy:mixtral-8x7b --dtype float32 --num_hidden_layers 1000": "this machine has",
    f"{DEMO} --batch_size 1,1000000000000": "the KV cache",
    f"{DEMO_FLAGS} --json /nope/a": "--json /nope/a: there is no folder /nope; make it",
    f"{DEMO_FLAGS} --plot /nope/a.png": "--plot /nope/a.png: there is no folder /nope; make it",
    f"{DEMO_FLAGS} --plot a.svg": "--plot a.svg: the picture is a PNG; give a name that ends in .png",
    f"{DEMO_FLAGS} --json a.png --plot a.png": "--json and --plot are both a.png; give two files",
}
USAGE = {
    "": "the following arguments are required: MODEL",
    "m --prompt_len 5,,7": "argument --prompt_len: '5,,7', needs integers of at least 1 with commas",
    "m --batch_size 0": "argument --batch_size: '0', needs integers of at least 1",
    "m --context_len 5,x": "argument --context_len: '5,x', needs integers of at least 1",
    "m --batch_context_len 8,8": "argument --batch_context_len: '8,8' names a number twice; name each once",
    "m --gen_len 0": "argument --gen_len: '0', needs an integer of at least 1",
    "m --repeat -1": "argument --repeat: '-1', needs an integer of at least 1",
    "m --prompt hello": "unrecognized arguments: --prompt hello",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refusals_come_before_anything_is_loaded(flags, capsys):
    code, out, err = run(flags.removeprefix("MODEL ").split(), capsys)
    assert (code, out) == (1, "")
    assert "loading" not in err
    assert REFUSED[flags] in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("flags", USAGE)
def test_usage_errors_exit_with_2(flags, capsys):
    code, out, err = run(flags.split(), capsys)
    assert (code, out) == (2, "")
    assert USAGE[flags] in err


def test_a_picture_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run([*DEMO_FLAGS.split(), "--plot", "a.png"], capsys)
    assert code == 1
    assert err == "error: --plot needs matplotlib, which is not installed; run `pip install '.[plot]'`\n"


FAKE_TORCH = """
bfloat16 = "bfloat16"
def randn(rows, columns, device, dtype):
    assert (device, dtype) == ("cuda", bfloat16)
    return [[0.0]]
def matmul(a, b): ...
class cuda:
    chosen = []
    set_device = staticmethod(chosen.append)
    @classmethod
    def synchronize(cls): assert cls.chosen == [3]
"""


def test_the_matrix_rate_of_a_gpu_is_a_librarys_in_another_process(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    measured = MatmulRate(3)
    assert measured.missing is None
    assert all(measured.rate() > 0 for _ in range(3))
    measured.close()
    with pytest.raises(ValueError, match="the process that measures the matrix rate has died"):
        measured.rate()


def test_without_a_library_the_matrix_rate_is_missing_for_a_reason(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('no PyTorch here')")
    (tmp_path / "paddle.py").write_text("raise ImportError('nor Paddle')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    measured = MatmulRate(0)
    assert measured.missing == "PyTorch: no PyTorch here; Paddle for GPUs: nor Paddle"
    measured.close()
