"""The arithmetic and the reports of tests.benchmarks.serving, and its parts on a runner without a model."""

import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from predict.engine.engine import Engine
from predict.engine.request import SamplingParams
from predict.model.tokenizer import load_tokenizer
from predict.model.weights import DEMO
from tests.benchmarks.serving import __main__, measure, overhead, report
from tests.benchmarks.serving.drive import Answer, drive, drive_groups
from tests.benchmarks.serving.http_load import tokens_in
from tests.benchmarks.serving.turns import check_same, in_turns, ratios, summary, way
from tests.benchmarks.serving.workload import FIRST_TOKEN, Request, mixed, poisson, shared
from tests.predict.paged_runner import PagedRunner

SEQS = 4


class ModellessLLM:
    """What the measurements ask of an LLM."""

    total_max_length, max_num_seqs, prefix_caching = 128, SEQS, True
    tokenizer = SimpleNamespace(vocab_size=50)

    def __init__(self):
        self.runner = PagedRunner(num_blocks=256)

    def new_engine(self, runner) -> Engine:
        return Engine(runner, (), 128, max_num_seqs=SEQS, prefix_caching=self.prefix_caching)


def silent(text: str) -> None:
    """Nobody listens."""


def answers(*times: list[float]) -> list[Answer]:
    return [Answer(float(i), list(t)) for i, t in enumerate(times)]


def test_requests_come_from_seeds_and_keep_their_limits():
    requests = mixed(500, 50, 1024)
    assert requests == mixed(500, 50, 1024)
    lengths = [len(r.prompt) for r in requests]
    assert min(lengths) >= 1
    assert max(lengths) == 512  # the longest are cut
    # Medians of 500: within three standard errors, 1.25 / sqrt(500) of the logarithm each.
    assert np.median(lengths) == pytest.approx(64, rel=0.17)
    assert np.median([r.params.max_tokens for r in requests]) == pytest.approx(48, rel=0.17)
    assert {t for r in requests for t in r.prompt} == set(range(FIRST_TOKEN, 50))
    assert len({r.params.seed for r in requests}) == 500


def test_variants_have_other_tokens_of_the_same_lengths():
    one, other = mixed(20, 1000, 200), mixed(20, 1000, 200, variant=1)
    assert [len(r.prompt) for r in one] == [len(r.prompt) for r in other]
    assert [r.params for r in one] == [r.params for r in other]
    assert all(a.prompt != b.prompt for a, b in zip(one, other, strict=True))


def test_shared_prompts_begin_alike_and_end_differently():
    requests = shared(10, 1000, 40)
    assert len({tuple(r.prompt[:40]) for r in requests}) == 1
    assert len({tuple(r.prompt[40:]) for r in requests}) == 10


def test_arrivals_are_a_poisson_process_of_the_rate():
    times = poisson(10_001, 5.0)
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.min() > 0
    # Of 10,000 exponential gaps, mean and standard deviation are 1 / rate within 1 % and 1.4 % (one standard error).
    assert gaps.mean() == pytest.approx(0.2, rel=0.04)
    assert gaps.std() == pytest.approx(0.2, rel=0.06)
    assert poisson(1, 5.0) == [0.0]
    assert poisson(100, 10.0) == pytest.approx([t / 2 for t in poisson(100, 5.0)])


def test_percentiles_lie_between_the_nearest_values():
    assert measure.percentiles(range(101)) == {"p50": 50.0, "p99": 99.0}
    assert measure.percentiles([1.0, 2.0]) == {"p50": 1.5, "p99": pytest.approx(1.99)}
    assert measure.percentiles([]) == {"p50": None, "p99": None}


def test_times_count_from_the_arrival():
    found = measure.served(answers([0.5, 1.0, 1.5], [4.0], [2.25, 2.5]))
    assert found["first_token_s"]["p50"] == 0.5  # of 0.5, 3.0 and 0.25
    assert found["token_s"]["p50"] == 0.375  # of 0.5 and 0.25: the second answer has no token after its first
    assert found["arrived_per_s"] == 1.0
    assert found["answered_per_s"] == 0.75
    assert found["unfinished_at_last_arrival"] == 2


def test_one_request_has_no_rate_of_arrival():
    assert measure.served(answers([0.5]))["arrived_per_s"] is None


def test_static_groups_wait_for_their_longest():
    llm = ModellessLLM()
    requests = [Request([7, i], SamplingParams(max_tokens=1 if i % SEQS else 20)) for i in range(3 * SEQS)]
    continuous = way(llm, partial(drive, requests=requests))()
    groups = way(llm, partial(drive_groups, requests=requests, size=SEQS))()
    assert groups.steps == 3 * 20
    # Three places change hands in every step: the second long answer begins in the second, the third in the third.
    assert continuous.steps == 22
    check_same("groups", groups.answers, continuous.answers)
    assert groups.prompt_tokens_computed == continuous.prompt_tokens_computed == sum(len(r.prompt) for r in requests)


