"""Many clients stream from a server at once; what they get is held against the offline run of the same requests.

    python -m tests.benchmarks.load --minutes 3

starts a server of the demo checkpoint and loads it for that long: no error, the text of every stream is the offline
run's, its tokens come in order, and the server's memory does not grow.
"""

import argparse
import asyncio
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai

from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.weights import DEMO

ROOT = Path(__file__).resolve().parents[2]
WARM_UP_SHARE = 0.25  # of the time; allocators have reached their size then
GROWTH_BYTES = 32 << 20  # resident memory may move by so much: allocators keep what was freed
EVAL_TEXT = DEMO / "eval.txt"


@dataclass(frozen=True)
class Request:
    """A prompt and how it is continued."""

    prompt: str
    params: SamplingParams


@dataclass
class Report:
    """What the clients saw.

    Attributes:
        answers, tokens: how many came.
        first_token_s, token_s: seconds from asking to each answer's first token, and between the tokens after it.
        seconds: from the first question to the last answer.
    """

    answers: int
    tokens: int
    first_token_s: list[float]
    token_s: list[float]
    seconds: float

    def __str__(self) -> str:
        first, token = (np.percentile(1e3 * np.array(x), [50, 99]) for x in (self.first_token_s, self.token_s))
        return (
            f"{self.answers} answers, {self.tokens} tokens in {self.seconds:.1f} s: {self.tokens / self.seconds:.0f} "
            f"tokens/s; first token p50 {first[0]:.0f} ms, p99 {first[1]:.0f} ms; "
            f"time per token p50 {token[0]:.1f} ms, p99 {token[1]:.1f} ms"
        )


def requests(count: int, max_tokens: int) -> list[Request]:
    """Prompts of the demo's evaluation text, short and long, greedy and sampled; some share their beginnings."""
    words, rng = EVAL_TEXT.read_text(encoding="utf-8").split(), np.random.default_rng(0)
    found = []
    for i in range(count):
        start, length = int(rng.integers(0, 40)) * 100, int(rng.integers(1, 90))
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": i} if i % 2 else {}
        params = SamplingParams(max_tokens=int(rng.integers(max_tokens // 2, max_tokens + 1)), **sampled)
        found.append(Request(" ".join(words[start : start + length]), params))
    return found


def offline_texts(llm: LLM, wanted: Sequence[Request]) -> list[str]:
    """What the requests get without a server."""
    return [c.text for c in llm.generate([r.prompt for r in wanted], [r.params for r in wanted])]


def check_load(
    url: str, wanted: Sequence[Request], expected: Sequence[str], clients: int, seconds: float | None = None
) -> Report:
    """``clients`` clients stream the requests, once or round and round for some time.

    Raises:
        AssertionError: an answer is not the expected one; or any error of the server's.
    """
    return asyncio.run(_load(url, wanted, expected, clients, seconds))


async def _load(
    url: str, wanted: Sequence[Request], expected: Sequence[str], clients: int, seconds: float | None
) -> Report:
    report = Report(0, 0, [], [], 0.0)
    began, queue = time.perf_counter(), iter(range(len(wanted)))

    def next_request() -> int | None:
        nonlocal queue
        i = next(queue, None)
        if i is None and seconds is not None and time.perf_counter() - began < seconds:
            queue = iter(range(len(wanted)))
            i = next(queue)
        return i

    limits = httpx.Limits(max_connections=clients)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=os.environ.get("PADDLE_MIXTRAL_API_KEY", "none"),
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(limits=limits),
    ) as client:

        async def work() -> None:
            while (i := next_request()) is not None:
                text = await _stream(client, wanted[i], report)
                assert text == expected[i], f"request {i}: {text!r}, expected {expected[i]!r}"

        await asyncio.gather(*(work() for _ in range(clients)))
    report.seconds = time.perf_counter() - began
    return report


async def _stream(client: openai.AsyncOpenAI, request: Request, report: Report) -> str:
    asked, last, text, logged = time.perf_counter(), None, "", ""
    p = request.params
    options: dict[str, Any] = {"temperature": p.temperature, "top_p": p.top_p, "seed": p.seed, "logprobs": 0}
    stream = await client.completions.create(
        model=None,  # type: ignore[arg-type]  # whatever is served
        prompt=request.prompt, max_tokens=p.max_tokens, stream=True, **options,
    )  # fmt: skip
    async for chunk in stream:
        now = time.perf_counter()
        (report.first_token_s if last is None else report.token_s).append(now - (asked if last is None else last))
        last = now
        [choice] = chunk.choices
        assert choice.logprobs.text_offset[0] == len(logged), "a token came out of order"
        logged += "".join(choice.logprobs.tokens)
        report.tokens += len(choice.logprobs.tokens)
        text += choice.text
    report.answers += 1
    return text


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return 1024 * int(match.group(1))


def _wait_for(url: str, process: subprocess.Popen) -> None:
    while True:
        assert process.poll() is None, "the server has ended"
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


def main() -> int:
    """Entry point; returns the exit status."""
    p = argparse.ArgumentParser("load", description="Loads a server of the demo checkpoint, and checks what it says.")
    p.add_argument("--clients", type=int, default=64, help="default: 64")
    p.add_argument("--minutes", type=float, default=3.0, help="default: 3")
    p.add_argument("--port", type=int, default=8765, help="default: 8765")
    args = p.parse_args()
    logging.disable(logging.INFO)  # the client has a line for every request
    wanted = requests(8 * args.clients, max_tokens=120)
    expected = offline_texts(LLM(DEMO), wanted)
    url = f"http://127.0.0.1:{args.port}"
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "predict" / "server.py"), str(DEMO), "--port", str(args.port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        _wait_for(url, server)
        check_load(url, wanted, expected, args.clients, 60 * args.minutes * WARM_UP_SHARE)
        before = resident_bytes(server.pid)
        report = check_load(url, wanted, expected, args.clients, 60 * args.minutes * (1 - WARM_UP_SHARE))
        growth = resident_bytes(server.pid) - before
        print(report)
        print(f"memory {before / 1e6:.0f} MB after warming up, {growth / 1e6:+.1f} MB at the end")
        assert growth < GROWTH_BYTES, "the server's memory grows"
    finally:
        server.terminate()
        code = server.wait()
    print(f"the server ended with {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
