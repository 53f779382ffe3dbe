"""A server in a thread of the test, in front of an engine without a model or of the demo checkpoint."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace

import httpx
import openai

from predict.engine.engine import Engine, EngineStats
from predict.model.chat import load_chat_template
from predict.model.tokenizer import IncrementalDetokenizer, load_tokenizer
from predict.model.weights import DEMO
from predict.serving.app import create_app
from predict.serving.run import Server, bind
from predict.serving.service import Service
from tests.predict.paged_runner import PagedRunner

PATIENCE_S = 20


class HeldRunner(PagedRunner):
    """Its steps wait while ``go`` is cleared (as after ``steps_left`` steps), and fail once there is an ``error``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.keep_steps = False
        self.go, self.error, self.steps_left = threading.Event(), None, -1
        self.go.set()

    def step(self, batch):
        if self.steps_left == 0:
            self.go.clear()
        self.steps_left -= 1
        assert self.go.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return super().step(batch)


class ModellessLLM:
    """What the server asks of an LLM, with the demo's tokenizer and tokens out of a hat."""

    total_max_length = 256

    def __init__(self, **options):
        self.tokenizer = load_tokenizer(DEMO)
        self.config = SimpleNamespace(vocab_size=self.tokenizer.vocab_size)
        self.runner = HeldRunner(num_blocks=256, block_size=16, vocab_size=self.tokenizer.vocab_size)
        self.engine = Engine(
            self.runner,
            self.tokenizer.eos_token_ids,
            self.total_max_length,
            new_detokenizer=partial(IncrementalDetokenizer, self.tokenizer),
            **options,
        )
        self.encode_chat = load_chat_template(self.tokenizer).apply


@dataclass
class Served:
    """A server that answers.

    Attributes:
        url: without a path.
        service, server: for looking inside.
        thread: in which it runs.
        api_key: what clients send.
    """

    url: str
    service: Service
    server: Server
    thread: threading.Thread
    api_key: str | None

    @cached_property
    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S)

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.api_key or "none", max_retries=0, timeout=PATIENCE_S
        )

    @property
    def stats(self) -> EngineStats:
        return self.service.worker.stats

    def wait_until(self, condition) -> None:
        """Returns when condition() holds."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        """Returns when nothing runs, waits or holds a page."""
        self.wait_until(
            lambda: (
                (s := self.stats).running == s.waiting == 0
                and s.blocks_free + s.blocks_cached == s.blocks_total
                and not self.service.in_flight
            )
        )

    def end(self) -> int:
        """Ends it as SIGTERM does; the exit status."""
        self.server.handle_exit(15, None)
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        return self.server.status


@contextmanager
def serving(
    llm, *, api_key: str | None = None, drain_timeout_s: float = PATIENCE_S, check=lambda: None, **options
) -> Iterator[Served]:
    """A server of ``llm`` on a free port; ended at the end, if it has not ended by itself."""
    bound = bind("127.0.0.1", 0)
    service = Service(llm, "demo", check=check)
    server = Server(service, create_app(service, api_key, **options), bound, drain_timeout_s)
    thread = threading.Thread(target=server.serve_until_ended, daemon=True)
    host, port = bound.getsockname()
    served = Served(f"http://{host}:{port}", service, server, thread, api_key)
    thread.start()
    served.wait_until(lambda: server.started)
    try:
        yield served
    finally:
        if isinstance(llm, ModellessLLM):
            llm.runner.go.set()
        if thread.is_alive():
            served.end()
