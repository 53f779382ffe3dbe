"""The peers' harness with a fake engine: what is asked and answered, what a rate is, turns, medians, reasons."""

import fcntl
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from predict.model.weights import DummyWeights, open_checkpoint
from tests.benchmarks.peers import environments, process, protocol, rounds, table
from tests.benchmarks.peers.__main__ import CASES
from tests.benchmarks.peers.checkpoint import active_weights, make_checkpoint, sized_config
from tests.benchmarks.peers.entries import ENTRIES, active_bytes
from tests.benchmarks.peers.protocol import Answer, Case, Request
from tests.benchmarks.peers.runners import ours

DECODE, PREFILL = Case(batch=1, context=5, new_tokens=4), Case(batch=1, context=64, new_tokens=1)
FAKE = """
import random
from tests.benchmarks.peers.protocol import serve

def load(request):
    def engine(prompts, new_tokens, numbers):
        assert all(0 <= token < request.vocab_size for prompt in prompts for token in prompt)
        for step in range(new_tokens):
            if len(prompts[0]) == 64:
                raise ValueError("no prompt of 64\\nthe rest of a long message")
            yield len(prompts)
    return engine

serve(load, lambda: {"fake": "1.0"})
"""


def request(*cases: Case) -> Request:
    return Request("nowhere", "bf16", vocab_size=100, threads=2, seed=7, cases=cases)


def test_a_peer_answers_in_a_process_of_its_own(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
    protocol.write(asked, request(DECODE, PREFILL))
    command = [sys.executable, str(tmp_path / "fake.py"), str(asked), str(answered)]
    process.run(command, tmp_path / "log", 60.0, {"PYTHONPATH": str(process.ROOT)})
    answer = Answer.read(answered)
    assert len(answer.rates[DECODE.name]) == protocol.MAX_REPEATS
    assert answer.failed == {PREFILL.name: "ValueError: no prompt of 64"}
    assert answer.versions == {"fake": "1.0"}
    assert answer.load_s >= 0
    assert answer.peak_bytes > 1 << 20


def test_a_request_reads_back_as_it_was_written(tmp_path):
    protocol.write(tmp_path / "request.json", request(*CASES))
    assert Request.read(str(tmp_path / "request.json")) == request(*CASES)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('first'); print('the cause'); print(); raise SystemExit(3)", "the cause (see "),
        (
            "print('ERROR: no wheel'); print('note: an error of the package'); raise SystemExit(1)",
            "ERROR: no wheel (see ",
        ),
        ("print('working'); raise ValueError('no memory')", "ValueError: no memory (see "),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended by SIGILL: it printed nothing (see "),
        ("import signal; print('waiting', flush=True); signal.pause()", "not done within 1 s (see "),
    ],
)
def test_a_process_that_fails_gives_its_reason(tmp_path, code, reason):
    (tmp_path / "log").write_text("of an earlier process\n")
    with pytest.raises(process.ProcessFailed) as failure:
        process.run([sys.executable, "-c", code], tmp_path / "log", 1.0 if "pause" in code else 60.0)
    assert str(failure.value).startswith(reason)


def test_nothing_that_a_process_started_outlives_it(tmp_path):
    held = (tmp_path / "held").open("w")
    # The child's child holds a lock for 30 s, which only its end gives back sooner; its parent waits for it.
    inner = (
        "import fcntl, signal, sys; fcntl.flock(1, fcntl.LOCK_EX); print(flush=True); signal.alarm(30); signal.pause()"
    )
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}], stdout=open({held.name!r}, 'w'))\n"
        "child.wait()"
    )
    started = time.monotonic()
    with pytest.raises(process.ProcessFailed, match="not done within 2 s"):
        process.run([sys.executable, "-c", code], tmp_path / "log", 2.0)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert time.monotonic() - started < 20


def engine_at(clock: list[float], seconds: list[float], given: list[int]):
    """An engine whose steps take ``seconds`` on ``clock`` and give so many tokens."""

    def engine(prompts, new_tokens, numbers):
        for taken, tokens in zip(seconds, given, strict=True):
            clock[0] += taken
            yield tokens

    return engine


