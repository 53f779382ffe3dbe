"""Answers as OpenAI writes them: whole, or as the choices of a stream's chunks."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel

from predict.engine.engine import Delta
from predict.llm import Completion
from predict.model.tokenizer import Tokenizer


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and answers of a request; cached_tokens of the prompts were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """The probability of every token; top_logprobs is null where no alternatives were asked for."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionFormat:
    """Choices of /v1/completions.

    Args:
        tokenizer: writes tokens as text.
        top: alternatives listed for each token; None: no logprobs at all.
    """

    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, top: int | None):
        self._tokenizer, self.top = tokenizer, top
        self._offsets: dict[int, int] = {}  # characters of a choice's tokens so far

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token: nothing."""
        return None

    def chunk(self, index: int, part: Delta | Completion) -> dict[str, Any]:
        """A choice of a chunk, or of a whole answer; the chunks of a choice come in order."""
        return {
            "index": index,
            "text": part.text,
            "logprobs": None if self.top is None else self._logprobs(index, part),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def response(self, header: dict[str, Any], completions: Sequence[Completion], usage: Usage) -> CompletionResponse:
        choices = [
            CompletionChoice.model_validate(self.chunk(i, completion)) for i, completion in enumerate(completions)
        ]
        return CompletionResponse(choices=choices, usage=usage, **header)

    def _logprobs(self, index: int, part: Delta | Completion) -> dict[str, Any]:
        tokens = [_text(self._tokenizer.token_bytes(token)) for token in part.token_ids]
        *offsets, self._offsets[index] = accumulate(map(len, tokens), initial=self._offsets.get(index, 0))
        return {
            "tokens": tokens,
            "token_logprobs": part.logprobs,
            "top_logprobs": [self._listed(top) for top in part.top_logprobs or ()] if self.top else None,
            "text_offset": offsets,
        }

    def _listed(self, alternatives: list[tuple[int, float]]) -> dict[str, float]:
        listed: dict[str, float] = {}
        for token, logprob in alternatives:
            # Parts of characters have the same text; the most probable one, which comes first, is kept.
            listed.setdefault(_text(self._tokenizer.token_bytes(token)), logprob)
        return listed


class ChatFormat:
    """Choices of /v1/chat/completions; the arguments are CompletionFormat's."""

    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, top: int | None):
        self._tokenizer, self.top = tokenizer, top

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token: whose turn it is."""
        message = {"role": "assistant", "content": ""}
        return {"index": index, "delta": message, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, part: Delta | Completion) -> dict[str, Any]:
        """A choice of a chunk."""
        return {"index": index, "delta": {"content": part.text} if part.text else {}, **self._ending(part)}

    def response(
        self, header: dict[str, Any], completions: Sequence[Completion], usage: Usage
    ) -> ChatCompletionResponse:
        choices = [
            ChatChoice.model_validate({"index": i, "message": {"content": completion.text}, **self._ending(completion)})
            for i, completion in enumerate(completions)
        ]
        return ChatCompletionResponse(choices=choices, usage=usage, **header)

    def _ending(self, part: Delta | Completion) -> dict[str, Any]:
        logprobs = None if self.top is None else {"content": self._logprobs(part)}
        return {"logprobs": logprobs, "finish_reason": part.finish_reason, "stop_reason": part.stop_reason}

    def _logprobs(self, part: Delta | Completion) -> list[dict[str, Any]]:
        alternatives = part.top_logprobs or [[] for _ in part.token_ids]
        return [
            {**self._token(token, logprob), "top_logprobs": [self._token(*pair) for pair in top]}
            for token, logprob, top in zip(part.token_ids, part.logprobs, alternatives, strict=True)
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}


def _text(raw: bytes) -> str:
    """A token as text; U+FFFD for part of a character."""
    return raw.decode(errors="replace")
