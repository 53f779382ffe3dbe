"""Two ranks are one model: the same logits, the same quantised weights, both modes, and the launcher ends well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ops import reference
from predict.model.config import ConfigError
from predict.model.memory import host_view
from predict.model.mixtral import Mixtral, padded_vocab_share
from predict.model.source import find_model
from predict.model.weights import load
from predict.runner import bytes_per_token
from tests.logits import all_logits

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
PREDICTOR, EXPORTER = ROOT / "predict" / "predictor.py", ROOT / "predict" / "export_model.py"

LOGITS = """
import sys
import numpy as np
from predict import parallel
from predict.engine.request import SamplingParams, Sequence
from predict.model.source import find_model
from predict.model.weights import load
from predict.runner import DynamicRunner
from tests.logits import logits_in_chunks

def main(ranks):
    source = find_model(sys.argv[1])
    model = load(source.config, source.weights(), "float32", None, ranks.rank, ranks.world_size)
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, 60).tolist()
    logits = logits_in_chunks(DynamicRunner(model, 16, 16), ids, [40, 20])
    np.save(f"{sys.argv[2]}/logits_{ranks.rank}.npy", logits)

sys.exit(parallel.run(main))
"""


def launch(ranks: int, log_dir: Path, *command: str | Path) -> None:
    """Runs a command on several ranks and asserts the launcher's exit code 0."""
    line = [
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--nproc_per_node",
        str(ranks),
        "--log_dir",
        log_dir,
        *command,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "ranks"), [("demo", 2), ("odd_heads", 2), ("four", 4)])
def test_logits_of_several_ranks_are_those_of_one(demo, tmp_path, name, ranks):
    folder = {"demo": demo, "odd_heads": GOLDEN / "mixtral_in_small", "four": GOLDEN / "mha_tied"}[name]
    script = tmp_path / "logits.py"
    script.write_text(LOGITS)
    launch(ranks, tmp_path / "log", script, folder, tmp_path)
    vocab_size = find_model(folder).config.vocab_size
    [alone] = all_logits(folder, [np.random.default_rng(0).integers(0, vocab_size, 60).tolist()])
    shards = [np.load(tmp_path / f"logits_{r}.npy") for r in range(ranks)]
    for other in shards[1:]:
        np.testing.assert_array_equal(other, shards[0])
    assert np.abs(shards[0] - alone).max() <= 1e-4


SERVE = """
import json, math, sys
from predict import parallel
from predict.engine.request import SamplingParams
from predict.followers import RankedRunner, follow
from predict.llm import LLM

def main(ranks):
    llm = LLM(sys.argv[1], threads=1, kv_cache_memory=1 << (24 + ranks.rank), ranks=ranks)
    params = SamplingParams(max_tokens=12, n=2, temperature=0.8, logprobs=2)
    prompts = ["This module provides", "Return the", "The"]
    every_rank_alike = [(c.token_ids, c.logprobs, c.top_logprobs, c.text) for c in llm.generate(prompts, params)]
    if ranks.rank > 0:
        follow(llm.runner)
        return
    runner = RankedRunner(llm.runner)
    llm.engine = llm.new_engine(runner)
    served = [(c.token_ids, c.logprobs, c.top_logprobs, c.text) for c in llm.generate(prompts, params)]
    runner.close()
    json.dump([every_rank_alike, served, llm.runner.num_blocks * llm.runner.block_size], open(sys.argv[2], "w"))

sys.exit(parallel.run(main, step_timeout_s=math.inf))
"""


