"""The API without a model: what is answered, what is refused and how."""

import json
import time

import pytest

from tests.predict.served import ModellessLLM, serving

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"prompt": "Hello"}


@pytest.fixture(scope="module")
def served():
    with serving(ModellessLLM(), max_body_bytes=100_000) as running:
        yield running


def refusal(response, status: int = 400) -> dict:
    """The error of a response that has OpenAI's shape and is short."""
    assert response.status_code == status, response.text
    assert len(response.content) < 4096
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]


BAD_FIELDS = {
    # field -> (value, message)
    "temperature": [
        (-1, "temperature is -1.0, needs a number >= 0"),
        ("hot", 'temperature is "hot", needs a number >= 0: 0 is greedy, the default is 1'),
        (True, "temperature is true, needs a number"),
        (1e999, "not valid JSON"),
    ],
    "top_p": [(0, "top_p is 0.0, needs a number above 0"), (1.5, "top_p is 1.5"), ([1], "top_p is a list, needs")],
    "top_k": [(-1, "top_k is -1, needs an integer from 0 (off)"), (1.5, "top_k is 1.5, needs an integer")],
    "min_p": [(2, "min_p is 2.0, needs a number from 0 (off) to 1")],
    "repetition_penalty": [(0, "repetition_penalty is 0.0, needs a positive number")],
    "seed": [(-1, "seed is -1, needs an integer from 0"), (2**70, "seed is 1180591620717411303424, needs")],
    "n": [(0, "n is 0, needs 1 to 128"), (129, "n is 129, needs 1 to 128"), ("2", 'n is "2", needs an integer')],
    "max_tokens": [
        (0, "max_tokens is 0, needs at least 1"),
        (10**6, "max_tokens is 1000000, with "),
    ],
    "min_tokens": [(17, "min_tokens is 17, needs 0 (off) to max_tokens, which is 16")],
    "stop": [
        ("", "stop is ('',), needs a text or texts, none of them empty"),
        (5, "stop is 5, needs a text, or a list of up to 16 texts"),
        (["x"] * 17, "stop is a list, needs a text, or a list of up to 16 texts"),
    ],
    "stop_token_ids": [([5000], "stop_token_ids holds token 5000, needs ids from 0 to 1535"), (5, "needs a list")],
    "logit_bias": [
        ({"5": 101}, "logit_bias is {5: 101.0}, needs a mapping from token ids to numbers from -100 to 100"),
        ({"x": 1}, "logit_bias has the key 'x', needs token ids"),
        ({"5000": 1}, "logit_bias holds token 5000"),
        ({"5": "x"}, 'logit_bias is "x", needs an object of token ids'),
    ],
    "stream": [("yes", 'stream is "yes", needs true or false')],
    "stream_options": [
        ({"include_usage": True}, "stream_options has no effect without stream"),
        ({"nope": 1}, "stream_options.nope is not a field this server knows"),
    ],
    "tools": [([{"type": "function"}], "tools is not supported by this server; leave it out")],
    "response_format": [({"type": "json_object"}, "response_format is not supported by this server")],
    "store": [(True, "store is not supported by this server")],
    "nope": [(1, "nope is not a field this server knows; leave it out")],
    "x" * 5000: [(1, "is not a field this server knows; leave it out")],
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [pytest.param(f, v, m, id=f"{f:.20}={v!r:.20}") for f, cases in BAD_FIELDS.items() for v, m in cases],
)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_bad_field_is_named_with_what_it_needs(served, route, field, value, message):
    request = {**(TEXT if route == "completions" else CHAT), "max_tokens": 16, field: value}
    error = refusal(served.http.post(f"/v1/{route}", content=json.dumps(request), headers=JSON))
    assert message in error["message"]
    if error["param"] is not None:
        assert field.startswith(error["param"])


