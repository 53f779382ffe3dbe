"""The Python API: what it takes, what it gives back, what it refuses."""

import re

import numpy as np
import pytest

from predict.engine.request import SamplingParams
from predict.llm import LLM

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(demo):
    return LLM(demo, batch_size=2, total_max_length=64)


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


def test_on_token_sees_every_token_in_order(llm):
    seen = {0: [], 1: [], 2: []}
    completions = llm.generate(["The", "A", "Return"], SHORT, on_token=lambda i, token: seen[i].append(token))
    assert [c.token_ids for c in completions] == list(seen.values())


def test_a_chat_is_the_conversation_in_the_checkpoints_template(llm):
    question = [{"role": "user", "content": "What does len return?"}]
    [answer] = llm.chat(question, SHORT)
    assert answer.prompt_token_ids == llm.encode_chat(question)
    assert llm.chat([question, question], SHORT) == [answer, answer]
    assert llm.generate([answer.prompt_token_ids], SHORT)[0].token_ids == answer.token_ids


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
        ([[]], None, "prompt 0 is empty"),
        (["The", [1] * 64], None, "prompt 1 has 64 tokens, total_max_length is 64: no room for an answer"),
        ([[1, 1536]], None, "prompt 0 holds token 1536, needs ids from 0 to 1535"),
        ([[1, -1]], None, "prompt 0 holds token -1"),
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
        ({"quant_type": "int4"}, "quant_type is 'int4', needs weight_only_int8"),
        ({"batch_size": 0}, "batch_size is 0, needs a positive integer"),
        ({"block_size": 0}, "block_size is 0, needs a positive integer"),
        ({"threads": 0}, "threads is 0, needs 1 to 1024"),
        ({"total_max_length": 2049}, "is 2049, needs 2 to 2048, the model's max_position_embeddings"),
        ({"batch_size": 10**9}, "GB, more than this machine has"),
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
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, needs at least 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, needs an integer"),
        ({"temperature": "hot"}, "temperature is 'hot', needs a number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 2**31}, "top_k is 2147483648, needs an integer from 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"seed": -1}, "seed is -1, needs an integer from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
    ],
)
def test_sampling_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**options)
