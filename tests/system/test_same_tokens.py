"""Law 1: a request's tokens and logprobs depend on the request and the model alone, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from predict.engine.engine import Delta, Engine
from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.tokenizer import load_tokenizer
from tests.logits import logits_in_chunks, runner
from tests.ops.instruction_sets import available
from tests.predict.invariants import check_invariants

KINDS = [("bfloat16", None), ("bfloat16", "weight_only_int8"), ("bfloat16", "a8w8"), ("float32", None)]
PROMPTS = 200
NEW_TOKENS = 16
# Fresh processes import the tests too.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def requests(demo) -> tuple[list[str], list[SamplingParams]]:
    """200 prompts cut from the held-out text at random places, half greedy, half sampled in various ways."""
    text = (demo / "eval.txt").read_text(encoding="utf-8")
    random = np.random.default_rng(7)
    prompts, params = [], []
    for i in range(PROMPTS):
        start, length = int(random.integers(0, len(text) - 400)), int(random.integers(1, 300))
        prompts.append(text[start : start + length])
        options = {} if i % 2 == 0 else {
            "temperature": float(random.uniform(0.5, 1.5)),
            "top_k": int(random.integers(0, 50)),
            "top_p": float(random.uniform(0.5, 1.0)),
            "min_p": float(random.uniform(0.0, 0.1)),
            "repetition_penalty": float(random.uniform(1.0, 1.3)),
            "seed": i,
        }  # fmt: skip
        params.append(SamplingParams(max_tokens=NEW_TOKENS, **options))
    return prompts, params


def outcome(llm: LLM, prompts, params) -> list[tuple[list[int], list[float], str]]:
    return [(c.token_ids, c.logprobs, c.finish_reason) for c in llm.generate(prompts, params)]


@pytest.mark.parametrize(("dtype", "quant_type"), KINDS)
def test_dynamic_static_and_a_fresh_process_agree(demo, exported, tmp_path, dtype, quant_type):
    prompts, params = requests(demo)
    dynamic = outcome(LLM(demo, dtype=dtype, quant_type=quant_type), prompts, params)
    static = outcome(LLM(exported(dtype, quant_type)), prompts, params)
    assert static == dynamic

    script = tmp_path / "fresh.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from predict.llm import LLM\n"
        "from tests.system.test_same_tokens import outcome, requests\n"
        "prompts, params = requests(Path(sys.argv[1]))\n"
        "json.dump(outcome(LLM(sys.argv[2], mode='static'), prompts, params), open(sys.argv[3], 'w'))\n"
    )
    out = tmp_path / "fresh.json"
    subprocess.run([sys.executable, script, demo, exported(dtype, quant_type), out], check=True, env=ENVIRONMENT)
    fresh = [tuple(row) for row in json.loads(out.read_text())]
    assert fresh == dynamic
    # The tokens are worth comparing: they differ from prompt to prompt.
    assert len({tuple(tokens) for tokens, _, _ in dynamic}) > PROMPTS * 0.9


def varied_requests(demo) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of which many begin alike, and of a page's length, with everything that can be asked of a request."""
    text = (demo / "eval.txt").read_text(encoding="utf-8")
    tokens = load_tokenizer(demo).encode(text[:4000])
    random = np.random.default_rng(11)
    # 64 tokens are a page of the exported program: prompts that end before, at and after the end of one.
    lengths = [1, 2, 17, 63, 64, 65, 127, 128, 129, 150, *random.integers(1, 170, 8).tolist()]
    found = []
    for i, length in enumerate(lengths):
        start = 0 if i % 3 else int(random.integers(0, 400))
        options: dict = {"max_tokens": int(random.integers(1, NEW_TOKENS)), "ignore_eos": bool(i % 2)}
        if i % 2:
            options |= {"temperature": float(random.uniform(0.5, 1.5)), "seed": i, "top_k": 40, "n": 1 + i % 3}
        if i % 3 == 1:
            options |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
        if i % 4 == 1:
            options |= {"logprobs": 5, "logit_bias": {int(t): 4.0 for t in tokens[:50:7]}}
        if i % 5 == 1:
            options |= {"stop": (" the", "e"), "stop_token_ids": tuple(tokens[:3])}
            options |= {"min_tokens": min(2, options["max_tokens"])}
        found.append((tokens[start : start + length], SamplingParams(**options)))
    return found


def run_alone(engine: Engine, requests) -> dict[tuple[int, int], list[Delta]]:
    """What each sample of each request gets while nothing else runs."""
    deltas: dict[tuple[int, int], list[Delta]] = {}
    for i, (prompt, params) in enumerate(requests):
        engine.add(str(i), prompt, params)
        while engine.has_work:
            for delta in engine.step():
                deltas.setdefault((i, delta.index), []).append(delta)
    return deltas


def run_crowded(engine: Engine, requests, seed: int) -> dict[tuple[int, int], list[Delta]]:
    """The same while requests come in any order at any step, beside others that are aborted in any state."""
    random = np.random.default_rng(seed)
    coming = [(f"{kind}{i}", i) for i in range(len(requests)) for kind in ("stays", "leaves")]
    random.shuffle(coming)
    leaving: list[str] = []
    deltas: dict[tuple[int, int], list[Delta]] = {}
    while coming or engine.has_work:
        while coming and random.random() < 0.4:
            request_id, i = coming.pop()
            engine.add(request_id, *requests[i])
            if request_id.startswith("leaves"):
                leaving.append(request_id)
        if leaving and random.random() < 0.4:
            engine.abort(leaving.pop(int(random.integers(len(leaving)))))
        for delta in engine.step():
            if delta.request_id.startswith("stays"):
                deltas.setdefault((int(delta.request_id[5:]), delta.index), []).append(delta)
        check_invariants(engine)
    return deltas