@pytest.mark.parametrize(
    ("case", "seconds", "given", "rate"),
    [
        (Case(1, 50, 1), [2.0], [1], 25.0),  # the prompt's 50 tokens in 2 s
        (Case(2, 50, 1), [2.0, 3.0], [1, 1], 20.0),  # two prompts one after the other
        (Case(1, 5, 4), [9.0, 1.0, 1.0, 2.0], [1, 1, 1, 1], 0.75),  # 3 tokens in 4 s: the first step is the prompt's
        (Case(2, 5, 3), [9.0, 1.0, 1.0], [2, 2, 2], 2.0),
        (Case(2, 5, 3), [9.0, 1.0, 1.0, 2.0], [1, 2, 2, 1], 1.0),  # decoding counts once both prompts are done
    ],
)
def test_what_a_rate_counts(monkeypatch, case, seconds, given, rate):
    clock = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: clock[0])
    assert protocol.rate(engine_at(clock, seconds, given), case, 100, random.Random(0)) == pytest.approx(rate)


def test_an_engine_that_gives_too_few_tokens_has_no_rate():
    with pytest.raises(RuntimeError, match="3 tokens came back, needs 1 x 4"):
        protocol.rate(engine_at([0.0], [1.0] * 3, [1] * 3), DECODE, 100, random.Random(0))


def measured(rates: dict[str, list[float]], fails_in_round: int = 99):
    """Results of three rounds of two engines; each rate is of one round, the second engine fails in one of them."""
    results, order = rounds.Results(), []

    def run(entry: str, number: int) -> Answer:
        order.append((entry, number))
        if entry == "vllm" and number == fails_in_round:
            raise process.ProcessFailed("no more | memory")
        return Answer(rates={DECODE.name: [1.0, rates[entry][number], 1e6]}, load_s=2.0, peak_bytes=3 * 10**9)

    bandwidths = iter(10e9 + 1e9 * i for i in range(99))
    for _ in rounds.interleave(results, ["ours-int8", "vllm"], 3, run, lambda: next(bandwidths), lambda: 0.01):
        pass
    return results, order


def test_engines_take_turns_and_are_held_against_the_bandwidth_around_them():
    results, order = measured({"ours-int8": [10.0, 30.0, 20.0], "vllm": [5.0, 10.0, 20.0]})
    assert order == [(entry, number) for number in range(3) for entry in ("ours-int8", "vllm")]
    assert results.rates("ours-int8", DECODE.name) == [10.0, 30.0, 20.0]
    assert [run.bandwidth for run in results.runs][:3] == [10.5e9, 11.5e9, 12.5e9]
    assert results.shares("vllm", DECODE.name, 10**9)[0] == pytest.approx(5.0 / 11.5)
    assert results.ratios("ours-int8", "vllm", DECODE.name) == [2.0, 3.0, 1.0]


def test_an_engine_that_fails_keeps_what_it_gave_and_its_reason():
    results, order = measured({"ours-int8": [10.0, 30.0, 20.0], "vllm": [5.0, 10.0, 20.0]}, fails_in_round=1)
    assert ("vllm", 2) not in order
    assert results.rates("vllm", DECODE.name) == [5.0]
    assert results.ratios("ours-int8", "vllm", DECODE.name) == [2.0]
    assert results.failed == {"vllm": "no more | memory"}


def test_the_page_has_medians_spread_shares_ratios_and_reasons():
    results, _ = measured({"ours-int8": [10.0, 30.0, 20.0], "vllm": [5.0, 10.0, 20.0]})
    results.failed["openvino"] = "no room | no export"
    entries = [ENTRIES[key] for key in ("ours-int8", "vllm", "openvino")]
    read = {"ours-int8": 5 * 10**8, "vllm": 10**9}
    text = table.page(results, entries, (DECODE,), read, {"date": "today"})
    assert "- date: today\n- read bandwidth around the runs: 13.0 GB/s (10.5 to 15.5)" in text
    assert "| paddle-mixtral int8 | 20.0 [10.0 - 30.0] | 69% | 2.0 [2.0 - 2.0] | 3.0 |" in text
    assert "| vLLM CPU bf16 | 10.0 [5.0 - 20.0] | 74% |" in text
    assert "| OpenVINO GenAI int8 | did not run: no room \\| no export |" in text
    assert "| paddle-mixtral int8, times as fast as | decode b1 p5 |\n|---|---|\n| vLLM CPU bf16 | 2.00x |" in text
    assert "not a quiet machine" not in text
    found = json.loads(json.dumps(table.figures(results, entries, (DECODE,), read, {"date": "today"})))
    assert found["engines"]["vllm"]["tokens_per_s"][DECODE.name] == {"median": 10.0, "min": 5.0, "max": 20.0}
    assert found["engines"]["openvino"]["did_not_run"] == "no room | no export"
    assert len(found["runs"]) == 6


