"""The Python API: what it takes, what it gives back, what it refuses."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from predict.cache_size import cache_blocks, free_memory
from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.config import ConfigError
from predict.model.source import find_model
from predict.runner import bytes_per_token

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def llm(demo):
    return LLM(demo, max_num_seqs=2, total_max_length=64)


def test_a_text_texts_and_token_ids_are_the_same_prompt(llm):
    text = "This module provides"
    [alone] = llm.generate(text, SHORT)
    ids = llm.tokenizer.encode(text)
    assert alone.prompt_token_ids == ids
    assert len(alone.token_ids) == len(alone.logprobs) == 5
    assert alone.finish_reason == "length"
    assert llm.generate([text, text, text], SHORT) == [alone] * 3
    assert llm.generate([ids], SHORT) == llm.generate([np.array(ids)], SHORT) == [alone]
    assert llm.tokenizer.decode(ids + alone.token_ids).endswith(alone.text)


def test_each_prompt_has_its_own_parameters(llm):
    params = [SamplingParams(max_tokens=n, temperature=t, seed=n, ignore_eos=True) for n, t in ((1, 0), (3, 1), (2, 0))]
    together = llm.generate(["The", "A", "Return"], params)
    assert [len(c.token_ids) for c in together] == [1, 3, 2]
    assert together == [llm.generate(p, s)[0] for p, s in zip(["The", "A", "Return"], params, strict=True)]


def test_a_stream_is_what_generate_gives(llm):
    prompts = ["The", "A", "Return"]
    streamed = list(llm.stream(prompts, SHORT))
    for i, completion in enumerate(llm.generate(prompts, SHORT)):
        deltas = [delta for of, delta in streamed if of == i]
        assert len(deltas) == 5
        assert "".join(d.text for d in deltas) == completion.text
        assert [t for d in deltas for t in d.token_ids] == completion.token_ids
        assert [d.finish_reason for d in deltas] == [None] * 4 + ["length"]
    assert [i for i, _ in streamed][:3] == [0, 1, 0]  # two at a time


def test_streams_may_be_open_at_the_same_time_or_left(llm):
    expected = [llm.generate(p, SHORT)[0].token_ids for p in ("The", "Return")]
    pairs = zip(llm.stream("The", SHORT), llm.stream("Return", SHORT), strict=True)
    assert [
        list(t) for t in zip(*((a.token_ids[0], b.token_ids[0]) for (_, a), (_, b) in pairs), strict=True)
    ] == expected
    for _ in llm.stream(["The", "A", "Return"], SHORT):
        break
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert llm.generate("The", SHORT)[0].token_ids == expected[0]


def test_several_samples_of_each_prompt(llm):
    drawn = SamplingParams(max_tokens=6, n=3, temperature=1.0, seed=4, ignore_eos=True)
    completions = llm.generate(["The", "A"], drawn)
    assert [c.index for c in completions] == [0, 1, 2] * 2
    own = [SamplingParams(max_tokens=6, temperature=1.0, seed=4 + i, ignore_eos=True) for i in range(3)]
    for i, prompt in enumerate(["The", "A"]):
        assert [c.token_ids for c in completions[3 * i :][:3]] == [llm.generate(prompt, p)[0].token_ids for p in own]


def test_the_most_probable_tokens_come_with_their_logprobs(llm):
    [completion] = llm.generate("The", SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True))
    assert [len(top) for top in completion.top_logprobs] == [3] * 5
    # Greedy: the most probable one was drawn; the same bits.
    assert [top[0] for top in completion.top_logprobs] == list(
        zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert all(a >= b for top in completion.top_logprobs for (_, a), (_, b) in itertools.pairwise(top))


def test_a_stop_string_ends_the_text_before_it(llm):
    plain = SamplingParams(max_tokens=20, ignore_eos=True)
    [completion] = llm.generate("This module provides", plain)
    stop = completion.text[12:17]
    assert completion.text.index(stop) == 12
    [cut] = llm.generate("This module provides", SamplingParams(max_tokens=20, stop=stop, ignore_eos=True))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (completion.text[:12], "stop", stop)
    assert cut.token_ids == completion.token_ids[: len(cut.token_ids)]


def test_a_bias_forbids_or_forces_a_token(llm):
    [free] = llm.generate("The", SHORT)
    banned = SamplingParams(max_tokens=5, ignore_eos=True, logit_bias={free.token_ids[0]: -100})
    assert llm.generate("The", banned)[0].token_ids[0] != free.token_ids[0]
    forced = SamplingParams(max_tokens=5, ignore_eos=True, logit_bias={77: 100})
    assert llm.generate("The", forced)[0].token_ids == [77] * 5


def test_end_of_sequence_waits_for_min_tokens(llm):
    [eos] = llm.tokenizer.eos_token_ids
    wants_to_end = {"logit_bias": {eos: 100}, "max_tokens": 9}
    assert llm.generate("The", SamplingParams(**wants_to_end))[0].token_ids == [eos]
    [completion] = llm.generate("The", SamplingParams(min_tokens=3, **wants_to_end))
    assert completion.token_ids.index(eos) == 3
    assert completion.finish_reason == "stop"


def test_a_chat_is_the_conversation_in_the_checkpoints_template(llm):
    question = [{"role": "user", "content": "What does len return?"}]
    [answer] = llm.chat(question, SHORT)
    assert answer.prompt_token_ids == llm.encode_chat(question)
    assert llm.chat([question, question], SHORT) == [answer, answer]
    assert llm.generate([answer.prompt_token_ids], SHORT)[0].token_ids == answer.token_ids
    assert "".join(delta.text for _, delta in llm.stream_chat(question, SHORT)) == answer.text


def test_a_template_of_ones_own_replaces_the_checkpoints(demo):
    llm = LLM(demo, chat_template="{{ messages[0]['content'] }}")
    assert llm.encode_chat([{"role": "user", "content": "The"}]) == llm.tokenizer.encode("The", add_bos=False)


def test_the_total_length_ends_a_sequence(llm):
    ids = [1] + [7] * 60
    [completion] = llm.generate([ids], SamplingParams(max_tokens=50, ignore_eos=True))
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], None, "prompt 0: the prompt is empty"),
        (["The", [1] * 64], None, "prompt 1: the prompt has 64 tokens, total_max_length is 64: no room for an answer"),
        ([[1, 1536]], None, "prompt 0: the prompt holds token 1536, needs ids from 0 to 1535"),
        ([[1, -1]], None, "prompt 0: the prompt holds token -1"),
        ([1, 2, 3], None, "prompt 0 is 1, needs a text or a list of token ids"),
        ([[1.5]], None, "prompt 0 is [1.5], needs a text or a list of token ids"),
        (["a", "b"], [SHORT], "1 sampling_params for 2 prompts"),
        ("a\ud800", None, "lone surrogate"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(llm, prompts, params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        llm.generate(prompts, params)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"content": "a"}], "messages[0] is {'content': 'a'}, needs an object with a string 'role'"),
        ([{"role": "assistant", "content": "a"}], "Roles must alternate"),
    ],
)
def test_conversations_the_template_refuses(llm, messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        llm.chat([messages])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "eager"}, "mode is 'eager', needs 'dynamic' or 'static'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"dtype": "float16"}, "dtype is float16, which runs on GPUs only; use --dtype bfloat16 or float32, or use --"),
        ({"quant_type": "int4"}, "quant_type is 'int4', needs weight_only_int8 or a8w8"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0, needs a positive integer"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0, needs a positive integer"),
        ({"kv_cache_memory": 1000}, "0.001 MB of KV cache hold no page: 64 tokens of"),
        ({"block_size": 0}, "block_size is 0, needs a positive integer"),
        ({"threads": 0}, "threads is 0, needs 1 to 1024"),
        ({"total_max_length": 2049}, "is 2049, needs 2 to 2048, the model's max_position_embeddings"),
        ({"kv_cache_memory": 10**15}, "kv_cache_memory is 1000000.000 GB, more than there is free"),
        ({"num_hidden_layers": 2}, "--num_hidden_layers is for dummy models"),
        ({"verify": True}, "verify is for exported folders"),
        ({"chat_template": "no such file"}, "chat template 'no such file' is neither"),
    ],
)
def test_options_that_do_not_fit_are_refused(demo, options, message):
    with pytest.raises((ValueError, MemoryError), match=re.escape(message)):
        LLM(demo, **options)
    LLM(demo)  # and nothing stays behind


@pytest.mark.parametrize(
    ("checkpoint", "dtype", "its_device", "other_device"),
    [
        ("sliding_window_tied_float16", "float16", "gpu", "cpu"),
        ("multi_query_top3_float32", "float32", "cpu", "gpu"),
    ],
)
def test_a_checkpoint_runs_in_its_own_type_where_the_device_has_it(checkpoint, dtype, its_device, other_device):
    source = find_model(GOLDEN / checkpoint)
    assert source.dtype(None, its_device) == dtype
    assert source.dtype("bfloat16", other_device) == "bfloat16"
    with pytest.raises(ConfigError, match=f"{checkpoint}: the checkpoint is {dtype}, .* or use --device {its_device}"):
        source.dtype(None, other_device)


def test_the_cache_takes_what_it_may_and_no_more_than_requests_can_use(demo, capsys):
    llm = LLM(demo, max_num_seqs=3, total_max_length=100, block_size=16)
    assert llm.runner.num_blocks == 3 * 7
    tokens = f"KV cache: {21 * 16} tokens in 21 pages of 16, "
    assert tokens in capsys.readouterr().err
    page = 16 * bytes_per_token(llm.config, 1, llm.dtype)
    small = LLM(demo, block_size=16, kv_cache_memory=5 * page + 1)
    assert small.runner.num_blocks == 5
    with pytest.raises(ValueError, match="need 6 KV cache blocks of 16 tokens, there are 5"):
        small.generate([[7] * 80], SamplingParams(max_tokens=17))
    free, size = 1000 * page, {"block_size": 16, "bytes_per_token": page // 16}
    assert cache_blocks(None, free, **size, max_num_seqs=10**9, max_length=100) == 500
    with pytest.raises(MemoryError, match="more than there is free for a rank"):
        cache_blocks(free + 1, free, **size, max_num_seqs=1, max_length=100)


def test_free_memory_is_that_of_the_machine_or_less():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory() < total