def told(deltas: dict[tuple[int, int], list[Delta]]) -> dict[tuple[int, int], list[tuple]]:
    """All that a listener hears and that may not depend on others: not what was found in the cache."""
    return {
        sample: [(d.token_ids, d.logprobs, d.top_logprobs, d.text, d.finish_reason, d.stop_reason) for d in heard]
        for sample, heard in deltas.items()
    }


@pytest.mark.parametrize(("dtype", "quant_type"), KINDS)
def test_tokens_depend_on_the_request_alone(demo, exported, dtype, quant_type):
    """Law 1 over random schedules: batched, shuffled, chunked, preempted, prefix-hit, beside aborted neighbours."""
    requests = varied_requests(demo)
    dynamic = LLM(demo, dtype=dtype, quant_type=quant_type, threads=1)
    static = LLM(exported(dtype, quant_type), threads=1)
    small_pages = LLM(demo, dtype=dtype, quant_type=quant_type, threads=1, block_size=8)
    dynamic.prefix_caching = False
    alone = run_alone(dynamic.new_engine(dynamic.runner), requests)
    dynamic.prefix_caching = True
    expected = told(alone)
    assert {heard[-1].finish_reason for heard in alone.values()} == {"stop", "length"}
    assert {type(heard[-1].stop_reason) for heard in alone.values()} >= {str, int}

    preemptions = hits = 0
    for seed, llm in enumerate([dynamic, static, small_pages, static, dynamic]):
        random = np.random.default_rng(seed)
        # Just enough pages for the longest request, or a few more.
        needed = -(-(170 + NEW_TOKENS) // llm.runner.block_size)
        llm.runner.num_blocks = needed + int(random.integers(0, needed))
        llm.max_num_batched_tokens = int(random.choice([3, 20, 70, 400]))
        llm.max_num_seqs = int(random.integers(3, 12))
        engine = llm.new_engine(llm.runner)
        assert told(run_crowded(engine, requests, seed)) == expected
        stats = engine.stats()
        preemptions += stats.preemptions
        hits += stats.prefix_hit_tokens
        assert stats.blocks_free + stats.blocks_cached == llm.runner.num_blocks
    assert preemptions > 0
    assert hits > 0


@pytest.mark.parametrize(("budget", "block_size", "threads"), [(1, 64, 1), (7, 16, 1), (50, 8, 2), (2048, 128, 3)])
def test_tokens_do_not_depend_on_chunks_pages_or_threads(demo, budget, block_size, threads):
    prompts, params = requests(demo)
    prompts, params = prompts[:8], params[:8]
    expected = outcome(LLM(demo, quant_type="weight_only_int8", threads=1), prompts, params)
    llm = LLM(
        demo,
        quant_type="weight_only_int8",
        block_size=block_size,
        threads=threads,
        max_num_batched_tokens=budget,
    )
    assert outcome(llm, prompts, params) == expected


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_tokens_do_not_depend_on_the_instruction_set(demo, tmp_path, isa):
    if isa not in available():
        pytest.skip(f"this processor has no {isa}")
    prompts, params = requests(demo)
    expected = outcome(LLM(demo, quant_type="weight_only_int8"), prompts[:8], params[:8])
    script = tmp_path / "isa.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from ops.library import cpu_isa\n"
        "from predict.llm import LLM\n"
        "from tests.system.test_same_tokens import outcome, requests\n"
        "assert cpu_isa() == sys.argv[2]\n"
        "prompts, params = requests(Path(sys.argv[1]))\n"
        "llm = LLM(sys.argv[1], quant_type='weight_only_int8')\n"
        "json.dump(outcome(llm, prompts[:8], params[:8]), open(sys.argv[3], 'w'))\n"
    )
    out = tmp_path / "isa.json"
    environment = ENVIRONMENT | {"PADDLE_MIXTRAL_ISA": isa}
    subprocess.run([sys.executable, script, demo, isa, out], check=True, env=environment)
    assert [tuple(row) for row in json.loads(out.read_text())] == expected


def test_prefill_in_pieces_gives_the_same_logits(demo):
    ids = np.random.default_rng(0).integers(0, 1500, 150).tolist()
    ours = runner(demo, "bfloat16")
    whole = logits_in_chunks(ours, ids, [150])
    for sizes in ([64, 64, 22], [1] * 150, [149, 1], [17, 3, 50, 80]):
        np.testing.assert_array_equal(logits_in_chunks(ours, ids, sizes), whole)


def test_greedy_is_the_most_probable_token(demo):
    llm = LLM(demo, dtype="float32")
    [completion] = llm.generate("This module provides", SamplingParams(max_tokens=8))
    ids = completion.prompt_token_ids + completion.token_ids
    logits = logits_in_chunks(runner(demo), ids, [len(ids)])
    start = len(completion.prompt_token_ids) - 1
    assert logits[start:-1].argmax(-1).tolist() == completion.token_ids
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [float(logprobs[start + i, t]) for i, t in enumerate(completion.token_ids)]
    # float32 logarithms of sums over 1,500 terms, taken here in another order.
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_score_is_what_generation_reported(demo):
    llm = LLM(demo)
    [completion] = llm.generate("This module provides", SamplingParams(max_tokens=12, ignore_eos=True))
    scored = llm.score(completion.prompt_token_ids + completion.token_ids)
    assert scored[-12:] == completion.logprobs
