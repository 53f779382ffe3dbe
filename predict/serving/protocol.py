"""Requests as OpenAI defines them, with vLLM's additional sampling fields; what is not served is refused by name.

A field that is null counts as not given, as in OpenAI's own API.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from predict.engine.request import MAX_SAMPLES, MAX_TOP_LOGPROBS, SamplingParams
from predict.serving.errors import NOT_SERVED, UNKNOWN

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions; a chat's answer may fill the context
MAX_STOP = 16
MAX_BIASES = 1024
MAX_PROMPTS = 1024

# Fields of OpenAI's API that are not served, each with the values that ask for nothing; others are refused. None: the
# field only labels a request, or helps a provider's billing and caches, and nothing is lost by passing it over.
PASSED_OVER: dict[str, tuple[Any, ...] | None] = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": None,
    "modalities": (["text"],),
    "parallel_tool_calls": None,
    "prediction": (),
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": None,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": None,
    "verbosity": ("medium",),
    "web_search_options": (),
}
# What clients send back inside an answer of the assistant, always empty in answers of this server.
MESSAGE_EXTRAS: dict[str, tuple[Any, ...] | None] = dict.fromkeys(
    ("annotations", "audio", "function_call", "name", "reasoning_content", "refusal", "tool_calls"), ([],)
)


def _integer(value: Any) -> Any:
    """2.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"logit_bias has {len(value)} tokens, needs {MAX_BIASES} at the most")
    return value


Integer = Annotated[int, BeforeValidator(_integer)]
Integers = Annotated[list[Integer], Field(fail_fast=True)]
SAMPLING_FIELDS = (
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "ignore_eos", "n"),
)


