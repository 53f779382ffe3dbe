"""Law 1: a request's tokens and logprobs depend on the request and the model alone, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from predict.engine.request import SamplingParams
from predict.llm import LLM
from tests.logits import logits_in_chunks, runner
from tests.ops.instruction_sets import available

KINDS = [("bfloat16", None), ("bfloat16", "weight_only_int8"), ("float32", None)]
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


@pytest.mark.parametrize(("dtype", "quant_type"), KINDS)
def test_tokens_do_not_depend_on_the_batch(demo, dtype, quant_type):
    prompts, params = requests(demo)
    prompts, params = prompts[:24], params[:24]
    alone = outcome(LLM(demo, dtype=dtype, quant_type=quant_type, max_num_seqs=1), prompts, params)
    in_eights = LLM(demo, dtype=dtype, quant_type=quant_type, max_num_seqs=8)
    assert outcome(in_eights, prompts, params) == alone

    order = np.random.default_rng(3).permutation(len(prompts)).tolist()
    shuffled = outcome(in_eights, [prompts[i] for i in order], [params[i] for i in order])
    assert shuffled == [alone[i] for i in order]


@pytest.mark.parametrize(("budget", "block_size", "threads"), [(1, 64, 2), (7, 16, 1), (50, 8, 2), (2048, 128, 3)])
def test_tokens_do_not_depend_on_chunks_pages_or_threads(demo, budget, block_size, threads):
    prompts, params = requests(demo)
    prompts, params = prompts[:8], params[:8]
    expected = outcome(LLM(demo, quant_type="weight_only_int8"), prompts, params)
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
