"""What becomes of a prompt: the Deltas of one sample, put together again."""

from dataclasses import dataclass
from typing import cast

from predict.engine.engine import Delta


@dataclass(frozen=True)
class Completion:
    """One sample of what became of a prompt.

    Attributes:
        prompt_token_ids: the prompt as the model saw it.
        index: which of the request's n samples.
        text: what the generated tokens add to the prompt, up to a stop string.
        token_ids, logprobs: generated tokens, those that ended it included, and their log-probabilities.
        top_logprobs: for each token the (id, log-probability) of the most probable ones; None unless asked for.
        finish_reason: "stop" (end of sequence, a stop token or a stop string) or "length" (max_tokens, or the total
            length, was reached); "abort" if the engine's request was aborted.
        stop_reason: the stop string or stop token; None for the end-of-sequence token.
    """

    prompt_token_ids: list[int]
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] | None
    finish_reason: str
    stop_reason: str | int | None


class Collector:
    """Puts the Deltas of one sample together again."""

    def __init__(self, prompt_token_ids: list[int], index: int):
        self._prompt_token_ids, self._index = prompt_token_ids, index
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[list[tuple[int, float]]] | None = None
        self._finish_reason: str | None = None
        self._stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """The next one."""
        self._text.append(delta.text)
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        if delta.top_logprobs is not None:
            if self._top_logprobs is None:
                self._top_logprobs = []
            self._top_logprobs += delta.top_logprobs
        self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason

    def completion(self) -> Completion:
        """What they add up to, the last one having come."""
        return Completion(
            prompt_token_ids=self._prompt_token_ids,
            index=self._index,
            text="".join(self._text),
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            top_logprobs=self._top_logprobs,
            finish_reason=cast(str, self._finish_reason),
            stop_reason=self._stop_reason,
        )
