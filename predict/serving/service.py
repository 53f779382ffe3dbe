"""One served model: requests checked and tokenised, put to the engine, and counted until they have ended."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from predict.engine.engine import Delta, Engine
from predict.llm import LLM
from predict.serving.errors import ApiError, refused, unavailable
from predict.serving.metrics import Metrics
from predict.serving.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
)
from predict.serving.worker import Job, Worker

MAX_CHOICES = 1024  # answers to one request
READY, DRAINING, FAILED = "ready", "draining", "failed"


class Service:
    """A model under the name clients know it by.

    Args:
        llm: from now on its engine, or the one given, belongs to the worker.
        name: the served model's.
        engine: runs the requests instead of the llm's own.
        check: see Worker.

    Attributes:
        state: "ready", "draining" (no new requests) or "failed".
        in_flight: HTTP requests whose body has come and whose answer has not ended.
        on_failure: called once on the event loop when the engine has failed and every client is being told.
    """

    def __init__(self, llm: LLM, name: str, engine: Engine | None = None, check: Callable[[], None] = lambda: None):
        self.llm, self.name, self.created = llm, name, int(time.time())
        self.state = READY
        self.in_flight: set[int] = set()
        self.worker = Worker(engine or llm.engine, self._observe, self._fail, check)
        self.metrics = Metrics(lambda: self.worker.stats)
        self.on_failure: Callable[[], None] = lambda: None
        self._longest_text = llm.total_max_length * llm.tokenizer.longest_piece

    def check_open(self) -> None:
        """Raises ApiError (503) unless new requests are welcome."""
        if self.state == DRAINING:
            raise unavailable("the server is shutting down and takes no new requests")
        if self.state == FAILED:
            raise unavailable("the engine has failed; the server ends")

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests from now on and waits for those under way; False if some were left at the end."""
        if self.state == READY:
            self.state = DRAINING
        return await self._all_ended(timeout_s)

    async def give_up(self, timeout_s: float) -> None:
        """Answers what is left with an error."""
        self.worker.fail(unavailable("the server was shut down before the answer was complete"))
        await self._all_ended(timeout_s)

    async def _all_ended(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.in_flight

    async def completion_job(self, request: CompletionRequest) -> Job:
        """Raises ApiError for a request that cannot be answered, as the next does."""
        prompts = await asyncio.to_thread(self._encode_all, request.prompts())
        return self._submit(request, prompts, request.logprobs, request.max_tokens, DEFAULT_COMPLETION_TOKENS)

    async def chat_job(self, request: ChatCompletionRequest) -> Job:
        prompt = await asyncio.to_thread(self.encode_messages, request.messages)
        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return self._submit(request, [prompt], top, limit, self.llm.total_max_length)

    def _submit(
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        logprobs: int | None,
        limit: int | None,
        default_limit: int,
    ) -> Job:
        longest = max(map(len, prompts))
        room = self.llm.total_max_length - longest
        if room < (limit or 1):
            context = f"the {self.llm.total_max_length} tokens of context"
            message = f"the prompt has {longest} tokens, which leave no room for an answer in {context}; shorten it"
            if room > 0:
                message = (
                    f"max_tokens is {limit}, with {longest} tokens of prompt more than {context}; lower it to {room}, "
                    "or shorten the prompt"
                )
            message = request.in_its_words(message)
            param = message.split()[0] if room > 0 else "messages" if request.chat else "prompt"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        try:
            params = request.sampling_params(min(default_limit, room) if limit is None else limit, logprobs)
            if (choices := len(prompts) * params.n) > MAX_CHOICES:
                raise ValueError(f"n times the number of prompts is {choices}, needs {MAX_CHOICES} at the most")
            for ids in prompts:
                self.llm.engine.check(ids, params)
        except ValueError as error:
            raise refused(ValueError(request.in_its_words(str(error))), type(request)) from None
        job = Job(uuid.uuid4().hex, prompts, params, chat=request.chat)
        self.worker.submit(job)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return job

    def _encode_all(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a prompt. Raises ApiError for a text that is no prompt, or surely too long."""
        self._check_size([text], "prompt")
        try:
            ids = self.llm.tokenizer.encode(text, add_bos)
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from None
        return ids

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for its answer. Raises ApiError for messages the template refuses."""
        if messages[-1].role != "user":
            last = f"messages[{len(messages) - 1}], the last,"
            raise ApiError(400, f'{last} has the role "{messages[-1].role}", needs "user"', param="messages")
        plain = [message.plain() for message in messages]
        self._check_size([message["content"] for message in plain], "messages")
        try:
            return self.llm.encode_chat(plain)
        except ValueError as error:
            # Where the template lies is not the client's business.
            folder = str(self.llm.tokenizer.folder)
            message = str(error).replace(f"{folder}/", "").replace(folder, self.name)
            raise ApiError(400, message, param="messages") from None

    def _check_size(self, texts: Sequence[str], param: str) -> None:
        """Refuses what is too long whatever its tokens are: finding them would take seconds."""
        size = sum(map(len, texts))
        if size > self._longest_text:
            raise ApiError(
                400,
                f"{param} has {size} characters, more than the {self.llm.total_max_length} tokens of context can hold",
                param=param,
                code="context_length_exceeded",
            )

    def check_token_ids(self, name: str, ids: Iterable[int]) -> None:
        """Raises ApiError for ids outside the vocabulary."""
        size = self.llm.config.vocab_size
        for token in ids:
            if not 0 <= token < size:
                raise ApiError(400, f"{name} holds the token {token}, needs ids from 0 to {size - 1}", param=name)

    def check_model(self, model: str | None) -> None:
        """Raises ApiError (404) for the name of another model."""
        if model not in (None, self.name):
            raise ApiError(
                404,
                f"the model {model!r:.80} is not served here, {self.name!r} is",
                param="model",
                code="model_not_found",
            )

    def _observe(self, job: Job, prompt: int, delta: Delta) -> None:
        now = time.monotonic()
        if delta.token_ids:
            last = job.last_token.get((prompt, delta.index))
            if last is None:
                self.metrics.first_token.observe(now - job.started)
            else:
                for _ in delta.token_ids:
                    self.metrics.token.observe((now - last) / len(delta.token_ids))
            job.last_token[prompt, delta.index] = now
        if delta.finish_reason is not None:
            self.metrics.request.observe(now - job.started)

    def _fail(self) -> None:
        self.state = FAILED
        self.on_failure()