JSON = {"Content-Type": "application/json"}
BAD_BODIES = {
    b"": "the body is missing, needs a JSON object",
    b"5": "the body is 5, needs a JSON object",
    b"[]": "the body is a list, needs a JSON object",
    b'{"prompt": "a"': "the body is not valid JSON: EOF while parsing an object at line 1 column 14",
    b'{"prompt": "a", "temperature": NaN}': "the body is not valid JSON: expected value at line 1",
    b'{"prompt": "a", "temperature": Infinity}': "the body is not valid JSON: expected value",
    b'{"prompt": "\xff"}': "the body is not valid JSON: invalid unicode code point",
    b'{"prompt": "\\ud800"}': "the body is not valid JSON",
    b'{"prompt": ' + b"[" * 10_000: "the body is not valid JSON: recursion limit exceeded",
    b'{"seed": ' + b"9" * 5_000 + b"}": "the body is not valid JSON: number out of range",
    b"{}": "prompt is missing, needs a text, token ids, or a list of",
    b'{"prompt": null}': "prompt is null, needs a text",
    b'{"prompt": {}}': "prompt is an object, needs a text",
    b'{"prompt": []}': "prompt is a list, needs a text",
    b'{"prompt": [1, "a"]}': "prompt is a list, needs a text",
    b'{"prompt": [[]]}': "the prompt is empty; needs at least one token",
    b'{"prompt": [-1]}': "the prompt holds token -1, needs ids from 0 to 1535",
    b'{"prompt": [1536]}': "the prompt holds token 1536, needs ids from 0 to 1535",
    b'{"prompt": "a", "best_of": 2}': "best_of 2 is not supported by this server",
    b'{"prompt": "a", "echo": true}': "echo is not supported by this server",
    b'{"prompt": "a", "suffix": "b"}': "suffix is not supported by this server",
    b'{"prompt": "a", "logprobs": 21}': "logprobs is 21, needs None, or 0 to 20",
    b'{"prompt": "a", "n": 128, "max_tokens": 1, "prompt": ["a", "b", "c", "d", "e", "f", "g", "h", "i"]}': "1152",
}


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: f"{body[:40]!r}")
def test_a_bad_body_is_refused(served, body):
    error = refusal(served.http.post("/v1/completions", content=body, headers=JSON))
    assert BAD_BODIES[body] in error["message"]


