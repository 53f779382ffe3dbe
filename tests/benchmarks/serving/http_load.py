"""Requests that arrive at planned times at a real server: paddle-mixtral serve, in a process of its own."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path

import httpx

from predict.server import API_KEY_VARIABLE
from tests.benchmarks.serving.drive import Answer
from tests.benchmarks.serving.workload import Request

ROOT = Path(__file__).resolve().parents[3]
LISTENS = re.compile(r"serving .* on (http://\S+) ")


@contextmanager
def serving(flags: Seq[str]) -> Iterator[str]:
    """A server on a free port of 127.0.0.1; its URL, once it answers.

    Raises:
        ValueError: it ended before; what it said is on standard error.
    """
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    command = [sys.executable, str(ROOT / "predict" / "server.py"), *flags, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**environment, "PYTHONPATH": str(ROOT)})
    assert process.stderr is not None
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            if (found := LISTENS.match(line)) is not None:
                break
        else:
            raise ValueError(f"the server ended with {process.wait()} before it listened; see above")
        rest = threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True)
        rest.start()
        yield found.group(1)
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def send(url: str, requests: Seq[Request], arrivals: Seq[float]) -> list[Answer]:
    """Sends each request when it is due, whether or not earlier ones are answered; every answer, in order.

    Args:
        arrivals: seconds from now, ascending.

    Raises:
        ValueError: an answer is an error, or not as long as was asked for, and says whose; or the server has gone.
    """
    try:
        return asyncio.run(_send(url, requests, arrivals))
    except httpx.TransportError as error:
        raise ValueError(f"the server at {url} has gone ({type(error).__name__} {error}); see above") from error


async def _send(url: str, requests: Seq[Request], arrivals: Seq[float]) -> list[Answer]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None, trust_env=False) as client:
        began = time.perf_counter()
        tasks = [
            _ask(client, i, request, at, began) for i, (request, at) in enumerate(zip(requests, arrivals, strict=True))
        ]
        return await asyncio.gather(*tasks)


async def _ask(client: httpx.AsyncClient, i: int, request: Request, arrives: float, began: float) -> Answer:
    answer, p = Answer(arrives), request.params
    body = {
        "prompt": request.prompt,
        "max_tokens": p.max_tokens,
        "temperature": p.temperature,
        "seed": p.seed,
        "ignore_eos": p.ignore_eos,
        "stream": True,
        # So that there is a chunk for every token, also for one without text.
        "stream_options": {"continuous_usage_stats": True},
    }
    await asyncio.sleep(max(0.0, began + arrives - time.perf_counter()))
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            now = time.perf_counter() - began
            if tokens_in(line):
                answer.times.append(now)
            elif "error" in line:
                raise ValueError(f"request {i}: {line}")
    if len(answer.times) != p.max_tokens:
        raise ValueError(f"request {i}: {len(answer.times)} tokens came, {p.max_tokens} were asked for")
    return answer


def tokens_in(line: str) -> bool:
    """Whether a line of the stream is a token's."""
    if not line.startswith("data: {"):
        return False
    return bool(json.loads(line.removeprefix("data: ")).get("choices"))