def test_the_prefix_cache_saves_the_shared_tokens():
    found = measure.prefix(ModellessLLM(), 2, silent)
    whole = 64 * (64 + 32)
    assert found["without"]["prompt_tokens_computed"] == found["prompt_tokens"] == whole
    assert found["without"]["hit_rate"] == 0
    # All but the SEQS prompts that start together, before anything is cached.
    assert found["with"]["prompt_tokens_computed"] == whole - (64 - SEQS) * 64
    assert found["with"]["hit_rate"] == (64 - SEQS) * 64 / whole


def test_a_model_too_short_for_the_requests_is_refused():
    llm = ModellessLLM()
    llm.total_max_length = 95
    with pytest.raises(ValueError, match="95 tokens at the most, the measurements need 96"):
        measure.workload(llm, 1)


def test_ways_take_turns_and_ratios_are_of_a_turn():
    order, llm, requests = [], ModellessLLM(), mixed(3, 50, 16)

    def recorded(name):
        run = way(llm, partial(drive, requests=requests))
        return lambda: order.append(name) or run()

    found = in_turns({"a": recorded("a"), "b": recorded("b")}, 2, silent)
    assert order == ["a", "b", "a", "b"]
    assert summary(found["a"])["new_tokens"] == sum(r.params.max_tokens for r in requests)
    timed = {"a": [SimpleNamespace(seconds=s) for s in (1, 2, 4)], "b": [SimpleNamespace(seconds=s) for s in (3, 8, 8)]}
    assert ratios(timed, "a", "b") == {"median": 3, "min": 2, "max": 4, "turns": [3, 4, 2]}


@pytest.mark.parametrize(("field", "what"), [("token_ids", "tokens"), ("logprobs", "log-probabilities")])
def test_other_tokens_end_the_comparison(field, what):
    one, other = answers([1.0], [2.0]), answers([1.0], [2.0])
    setattr(other[1], field, [7])
    with pytest.raises(ValueError, match=f"static: request 1 has other {what}"):
        check_same("static", one, other)


def test_overhead_times_steps_that_decode_every_sequence():
    runner = overhead.NullRunner(load_tokenizer(DEMO).vocab_size)
    engine = overhead.decoding_engine(runner, None)
    assert engine.stats().running == overhead.SEQUENCES
    before = runner.steps
    seconds = overhead.step_seconds(engine)
    assert len(seconds) == runner.steps - before == overhead.STEPS
    assert min(seconds) > 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('data: {"choices":[{"text":""}],"usage":{"completion_tokens":1}}', True),
        ('data: {"choices":[],"usage":{"completion_tokens":1}}', False),
        ('data: {"error":{"message":"no"}}', False),
        ("data: [DONE]", False),
        ("", False),
    ],
)
def test_a_line_with_choices_is_a_token(line, expected):
    assert tokens_in(line) is expected


def test_the_page_and_the_json_say_what_was_found():
    llm, requests = ModellessLLM(), mixed(8, 50, 32)
    seen = measure.served(answers([0.5, 1.0], [1.5]))
    found = {
        "facts": {"date": "2026-01-02", "machine": "a machine"},
        "notes": ["a note"],
        "seconds": 3.0,
        "batching": measure.batching(llm, requests, 1, silent),
        "modes": measure.modes(llm, llm, requests, 1, silent),
        "prefix": measure.prefix(llm, 1, silent),
        "arrivals": {
            "capacity": 2.0,
            "rates": [{"rate": 1.0, "beyond_capacity": False, **seen}, {"rate": 9.0, "beyond_capacity": True, **seen}],
        },
        "overhead": {
            **{"sequences": 64, "steps": 5, "context_len": 9, "limit_s": 3e-4, "within_limit": False},
            "step_s": {"tokens only": {"p50": 4e-4, "p99": 5e-4}},
        },
    }
    assert json.loads(json.dumps(found)) == found
    text = report.page(found)
    assert text.startswith("- date: 2026-01-02\n- machine: a machine\n- a note\n- took 3 s\n")
    assert text.count("\n## ") == len(report.SECTIONS)
    assert re.search(
        r"^\| 1\.00 \| 1\.00 \| 1\.33 \| 1 of 2 \| 500\.0 \| 500\.0 \| 500\.0 \| 500\.0 \|  \|$", text, re.M
    )
    assert re.search(r"^\| 9\.00 .* beyond capacity \|$", text, re.M)
    assert "| tokens only | 400 | 500 |" in text
    assert "300 us: MISSED." in text
    # Every row of a table is as wide as its head.
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        assert len({row.count("|") for row in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rates 2,0", "'2,0', needs positive numbers"),
        ("--rates 2,inf", "needs positive numbers"),
        ("--rates two", "needs positive numbers"),
        ("--rates 2,2.0", "names a rate twice"),
        ("--only speed", "'speed' is none of batching, arrivals, prefix, overhead, modes"),
        ("--only batching,batching", "names a measurement twice"),
        ("--num_requests 0", "needs an integer of at least 1"),
        ("--rates 2 --only overhead", "--rates has no effect without the measurement of arrivals"),
        ("--json /nowhere/run.json", "there is no folder /nowhere"),
        ("--device gpu", "use --device cpu"),
        ("--verify", "--verify is for exported folders"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    try:
        status = __main__.main(flags.split())
    except SystemExit as refused:
        status = refused.code
    assert status != 0
    assert message in capsys.readouterr().err
