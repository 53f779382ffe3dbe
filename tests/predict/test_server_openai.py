"""The openai package as the client of the demo checkpoint: the same text as without a server, and every option."""

import asyncio
import threading

import openai
import pytest

from predict.engine.request import SamplingParams
from predict.llm import LLM
from tests.predict.served import serving

PROMPT = "This module provides"
MESSAGES = [{"role": "system", "content": "You are short."}, {"role": "user", "content": "What does os.path.join do?"}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def offline(demo):
    return LLM(demo)


@pytest.fixture(scope="module")
def served(demo):
    with serving(LLM(demo)) as running:
        yield running


@pytest.fixture
def client(served):
    yield served.openai
    served.wait_until_idle()


def test_completions_say_what_the_offline_run_says(client, offline):
    prompts = [PROMPT, "Return the", "class"]
    expected = offline.generate(prompts, SamplingParams(max_tokens=24))
    answer = client.completions.create(prompt=prompts, **GREEDY)
    assert [c.text for c in answer.choices] == [e.text for e in expected]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.finish_reason for c in answer.choices] == [e.finish_reason for e in expected]
    assert answer.usage.completion_tokens == sum(len(e.token_ids) for e in expected)
    assert answer.usage.prompt_tokens == sum(len(e.prompt_token_ids) for e in expected)
    ids = client.completions.create(prompt=offline.tokenizer.encode(PROMPT), **GREEDY)
    assert ids.choices[0].text == expected[0].text


def test_chat_says_what_the_offline_run_says(client, offline):
    [expected] = offline.chat(MESSAGES, SamplingParams(max_tokens=24))
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    again = client.chat.completions.create(messages=MESSAGES, model="demo", temperature=0, max_completion_tokens=24)
    assert again.choices[0].message.content == expected.text
    assert again.usage.prompt_tokens_details.cached_tokens == 0  # less than a page


def test_streams_add_up_to_the_whole(client, offline):
    [expected] = offline.generate(PROMPT, SamplingParams(max_tokens=24))
    *chunks, last = client.completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert "".join(c.choices[0].text for c in chunks) == expected.text
    assert last.usage.completion_tokens == len(expected.token_ids)
    [answer] = offline.chat(MESSAGES, SamplingParams(max_tokens=24))
    first, *chunks = client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.text
    assert chunks[-1].choices[0].finish_reason == answer.finish_reason


def test_stop_strings_and_stop_tokens(client, offline):
    whole = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[10:14]
    for chunks in (
        [client.completions.create(prompt=PROMPT, stop=["nowhere", stop], **GREEDY)],
        list(client.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY)),
    ):
        assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].choices[0].stop_reason == stop
    [completion] = offline.generate(PROMPT, SamplingParams(max_tokens=24))
    token = completion.token_ids[3]
    answer = client.completions.create(prompt=PROMPT, extra_body={"stop_token_ids": [token]}, **GREEDY).choices[0]
    assert answer.stop_reason == token
    assert whole.startswith(answer.text)


def test_logprobs_of_completions(client, offline):
    [expected] = offline.generate(PROMPT, SamplingParams(max_tokens=24, logprobs=3))
    for chunks in (
        [client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY)],
        list(client.completions.create(prompt=PROMPT, logprobs=3, stream=True, **GREEDY)),
    ):
        found = [c.choices[0].logprobs for c in chunks]
        tokens = [t for f in found for t in f.tokens]
        assert "".join(tokens).removesuffix("</s>") == expected.text
        offsets = [o for f in found for o in f.text_offset]
        assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
        assert [x for f in found for x in f.token_logprobs] == pytest.approx(expected.logprobs)
        for token, top in zip(tokens, [t for f in found for t in f.top_logprobs], strict=True):
            assert len(top) == 3
            assert next(iter(top)) == token  # greedy: the most probable one
    bare = client.completions.create(prompt=PROMPT, logprobs=0, **GREEDY).choices[0].logprobs
    assert bare.top_logprobs is None
    assert bare.tokens == tokens


def test_logprobs_of_chats(client, offline):
    [expected] = offline.chat(MESSAGES, SamplingParams(max_tokens=24, logprobs=2))
    for chunks in (
        [client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)],
        list(client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True, **GREEDY)),
    ):
        found = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert [t.logprob for t in found] == pytest.approx(expected.logprobs)
        assert b"".join(bytes(t.bytes) for t in found).decode().removeprefix(" ").removesuffix("</s>") == expected.text
        assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].token == t.token for t in found)
    bare = client.chat.completions.create(messages=MESSAGES, logprobs=True, **GREEDY).choices[0].logprobs
    assert all(t.top_logprobs == [] for t in bare.content)


def test_seed_and_n(client, offline):
    sampled = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 1.0}
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=11, n=3)
    expected = [c.text for c in offline.generate(PROMPT, params)]
    for _ in range(2):
        answer = client.completions.create(n=3, seed=11, **sampled)
        assert [c.text for c in answer.choices] == expected
    assert len(set(expected)) == 3
    unseeded = {client.completions.create(**sampled).choices[0].text for _ in range(4)}
    assert len(unseeded) == 4  # another seed every time


def test_sampling_options_reach_the_engine(client, offline):
    options = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 4, "ignore_eos": True}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "top_p": 0.9, "seed": 5, "temperature": 0.8}
    bias = {50: 3.5, 60: -100.0}
    params = SamplingParams(max_tokens=24, logit_bias=bias, **options, **penalties)
    [expected] = offline.generate(PROMPT, params)
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=24, logit_bias={str(k): v for k, v in bias.items()},
        extra_body=options, **penalties,
    )  # fmt: skip
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == 24


def test_a_shared_beginning_is_found_in_the_cache(client):
    prompt = "The following example shows how to read a file line by line and count its words. " * 6
    first = client.completions.create(prompt=prompt, **GREEDY)
    second = client.completions.create(prompt=prompt, **GREEDY)
    assert second.choices[0].text == first.choices[0].text
    assert second.usage.prompt_tokens_details.cached_tokens >= 64


def test_cancelling_in_mid_stream_ends_the_request(served, client):
    endless = {"prompt": PROMPT, "model": "demo", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    before = served.stats.generated_tokens
    stream = client.completions.create(stream=True, **endless)
    for _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    served.wait_until_idle()
    assert served.stats.generated_tokens - before < 2000


def test_cancelling_a_request_that_does_not_stream(served, client):
    async def cancel() -> None:
        asynchronous = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        before = served.stats.generated_tokens
        task = asyncio.ensure_future(
            asynchronous.completions.create(
                prompt=PROMPT, model="demo", max_tokens=2000, extra_body={"ignore_eos": True}
            )
        )
        while served.stats.generated_tokens == before:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    before = served.stats.generated_tokens
    asyncio.run(cancel())
    served.wait_until_idle()
    assert served.stats.generated_tokens - before < 2000


def test_concurrent_streams_say_what_each_says_alone(client, offline):
    prompts = [f"The {word} of the" for word in ("name", "value", "end", "list", "type", "size", "first", "last")]
    expected = [c.text for c in offline.generate(prompts, SamplingParams(max_tokens=24))]
    texts: dict[int, str] = {}

    def read(i: int) -> None:
        stream = client.completions.create(prompt=prompts[i], stream=True, **GREEDY)
        texts[i] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[i] for i in range(len(prompts))] == expected


def test_errors_are_openai_s(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(prompt=PROMPT, model="demo", max_tokens=10**6)
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' is not served here, 'demo' is"):
        client.completions.create(prompt=PROMPT, model="gpt-4")
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