class Exact(BaseModel):
    """An object with exact types, finite numbers and no fields but its own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    passed_over: ClassVar[Mapping[str, tuple[Any, ...] | None]] = {}

    @model_validator(mode="before")
    @classmethod
    def _pass_over(cls, given: Any) -> Any:
        """Drops what asks for nothing, and refuses the first of other fields: there may be very many."""
        if not isinstance(given, dict):
            return given
        for name in given.keys() - cls.model_fields.keys():
            if name not in cls.passed_over:
                raise PydanticCustomError(UNKNOWN, "{field}", {"field": name})
            harmless = cls.passed_over[name]
            if harmless is not None and given[name] is not None and given[name] not in harmless:
                raise PydanticCustomError(NOT_SERVED, "{field}", {"field": name})
        return {name: value for name, value in given.items() if name in cls.model_fields}


class Request(Exact):
    """What all requests share."""

    model: str | None = Field(None, description="the served model's name (GET /v1/models); may be left out")


class StreamOptions(Exact):
    include_usage: bool | None = Field(None, description="true or false: end with a chunk that counts the tokens")
    continuous_usage_stats: bool | None = Field(None, description="true or false: count the tokens in every chunk")


class GenerationRequest(Request):
    """The fields /v1/completions and /v1/chat/completions share."""

    max_tokens: Integer | None = Field(None, description="an integer of at least 1: new tokens at the most")
    min_tokens: Integer | None = Field(None, description="an integer: no end of sequence before that many tokens")
    temperature: float | None = Field(None, description="a number >= 0: 0 is greedy, the default is 1")
    top_p: float | None = Field(None, description="a number above 0 and up to 1 (off)")
    top_k: Integer | None = Field(None, description="an integer from 0 (off): the k most probable tokens")
    min_p: float | None = Field(None, description="a number from 0 (off) to 1, relative to the most probable token")
    repetition_penalty: float | None = Field(None, description="a positive number: 1 is off")
    presence_penalty: float | None = Field(None, description="a number from -2 to 2: 0 is off")
    frequency_penalty: float | None = Field(None, description="a number from -2 to 2: 0 is off")
    seed: Integer | None = Field(None, description="an integer from 0 to 2^63 - 1: the same seed, the same tokens")
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP, fail_fast=True)] | None = Field(
        None, description=f"a text, or a list of up to {MAX_STOP} texts, at which the answer ends"
    )
    stop_token_ids: Integers | None = Field(None, description="a list of token ids at which the answer ends")
    ignore_eos: bool | None = Field(None, description="true or false: go on past the end of sequence")
    n: Integer | None = Field(None, description=f"an integer from 1 to {MAX_SAMPLES}: answers to each prompt")
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = Field(
        None, description='an object of token ids and what is added to their logits, as {"42": -100}'
    )
    stream: bool | None = Field(None, description="true or false: send the answer as it grows, as server-sent events")
    stream_options: StreamOptions | None = Field(
        None, description="an object with include_usage or continuous_usage_stats, beside stream"
    )

    passed_over = PASSED_OVER
    chat: ClassVar[bool] = False  # whether the answer is a text of its own

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream; set stream to true, or leave it out")
        return self

    def in_its_words(self, message: str) -> str:
        """A sentence about the sampling parameters with the names this request has for them."""
        return message

    def sampling_params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """How the tokens are to be chosen. OpenAI's defaults: temperature 1, and another seed every time.

        Raises:
            ValueError: a value out of its range; begins with the name of the field.
        """
        given = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        given = {"temperature": 1.0, "seed": secrets.randbits(63)} | given
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_token_biases(self.logit_bias or {}),
            **given,
        )


def _token_biases(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError(f'logit_bias has the key {key!r:.40}, needs token ids, as {{"42": -100}}')
    return {int(key): value for key, value in given.items()}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[Integers, Field(min_length=1)]
        | Annotated[list[Integers], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description=f"a text, token ids, or a list of up to {MAX_PROMPTS} texts or lists of token ids")
    logprobs: Integer | None = Field(None, description=f"an integer from 0 to {MAX_TOP_LOGPROBS}: alternatives to list")
    best_of: Integer | None = Field(None, description="the same integer as n, if anything")

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of {self.best_of} is not supported by this server; leave it out, or ask for n")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # then all are
        return list(self.prompt)  # and here none is


class TextPart(Exact):
    type: Literal["text"] = Field(description='"text": this server reads nothing else')
    text: str = Field(description="a text")

    passed_over = dict.fromkeys(("image_url", "input_audio", "file"), ())


class Message(Exact):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description='"system", "user" or "assistant"')
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        description='a text, or a list of {"type": "text", "text": ...}'
    )

    passed_over = MESSAGE_EXTRAS

    def plain(self) -> dict[str, str]:
        """As chat templates want it; several parts are put on lines of their own."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


Messages = Annotated[list[Message], Field(fail_fast=True)]


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Messages = Field(min_length=1, description='a list of at least one {"role": ..., "content": ...}')
    max_completion_tokens: Integer | None = Field(
        None, description="an integer of at least 1: OpenAI's newer name of max_tokens"
    )
    logprobs: bool | None = Field(None, description="true or false: list the probability of each token")
    top_logprobs: Integer | None = Field(
        None, description=f"an integer from 0 to {MAX_TOP_LOGPROBS}: alternatives to list, beside logprobs"
    )

    chat = True

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs; set logprobs to true, or leave it out")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same limit and differ; give one of them")
        return self

    def in_its_words(self, message: str) -> str:
        if self.max_completion_tokens is not None and message.startswith("max_tokens "):
            return message.replace("max_tokens", "max_completion_tokens", 1)
        return message.replace("logprobs", "top_logprobs", 1) if message.startswith("logprobs ") else message


class TokenizeRequest(Request):
    """POST /tokenize: a prompt as /v1/completions reads it, or messages as /v1/chat/completions does."""

    prompt: str | None = Field(None, description="a text")
    messages: Messages | None = Field(
        None, min_length=1, description='a list of at least one {"role": ..., "content": ...}, instead of a prompt'
    )
    add_special_tokens: bool | None = Field(
        None, description="true or false: begin the prompt with the beginning-of-sequence token, as generation does"
    )

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages is needed, one of them")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens has no effect on messages, whose template decides; leave it out")
        return self


class DetokenizeRequest(Request):
    """POST /detokenize."""

    tokens: Integers = Field(description="a list of token ids")
