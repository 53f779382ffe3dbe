"""What happens over time, without a model: queues, slow and failing steps, clients that leave, shutting down."""

import json
import socket
import threading

import httpx
import openai
import pytest

from predict.engine.request import SamplingParams
from tests.predict.paged_runner import expected
from tests.predict.served import PATIENCE_S, ModellessLLM, serving

LONG = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def llm():
    return ModellessLLM()


@pytest.fixture
def served(llm):
    with serving(llm) as running:
        yield running
        if running.thread.is_alive():
            running.wait_until_idle()


def in_background(function, *arguments, **keywords):
    """The function's result or error, in a list, once the thread has ended."""
    outcome: list = []

    def run():
        try:
            outcome.append(function(*arguments, **keywords))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def events(lines) -> list:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_a_stream_is_what_the_engine_draws(served, llm):
    params = SamplingParams(max_tokens=200, seed=3, n=2, ignore_eos=True)
    request = {**LONG, "seed": 3, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    with served.http.stream("POST", "/v1/completions", json=request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert [line for line in lines if line][-1] == "data: [DONE]"
    *chunks, last = events(lines)
    for index in range(2):
        tokens, reason = expected(llm.runner, LONG["prompt"], params, index, 2, llm.total_max_length)
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == llm.tokenizer.continuation(LONG["prompt"], tokens)
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [reason]
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (3, 400)
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_request_waits_while_others_run_and_none_is_held_up_for_ever():
    llm = ModellessLLM(max_num_seqs=1)
    with serving(llm) as served:
        jobs = [in_background(served.http.post, "/v1/completions", json=LONG) for _ in range(4)]
        for thread, outcome in jobs:
            thread.join(PATIENCE_S)
            assert outcome[0].status_code == 200


def test_the_event_loop_answers_while_a_step_takes_its_time(served, llm):
    llm.runner.go.clear()
    thread, outcome = in_background(served.http.post, "/v1/completions", json=LONG)
    served.wait_until(lambda: served.service.worker._jobs)
    assert served.http.get("/health").status_code == 200
    assert served.http.post("/v1/completions", json={"prompt": "a", "n": 0}).status_code == 400
    llm.runner.go.set()
    thread.join(PATIENCE_S)
    assert outcome[0].status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(served, llm, stream):
    llm.runner.go.clear()
    request = {**LONG, "prompt": [[i] * 40 for i in range(5)], "n": 3, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=request, timeout=0.3)
    served.wait_until(lambda: not served.service.in_flight)
    llm.runner.go.set()
    served.wait_until_idle()
    assert served.stats.generated_tokens < 15 * 200
    assert not served.service.worker._jobs


def test_a_client_that_stops_listening_in_mid_stream(served, llm):
    llm.runner.steps_left = 20
    stream = served.openai.completions.create(
        model="demo",
        stream=True,
        extra_body={"ignore_eos": True},
        **{k: v for k, v in LONG.items() if k != "ignore_eos"},
    )
    next(stream)
    stream.close()
    served.wait_until(lambda: not served.service.in_flight)
    llm.runner.go.set()
    served.wait_until_idle()
    assert served.stats.generated_tokens < 200


def test_a_failed_step_tells_everybody_and_ends_the_server(llm):
    with serving(llm) as served:
        llm.runner.go.clear()
        whole = in_background(served.http.post, "/v1/completions", json=LONG)
        served.wait_until(lambda: len(served.service.worker._jobs) == 1)
        streamed = in_background(lambda: list(served.openai.completions.create(**STREAM)))
        served.wait_until(lambda: len(served.service.worker._jobs) == 2)
        llm.runner.error = RuntimeError("out of luck")
        llm.runner.go.set()
        served.thread.join(5)
        assert not served.thread.is_alive()
        assert served.server.status == 1
    for thread, _ in (whole, streamed):
        thread.join(PATIENCE_S)
    [response], [error] = whole[1], streamed[1]
    assert response.status_code == 500
    message = "the engine failed (RuntimeError: out of luck); the server ends"
    assert response.json()["error"]["message"] == message
    assert isinstance(error, openai.APIError)
    assert error.message == message


def test_an_engine_that_fails_its_check_while_idle_ends_the_server(llm):
    died = threading.Event()

    def check():
        if died.is_set():
            raise ValueError("another rank of this job died")

    with serving(llm, check=check) as served:
        assert served.http.post("/v1/completions", json=LONG).status_code == 200
        died.set()
        served.thread.join(5)
        assert served.server.status == 1
        assert served.service.worker.failed


STREAM = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 200, "stream": True, "extra_body": {"ignore_eos": True}}


def test_draining_finishes_what_runs_and_refuses_what_comes(served, llm):
    llm.runner.go.clear()
    whole = in_background(served.http.post, "/v1/completions", json=LONG)
    streamed = in_background(lambda: list(served.openai.completions.create(**STREAM)))
    served.wait_until(lambda: len(served.service.worker._jobs) == 2)
    ended = in_background(served.end)
    served.wait_until(lambda: served.service.state == "draining")
    refused = served.http.post("/v1/completions", json=LONG)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert refused.json()["error"]["message"] == "the server is shutting down and takes no new requests"
    assert served.http.get("/health").status_code == 503
    assert served.http.get("/metrics").status_code == 200
    llm.runner.go.set()
    for thread, _ in (whole, streamed, ended):
        thread.join(PATIENCE_S)
    assert whole[1][0].json()["usage"]["completion_tokens"] == 200
    assert streamed[1][0][-1].choices[0].finish_reason == "length"
    assert ended[1] == [0]


def test_what_does_not_finish_in_time_is_told(llm):
    with serving(llm, drain_timeout_s=0.2) as served:
        llm.runner.go.clear()
        whole = in_background(served.http.post, "/v1/completions", json=LONG)
        streamed = in_background(lambda: list(served.openai.completions.create(**STREAM)))
        served.wait_until(lambda: len(served.service.worker._jobs) == 2)
        ended = in_background(served.end)
        for thread, _ in (whole, streamed):
            thread.join(PATIENCE_S)
        llm.runner.go.set()
        ended[0].join(PATIENCE_S)
    message = "the server was shut down before the answer was complete"
    assert whole[1][0].status_code == 503
    assert whole[1][0].json()["error"]["message"] == message
    assert streamed[1][0].message == message
    assert ended[1] == [1]


def test_a_request_whose_body_does_not_come_holds_nobody_up(served, capfd):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        half.sendall(b"Content-Length: 100\r\n\r\n{")
        served.wait_until(lambda: served.server.server_state.tasks)
        assert served.end() == 0
    assert capfd.readouterr().err.splitlines()[-1] == "shutting down; 0 request(s) under way"