def user(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


BAD_CHATS = {
    "no messages": ({}, "messages is missing, needs a list of at least one"),
    "none": ({"messages": []}, "messages is a list, needs a list of at least one"),
    "a text": ({"messages": "Hello"}, 'messages is "Hello", needs a list'),
    "role": (
        {"messages": [{"role": "robot", "content": "a"}]},
        'messages[0].role is "robot", needs "system", "user" or "assistant"',
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content is missing, needs a text"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null, needs a text"),
    "twice": ({"messages": user("a")[:1] * 2}, "refuses the messages: Roles must alternate"),
    "no question": ({"messages": user("a", "b")}, 'messages[1], the last, has the role "assistant", needs "user"'),
    "image": (
        {"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])},
        "messages[0].content[0].image_url is not supported by this server; leave it out",
    ),
    "part": (
        {"messages": user([{"type": "image", "text": "x"}])},
        'messages[0].content[0].type is "image", needs "text": this server reads nothing else',
    ),
    "name": (
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        "messages[0].name is not supported by this server",
    ),
    "limits": ({**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, "are the same limit and differ"),
    "limit": ({**CHAT, "max_completion_tokens": 0}, "max_completion_tokens is 0, needs at least 1"),
    "alternatives": ({**CHAT, "top_logprobs": 2}, "top_logprobs has no effect without logprobs"),
    "many": ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs is 21, needs None, or 0 to 20"),
    "long": (
        {"messages": user("a " * 300)},
        "tokens, which leave no room for an answer in the 256 tokens of context; shorten it",
    ),
    "huge": ({"messages": user("a" * 50_000)}, "messages has 50000 characters, more than the 256 tokens"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_conversation_is_refused(served, case):
    request, message = BAD_CHATS[case]
    error = refusal(served.http.post("/v1/chat/completions", json=request))
    assert message in error["message"]
    assert str(served.service.llm.tokenizer.folder) not in error["message"]


def test_refusals_are_quick(served):
    """Under 50 ms each; the best of a few, because the machine has other things to do."""
    for route, request in [
        ("completions", {"prompt": "a " * 45_000}),
        ("completions", {"prompt": [5] * 30_000}),
        ("chat/completions", {"messages": user("a " * 300)}),
        ("completions", {"prompt": "a", "temperature": -1}),
        ("completions", {"prompt": "a", "nope": "x" * 90_000}),
        ("completions", {"prompt": "a"} | {f"nope{i}": i for i in range(5000)}),
        ("completions", {"prompt": ["a", *[1] * 30_000]}),
        ("completions", {"prompt": "a", "logit_bias": {f"x{i}": i for i in range(5000)}}),
        ("chat/completions", {"messages": [{}] * 20_000}),
    ]:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            refusal(served.http.post(f"/v1/{route}", json=request))
            times.append(time.perf_counter() - started)
        assert min(times) < 0.05, (route, times)


def test_a_body_larger_than_the_limit_is_refused_without_reading_it(served):
    def endless():
        while True:
            yield b" " * 10_000

    declared = served.http.post("/v1/completions", content=b" " * 100_001, headers=JSON)
    chunked = served.http.post("/v1/completions", content=endless(), headers=JSON)
    for response in (declared, chunked):
        assert "larger than the 100000 bytes this server takes" in refusal(response, 413)["message"]


def test_another_content_type_is_refused(served):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
    error = refusal(served.http.post("/v1/completions", content=json.dumps(TEXT), headers=headers))
    assert "is 'application/x-www-form-urlencoded', needs application/json" in error["message"]


def test_other_models_routes_and_methods(served):
    for response in (
        served.http.post("/v1/completions", json={**TEXT, "model": "gpt-4"}),
        served.http.get("/v1/models/gpt-4"),
    ):
        error = refusal(response, 404)
        assert error["message"] == "the model 'gpt-4' is not served here, 'demo' is"
        assert error["code"] == "model_not_found"
    error = refusal(served.http.get("/v2/nope"), 404)
    assert error["message"] == "GET /v2/nope is not a route of this server"
    response = served.http.get("/v1/completions")
    assert refusal(response, 405)["message"] == "GET /v1/completions is not allowed; this route needs POST"
    assert response.headers["allow"] == "POST"


HARMLESS = {
    **{"user": "me", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": "none", "suffix": None},
    **{
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
    },
}


def test_what_asks_for_nothing_is_passed_over(served):
    assert served.http.post("/v1/chat/completions", json={**CHAT, **HARMLESS, "max_tokens": 1}).status_code == 200
    answer = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [*user("a"), answer, *user([{"type": "text", "text": "c"}])]
    assert served.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200


def test_models_and_health(served):
    [card] = served.http.get("/v1/models").json()["data"]
    assert card == served.http.get("/v1/models/demo").json()
    assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 256)
    assert served.http.get("/health").json() == {"status": "ready"}


def test_tokenize_and_back(served):
    found = served.http.post("/tokenize", json={"prompt": "Hello wörld"}).json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 256
    assert found["tokens"] == served.service.llm.tokenizer.encode("Hello wörld")
    assert served.http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Hello wörld"}
    bare = served.http.post("/tokenize", json={"prompt": "Hello wörld", "add_special_tokens": False}).json()
    assert bare["tokens"] == found["tokens"][1:]
    chat = served.http.post("/tokenize", json=CHAT).json()
    assert chat["tokens"] == served.service.llm.encode_chat(CHAT["messages"])
    both = refusal(served.http.post("/tokenize", json={**CHAT, **TEXT}))
    assert both["message"] == "prompt or messages is needed, one of them"
    outside = refusal(served.http.post("/detokenize", json={"tokens": [1536]}))
    assert outside["message"] == "tokens holds the token 1536, needs ids from 0 to 1535"


def test_metrics_count_what_happened(served):
    def value(name):
        lines = served.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"paddle_mixtral_{name}"))

    names = {
        'http_requests_total{route="/v1/completions",status="200"}': 1,
        'http_requests_total{route="/v1/completions",status="400"}': 1,
        'http_requests_total{route="none",status="404"}': 1,
        "time_to_first_token_seconds_count": 2,
        "time_per_token_seconds_count": 2 * 6,
        "request_seconds_count": 2,
        "generated_tokens_total": 2 * 7,
        "prompt_tokens_total": 3,
        "prefix_cache_queried_tokens_total": 3,
    }
    before = {name: value(name) for name in names}
    request = {"prompt": [5, 6, 7], "max_tokens": 7, "n": 2, "ignore_eos": True}
    assert served.http.post("/v1/completions", json=request).status_code == 200
    served.http.post("/v1/completions", json={})
    served.http.get("/nope")
    assert {name: value(name) - before[name] for name in names} == names
    assert value("kv_cache_blocks ") == 256
    assert value("sequences_running") == value("kv_cache_usage_ratio") == 0


def test_a_key_covers_every_route_but_health():
    with serving(ModellessLLM(), api_key="secret") as served:
        routes = [("GET", path) for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/nope")]
        routes += [("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")]
        for method, path in routes:
            for headers in (
                {"Authorization": ""},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic secret"},
            ):
                error = refusal(served.http.request(method, path, headers=headers), 401)
                assert "send the header 'Authorization: Bearer KEY'" in error["message"]
                assert "secret" not in error["message"]
        assert served.http.get("/health", headers={"Authorization": ""}).status_code == 200
        assert served.http.post("/v1/completions", json={**TEXT, "max_tokens": 1}).status_code == 200
        # The page comes with the refusal, and asks for the key.
        page = served.http.get("/", headers={"Authorization": "", "Accept": "text/html,*/*"})
        assert page.status_code == 401
        assert page.text == served.http.get("/").text
