"""What a user asks for, and a sequence on its way through the engine."""

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; names and meaning as the field has them.

    Attributes:
        max_tokens: new tokens at the most.
        temperature: 0 is greedy.
        top_k: the k most probable tokens; 0 switches it off.
        top_p: the fewest tokens whose probabilities reach it; 1 switches it off.
        min_p: tokens at least this probable, relative to the most probable one; 0 switches it off.
        repetition_penalty: divides (or multiplies) the logits of all tokens seen; 1 switches it off.
        presence_penalty, frequency_penalty: subtracted from the logits of generated tokens, once and per occurrence.
        seed: of the counter-based random numbers; the same request with the same seed gives the same tokens.
        ignore_eos: go on past the end-of-sequence token.

    Raises:
        ValueError: a value out of its range, with its name.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            self._check(name, isinstance(getattr(self, name), Integral), "an integer")
        for name in (f.name for f in fields(self)):
            self._check(name, isinstance(getattr(self, name), Real), "a number")
        self._check("max_tokens", self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature < math.inf, "a number >= 0 (0: greedy)")
        self._check("top_k", 0 <= self.top_k < 2**31, "an integer from 0 (off) to 2^31 - 1")
        self._check("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1 (1: off)")
        self._check("min_p", 0 <= self.min_p <= 1, "a number from 0 (off) to 1")
        self._check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number (1: off)")
        self._check("presence_penalty", math.isfinite(self.presence_penalty), "a finite number")
        self._check("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")
        self._check("seed", 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1")

    def _check(self, name: str, holds: bool, needed: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}, needs {needed}")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass
class Sequence:
    """A request under way.

    Attributes:
        token_ids: the prompt, at least one token, and what has been generated after it.
        logprobs: the model's log-probability of each generated token.
        block_ids: pages of the KV cache it owns, in order of position.
        num_computed: its tokens already in the cache.
        finish_reason: None while it runs; then "stop" (an end-of-sequence token) or "length".
    """

    token_ids: list[int]
    params: SamplingParams
    prompt_len: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
