"""The engine on integers: what each request gets, whatever else runs, and what every step is made of."""

import re
import time

import numpy as np
import pytest

from predict.engine.batch import INPUTS, Chunk, StepResult, pack, pack_scoring
from predict.engine.engine import Engine
from predict.engine.request import SamplingParams, Sequence
from tests.predict.invariants import check_invariants
from tests.predict.paged_runner import PagedRunner, expected, run, tokens_of

EOS = 2
LONGEST = 100


def engine_on(runner: PagedRunner | None = None, **options) -> Engine:
    return Engine(runner or PagedRunner(), (EOS,), LONGEST, **options)


def generate(engine: Engine, prompts, params) -> list[list[int]]:
    """The tokens of prompts that come together; params one for all, or one for each."""
    given = params if isinstance(params, list) else [params] * len(prompts)
    for i, (prompt, p) in enumerate(zip(prompts, given, strict=True)):
        engine.add(str(i), prompt, p)
    deltas = run(engine)
    return [tokens_of(deltas[str(i), 0]) for i in range(len(prompts))]


def alone(prompt, params, index=0):
    return expected(PagedRunner(), prompt, params, index, EOS, LONGEST)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 2048])
def test_chunks_change_nothing(budget):
    prompts, params = [[10], [20, 30, 40], list(range(13))], SamplingParams(max_tokens=15, ignore_eos=True)
    engine = engine_on(max_num_batched_tokens=budget)
    assert generate(engine, prompts, params) == [alone(p, params)[0] for p in prompts]
    assert max(len(s.token_ids) for s in engine.runner.steps) <= budget


def test_steps_pack_decodes_first_then_as_much_prompt_as_fits():
    engine = engine_on(max_num_batched_tokens=8)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    engine.add("short", [1, 2], params)
    engine.step()
    engine.add("long", list(range(20)), params)
    engine.add("late", [5, 6, 7], params)
    for _ in range(3):
        engine.step()
    sizes = [np.diff(batch.cu_seqlens).tolist() for batch in engine.runner.steps]
    assert sizes == [[2], [1, 7], [1, 7], [1, 6, 1]]