def test_a_busy_machine_is_said():
    results = rounds.Results()
    answer = Answer(rates={DECODE.name: [1.0]})
    for _ in rounds.interleave(results, ["vllm"], 1, lambda entry, number: answer, lambda: 1e9, lambda: 0.3):
        pass
    text = table.page(results, [ENTRIES["vllm"]], (DECODE,), {"vllm": 1}, {})
    assert "processors in use before the runs: 30%, at most 30% (over 5%: not a quiet machine" in text


def test_our_bench_answers_as_the_peers_do():
    def samples(*seconds: float) -> list[dict]:
        return [{"seconds": s} for s in seconds]

    found = {
        "version": "0.1.0",
        "paddle_version": "3.3.1",
        "loading": {"seconds": 1.5, "peak_bytes": 50},
        "running": {"peak_bytes": 90, "buffer_bytes": 30},
        "measurements": [
            {"kind": "prefill", "batch_size": 1, "context_len": 0, "new_tokens": 64, "samples": samples(2.0, 4.0)},
            # two repetitions of three steps
            {
                "kind": "decode",
                "batch_size": 1,
                "context_len": 5,
                "new_tokens": 3,
                "samples": samples(1.0, 1.0, 2.0, 1.0, 1.0, 1.0),
            },
        ],
    }
    answer = ours.answer(found, (DECODE, PREFILL))
    assert answer.rates == {DECODE.name: [0.75, 1.0], PREFILL.name: [32.0, 16.0]}
    assert (answer.load_s, answer.peak_bytes) == (1.5, 60)


def test_the_checkpoint_is_the_dummy_model_in_hugging_face_layout(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", "small")
    config = sized_config("small")
    checkpoint, weights = open_checkpoint(tmp_path / "checkpoint", config), DummyWeights(config)
    for name in weights.shapes:
        array, dtype = checkpoint.read(name)
        assert dtype == "bfloat16"
        np.testing.assert_array_equal(array, weights.read(name)[0])


def test_active_weights_of_mixtral_8x7b():
    # Two layers of attention (4096 x (4096 + 1024 + 1024 + 4096)), router, 2 experts of 3 x 4096 x 14336, and lm_head.
    layer = 4096 * 10240 + 4096 * 8 + 2 * 3 * 4096 * 14336
    assert active_weights(sized_config("8x7b")) == 2 * layer + 4096 * 32000 == 919_666_688


def test_active_bytes_of_mixed_formats_are_the_converters(tmp_path):
    (tmp_path / "Q4_K_M.gguf.json").write_text('{"active_bytes": 123}')
    assert active_bytes(ENTRIES["llama-Q4_K_M"], tmp_path, sized_config("small")) == 123
    assert active_bytes(ENTRIES["vllm"], tmp_path, sized_config("small")) == 2 * active_weights(sized_config("small"))


def test_every_entry_has_its_modules_and_environment():
    folder = Path(protocol.__file__).parent / "runners"
    for entry in ENTRIES.values():
        assert (folder / f"{entry.runner}.py").is_file()
        assert entry.converter is None or (folder / f"{entry.converter}.py").is_file()
        assert entry.environment is None or entry.environment in environments.ENVIRONMENTS


def test_an_environment_of_another_definition_is_not_built(tmp_path):
    environment = environments.ENVIRONMENTS["transformers"]
    assert not environments.is_built(environment, tmp_path)
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "built.json").write_text(json.dumps({"name": "transformers", "requirements": []}))
    assert not environments.is_built(environment, tmp_path)