def test_one_engine_for_all_ranks_is_one_on_every_rank(demo, tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    launch(2, tmp_path / "log", script, demo, tmp_path / "out.json")
    every_rank_alike, served, tokens = json.loads((tmp_path / "out.json").read_text())
    assert served == every_rank_alike
    assert len(served) == 6
    # The ranks were given caches of different sizes, and have the smaller one.
    config = find_model(demo).config
    assert tokens == (1 << 24) // bytes_per_token(config, 2, "bfloat16") // 64 * 64


@pytest.mark.parametrize("quant_type", [None, "weight_only_int8"])
def test_shards_are_slices_of_the_whole(demo, quant_type):
    source = find_model(demo)
    whole = load(source.config, source.weights(), "bfloat16", quant_type)
    shards = [load(source.config, source.weights(), "bfloat16", quant_type, r, 2) for r in range(2)]
    names = [n for n, _ in whole.named_buffers()]
    assert any(n.endswith("weight_scale") for n in names) == (quant_type is not None)
    for name in names:
        full, *parts = (matrix(name, host_view(dict(m.named_buffers())[name]), m) for m in (whole, *shards))
        np.testing.assert_array_equal(reassembled(name, parts, source.config), full, err_msg=name)


def matrix(name: str, view: np.ndarray, network: Mixtral) -> np.ndarray:
    """A buffer as [.., rows, columns], whether it is packed or not."""
    if view.ndim < 3:
        return view
    config, ranks = network.config, network.world_size
    hidden, inner = config.hidden_size, config.intermediate_size // ranks
    if name.endswith("w13"):
        return np.stack([reference.unpack_gate_up(expert, inner, hidden) for expert in view])
    if name.endswith("w2"):
        return np.stack([reference.unpack(expert, hidden, inner) for expert in view])
    queries, keys = (h * config.head_dim // ranks for h in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {"qkv_proj": (queries + 2 * keys, hidden), "o_proj": (hidden, queries)}
    shapes["lm_head"] = (padded_vocab_share(config, ranks), hidden)
    return reference.unpack(view, *shapes[name.split(".")[-2]])


def reassembled(name: str, parts: list[np.ndarray], config) -> np.ndarray:
    """The whole tensor that the ranks' parts are cut from."""
    if "qkv_proj" in name:
        # Every rank holds its queries, then its keys, then its values.
        queries, keys = (h * config.head_dim // 2 for h in (config.num_attention_heads, config.num_key_value_heads))
        cuts = [np.split(p, [queries, queries + keys]) for p in parts]
        return np.concatenate([cuts[rank][i] for i in range(3) for rank in range(2)])
    if "w13" in name:
        halves = [np.split(p, 2, axis=1) for p in parts]  # gate rows, then up rows, of each expert
        return np.concatenate([halves[rank][i] for i in range(2) for rank in range(2)], axis=1)
    if name.endswith(("o_proj.weight", "w2")):
        return np.concatenate(parts, axis=-1)
    if "lm_head" in name:
        return np.concatenate(parts)
    np.testing.assert_array_equal(parts[0], parts[1], err_msg=name)
    return parts[0]


@pytest.mark.parametrize("quant_type", [None, "weight_only_int8"])
def test_both_modes_on_two_ranks(demo, tmp_path, quant_type):
    quantised = [] if quant_type is None else ["--quant_type", quant_type]
    data = ["--data_file", demo / "prompts.jsonl", "--max_length", "24", "--batch_size", "3"]
    kind = ["--dtype", "bfloat16", *quantised, "--inference_model", "--append_attn"]
    launch(
        2, tmp_path / "log", PREDICTOR, *kind, "--mode", "dynamic", *data, "--output_file", tmp_path / "dynamic.jsonl"
    )
    launch(2, tmp_path / "log", EXPORTER, *kind, "--output_path", tmp_path / "inference")
    static = ["--model_name_or_path", tmp_path / "inference", "--mode", "static", "--verify"]
    launch(2, tmp_path / "log", PREDICTOR, *kind, *static, *data, "--output_file", tmp_path / "static.jsonl")

    assert (tmp_path / "static.jsonl").read_bytes() == (tmp_path / "dynamic.jsonl").read_bytes()
    assert len((tmp_path / "static.jsonl").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "inference" / "manifest.json").read_text())["world_size"] == 2
    assert {p.name for p in (tmp_path / "inference").glob("rank_*")} == {"rank_0", "rank_1"}

    alone = [sys.executable, PREDICTOR, *kind, *static, "--prompt", "x"]
    done = subprocess.run([*map(str, alone)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "exported for 2 ranks, running on 1; start it with --nproc_per_node 2" in done.stderr


def test_sizes_that_cannot_be_split_are_refused(demo):
    source = find_model(demo)
    with pytest.raises(ConfigError, match="num_key_value_heads 2 cannot be split over 4 ranks"):
        load(source.config, source.weights(), "float32", None, 0, 4)


def test_the_bench_measures_two_ranks(demo, tmp_path):
    flags = ["--prompt_len", "9", "--batch_size", "1,2", "--context_len", "5", "--batch_context_len", "5"]
    flags += ["--gen_len", "2", "--repeat", "1", "--json", tmp_path / "run.json"]
    launch(2, tmp_path / "log", ROOT / "predict" / "main.py", "bench", demo, *flags)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["model"]["ranks"] == 2
    assert [entry["experts_hit"] >= 2 for entry in found["measurements"]] == [True] * 3
    assert all(entry["kernel_share"]["all_reduce"] > 0 for entry in found["measurements"])
    logs = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    assert ["tokens/s p10" in log for log in logs] == [True, False]