def test_a_request_joins_at_the_next_step_and_leaves_when_done():
    engine = engine_on()
    engine.add("a", [1], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    engine.add("b", [2], SamplingParams(max_tokens=3, ignore_eos=True))
    run(engine)
    assert [len(s.context_lens) for s in engine.runner.steps] == [1, 2, 2, 1]


def test_at_most_max_num_seqs_run_together():
    engine = engine_on(max_num_seqs=2)
    prompts = [[i] for i in range(5)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    assert generate(engine, prompts, params) == [alone(p, params)[0] for p in prompts]
    assert max(len(s.context_lens) for s in engine.runner.steps) == 2


def test_the_youngest_gives_way_and_computes_again():
    engine = engine_on(PagedRunner(num_blocks=6))
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    prompts = [[1, 2, 3], [4, 5, 6]]
    assert generate(engine, prompts, params) == [alone(p, params)[0] for p in prompts]
    assert engine.stats().preemptions == 1
    # Its own full pages were still there: only what followed them was computed twice.
    [again] = [b for b in engine.runner.steps[1:] if (np.diff(b.cu_seqlens) > 1).any()]
    assert again.context_lens[-1] > 0


def test_nobody_comes_in_for_pages_that_a_running_request_needs_next():
    engine = engine_on(PagedRunner(num_blocks=4))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [[1] * 8, [2] * 8]
    assert generate(engine, prompts, params) == [alone(p, params)[0] for p in prompts]
    assert engine.stats().preemptions == 0


def test_a_known_prefix_is_not_computed_again():
    engine = engine_on()
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    prompt = list(range(10))
    for i, (text, found) in enumerate([(prompt, 0), (prompt, 8), (prompt[:8], 4), ([*prompt[:9], 40], 8), ([9], 0)]):
        engine.add(str(i), text, params)
        deltas = run(engine)[str(i), 0]
        assert tokens_of(deltas) == alone(text, params)[0]
        assert {(d.num_prompt_tokens, d.num_cached_tokens) for d in deltas} == {(len(text), found)}
    stats = engine.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_queried_tokens) == (20, 39)
    assert stats.blocks_cached + stats.blocks_free == stats.blocks_total
    assert stats.blocks_cached > 0


def test_generated_tokens_are_a_prefix_too():
    engine = engine_on()
    prompt = list(range(7))
    [answer] = generate(engine, [prompt], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.add("again", prompt + answer + [3], SamplingParams(max_tokens=1))
    assert run(engine)["again", 0][0].num_cached_tokens == 12  # the answer's last token was never computed


def test_without_prefix_caching_nothing_is_found_or_kept():
    engine = engine_on(prefix_caching=False)
    for i in range(2):
        engine.add(str(i), list(range(10)), SamplingParams(max_tokens=2))
        assert run(engine)[str(i), 0][0].num_cached_tokens == 0
    assert engine.stats().blocks_free == engine.stats().blocks_total


def test_pages_unused_longest_are_given_out_first():
    engine = engine_on(PagedRunner(num_blocks=4))
    params = SamplingParams(max_tokens=1)
    first, second, third = ([i] * 8 for i in (1, 2, 3))
    for i, prompt in enumerate([first, second, first, third]):  # two full pages each
        engine.add(str(i), prompt, params)
        run(engine)
    for prompt, found in ((first, 4), (second, 0)):
        engine.add("again", prompt, params)
        assert run(engine)["again", 0][0].num_cached_tokens == found


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_samples_share_the_pages_of_their_prompt(prefix_caching):
    engine = engine_on(prefix_caching=prefix_caching)
    prompt, params = list(range(18)), SamplingParams(max_tokens=6, n=3, seed=5, ignore_eos=True)
    engine.add("r", prompt, params)
    engine.step()
    engine.step()
    # The prompt is computed once; what of it does not fill a page, by every sample.
    assert [np.diff(batch.cu_seqlens).tolist() for batch in engine.runner.steps] == [[18], [1, 2, 2]]
    running = engine.scheduler.running
    assert [s.index for s in running] == [0, 1, 2]
    assert {tuple(s.block_ids[:4]) for s in running} == {tuple(running[0].block_ids[:4])}
    assert len({s.block_ids[4] for s in running}) == 3
    drawn = {s.index: s.output_ids for s in running}
    for (_, index), deltas in run(engine).items():
        assert drawn[index] + tokens_of(deltas) == alone(prompt, params, index)[0]
    # Sample i is what a request of its own with seed + i would get.
    assert alone(prompt, params, 2)[0] == alone(prompt, SamplingParams(max_tokens=6, seed=7, ignore_eos=True))[0]
    assert engine.stats().prefix_hit_tokens == 0  # sharing with oneself is no hit


def test_abort_frees_every_page_at_once():
    engine = engine_on(max_num_seqs=2, prefix_caching=False)
    params = SamplingParams(max_tokens=20, n=4, ignore_eos=True)
    engine.add("a", list(range(20)), params)
    engine.add("b", [1], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    engine.step()
    engine.abort("a")
    check_invariants(engine)
    assert engine.stats().blocks_free == engine.stats().blocks_total
    assert [s.request_id for s in (*engine.scheduler.running, *engine.scheduler.waiting)] == ["b"]
    deltas = run(engine)
    assert {k: [d.finish_reason for d in v] for k, v in deltas.items()} == {
        **{("a", i): ["abort"] for i in range(4)},
        ("b", 0): [None, None, "length"],
    }
    engine.abort("a")
    engine.abort("never seen")
    assert not engine.has_work


def test_what_ends_a_request_and_why():
    engine = engine_on()
    runner = engine.runner
    prompt = [7]
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    tokens, _ = alone(prompt, free)
    stop = tokens[5]
    position = tokens.index(stop)

    def outcome(eos=(EOS,), total=LONGEST, **options):
        engine = Engine(runner, eos, total)
        engine.add("r", prompt, SamplingParams(max_tokens=40, **options))
        deltas = run(engine)["r", 0]
        assert all(d.finish_reason is None for d in deltas[:-1])
        return len(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason

    assert outcome(eos=()) == (40, "length", None)
    assert outcome(eos=(), total=11) == (10, "length", None)
    assert outcome(eos=(stop,)) == (position + 1, "stop", None)
    assert outcome(eos=(stop,), ignore_eos=True) == (40, "length", None)
    assert outcome(eos=(), stop_token_ids=(stop,)) == (position + 1, "stop", stop)
    assert outcome(eos=(stop,), ignore_eos=True, stop_token_ids=(stop,)) == (position + 1, "stop", stop)
    assert outcome(eos=(stop,), stop_token_ids=(stop,)) == (position + 1, "stop", None)


def test_nothing_ends_a_request_before_min_tokens():
    everything_but_3 = tuple(t for t in range(50) if t != 3)
    engine = engine_on()
    engine.add("r", [1], SamplingParams(max_tokens=9, min_tokens=4, stop_token_ids=everything_but_3, ignore_eos=True))
    assert tokens_of(run(engine)["r", 0])[:4] == [3] * 4
    assert [b.bias_offsets.tolist() for b in engine.runner.steps[:5]] == [[0, 49]] * 4 + [[0, 0]]


def test_alternatives_come_when_asked_for():
    engine = engine_on()
    for k in (None, 0, 2):
        engine.add(str(k), [1, 2], SamplingParams(max_tokens=1, logprobs=k))
    deltas = run(engine)
    [token] = tokens_of(deltas["2", 0])
    assert deltas["2", 0][0].top_logprobs == [[(token, -0.5 * token), (token + 1, -0.5 * (token + 1))]]
    assert deltas["2", 0][0].logprobs == [-float(token)]
    assert deltas["0", 0][0].top_logprobs == [[]]
    assert deltas["None", 0][0].top_logprobs is None


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 100, {}, "the prompt has 100 tokens, total_max_length is 100: no room for an answer"),
        ([1, 50], {}, "the prompt holds token 50, needs ids from 0 to 49"),
        ([1, -1], {}, "the prompt holds token -1"),
        ([1], {"stop_token_ids": (1, 50)}, "stop_token_ids holds token 50"),
        ([1], {"logit_bias": {77: 1.0}}, "logit_bias holds token 77"),
        ([1], {"stop": ("x",)}, "stop needs text"),
        ([1], {"min_tokens": 1, "stop_token_ids": range(50)}, "min_tokens is 1, but stop_token_ids holds every token"),
        (
            [1] * 30,
            {"max_tokens": 12},
            "30 prompt tokens and up to 12 new ones need 11 KV cache blocks of 4 tokens, there are 10; shorten",
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once(prompt, options, message):
    engine = engine_on(PagedRunner(num_blocks=10))
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.add("r", prompt, SamplingParams(**options))
    assert not engine.has_work
    engine.add("r", [1] * 30, SamplingParams(max_tokens=11))  # 40 tokens in ten pages: the last is not computed
    with pytest.raises(ValueError, match="request 'r' has not finished; give every request an id of its own"):
        engine.add("r", [1], SamplingParams())
    run(engine)


def test_a_step_that_fails_can_be_run_again(monkeypatch):
    engine = engine_on()
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    engine.add("r", list(range(9)), params)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "step", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    check_invariants(engine)
    assert tokens_of(run(engine)["r", 0]) == alone(list(range(9)), params)[0][1:]


def test_scoring_asks_for_every_following_token():
    engine = engine_on(max_num_batched_tokens=3)
    forced = []
    engine.runner.step = lambda batch: (
        forced.extend(batch.sampling_ints[:, 3].tolist())
        or StepResult(None, -batch.sampling_ints[:, 1].astype(np.float32), None, None)
    )
    assert engine.score([7, 8, 9, 10, 11]) == [-1.0, -2.0, -3.0, -4.0]
    assert forced == [8, 9, 10, 11]
    assert engine.stats().blocks_free == engine.stats().blocks_total
    with pytest.raises(MemoryError, match="100 KV cache blocks of 4 tokens are needed, 64 of 64 are available"):
        engine.score(list(range(50)) * 8)


def chunk(tokens, num_tokens=None, **params) -> Chunk:
    sequence = Sequence(tokens, SamplingParams(**params))
    sequence.block_ids.extend([0, 1])
    return Chunk(sequence, num_tokens or len(tokens))


def test_history_is_sent_only_for_penalties():
    penalised = chunk([7, 8, 9], 4, repetition_penalty=1.5, logprobs=3)
    penalised.sequence.token_ids.append(10)
    batch = pack([chunk([5, 6]), penalised])
    assert batch.history_offsets.tolist() == [0, 0, 4]
    assert batch.history_ids.tolist() == [7, 8, 9, 10]
    assert batch.sampling_ints.tolist() == [[0, 2, 0, -1, 0, 0], [0, 4, 0, -1, 3, 3]]
    assert batch.sample_rows.tolist() == [1, 5]


def test_biases_are_sent_row_by_row():
    batch = pack([chunk([5]), chunk([6], logit_bias={3: 1.5, 9: -100}), chunk([7], logit_bias={1: 2})])
    assert batch.bias_offsets.tolist() == [0, 0, 2, 3]
    assert batch.bias_ids.tolist() == [3, 9, 1]
    assert batch.bias_values.tolist() == [1.5, -100.0, 2.0]


def test_a_step_in_mid_prompt_still_samples_one_row():
    batch = pack([chunk([5, 6, 7], 2, temperature=1.0, logit_bias={3: 1})])
    assert batch.sample_rows.tolist() == [1]
    assert batch.sampling_floats[0, 0] == 0.0
    assert batch.bias_offsets.tolist() == [0, 0]


def test_arrays_have_the_contracts_types():
    asks_for_everything = chunk([5, 6], repetition_penalty=2.0, logit_bias={1: 1.0})
    scoring = Sequence([5, 6], SamplingParams())
    scoring.block_ids.append(0)
    for batch in (pack([asks_for_everything]), pack([chunk([5, 6], 1)]), pack_scoring(scoring, 1)):
        assert [(a.ndim, a.dtype.name) for a in batch.arrays()] == list(INPUTS.values())


def test_a_step_of_64_sequences_costs_little(capsys):
    """The promise is 300 us on a machine to itself; a busy one may take several times that."""

    class Null:
        num_blocks, block_size, vocab_size = 64 * 64, 64, 32000
        outputs = StepResult(*(np.zeros(s, t) for s, t in ((64, "i4"), (64, "f4"), ((64, 20), "i4"), ((64, 20), "f4"))))

        def step(self, batch):
            return StepResult(*(x[: len(batch.sample_rows)] for x in self.outputs))

    engine = Engine(Null(), (EOS,), 4096)
    for i in range(64):
        engine.add(str(i), [i] + [7] * 1000, SamplingParams(max_tokens=500))
    while engine.stats().waiting:
        engine.step()
    seconds = []
    for _ in range(300):
        started = time.perf_counter()
        assert len(engine.step()) >= 63
        seconds.append(time.perf_counter() - started)
    with capsys.disabled():
        print(f"\nengine without a model, 64 sequences: {1e6 * np.median(seconds):.0f} us a step")
    assert np.median(seconds) < 3e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", x) for x in (0, 1.5, True)),
        *(("min_tokens", x) for x in (-1, 129)),
        *(("temperature", x) for x in (-0.1, float("nan"), float("inf"), "hot")),
        *(("top_k", x) for x in (-1, 2**31)),
        *(("top_p", x) for x in (0.0, 1.1)),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        *(("seed", x) for x in (-1, 2**63)),
        *(("n", x) for x in (0, 129)),
        *(("stop", x) for x in (3, ("a", ""), "", [None])),
        *(("stop_token_ids", x) for x in (3, (-1,), ("a",), (True,))),
        *(("logit_bias", x) for x in ([1], {"1": 1.0}, {-1: 1.0}, {1: 101.0}, {1: float("nan")}, {1: "a"})),
        ("ignore_eos", 1),
        *(("logprobs", x) for x in (-1, 21, True, 1.0)),
    ],
)
def test_sampling_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*, needs"):
        SamplingParams(**{name: value})


def test_what_may_be_given_in_several_forms():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], logit_bias={5: -1})
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (1, 2), {5: -1})
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
