"""What a user asks for, and a sequence on its way through the engine."""

import math
import struct
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from numbers import Integral, Real

from predict.engine.text import StoppedText

MAX_TOP_LOGPROBS = 20  # the step's outputs have as many columns
MAX_SAMPLES = 128
NO_FORCED_TOKEN = -1
INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "n")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; names and meaning as the field has them.

    Attributes:
        max_tokens: new tokens at the most.
        min_tokens: new tokens before an end-of-sequence token, a stop token or a stop string may end the answer.
        temperature: 0 is greedy.
        top_k: the k most probable tokens; 0 switches it off.
        top_p: the fewest tokens whose probabilities reach it; 1 switches it off.
        min_p: tokens at least this probable, relative to the most probable one; 0 switches it off.
        repetition_penalty: divides (or multiplies) the logits of all tokens seen; 1 switches it off.
        presence_penalty, frequency_penalty: subtracted from the logits of generated tokens, once and per occurrence.
        logit_bias: from token ids to what is added to their logits before everything else, -100 to 100.
        seed: of the counter-based random numbers; the same request with the same seed gives the same tokens.
        n: samples of the request; number i draws with seed + i (modulo 2^63), as a request of its own would.
        stop: texts that end the answer, which is cut before them; a single text may be given as it is.
        stop_token_ids: tokens that end the answer; their text is not part of it.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: of how many most probable tokens the log-probabilities are wanted with every new token, 0 to 20; None
            (as 0): only that of the new token itself.

    Raises:
        ValueError: a value out of its range, with its name.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in INTEGERS:
            self._check(name, _is_integer(getattr(self, name)), "an integer")
        for name in NUMBERS:
            self._check(name, _is_number(getattr(self, name)), "a number")
        self._check("max_tokens", self.max_tokens >= 1, "at least 1")
        self._check(
            "min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 (off) to max_tokens, which is {self.max_tokens}"
        )
        self._check("temperature", 0 <= self.temperature < math.inf, "a number >= 0 (0: greedy)")
        self._check("top_k", 0 <= self.top_k < 2**31, "an integer from 0 (off) to 2^31 - 1")
        self._check("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1 (1: off)")
        self._check("min_p", 0 <= self.min_p <= 1, "a number from 0 (off) to 1")
        self._check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number (1: off)")
        self._check("presence_penalty", math.isfinite(self.presence_penalty), "a finite number")
        self._check("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")
        self._check("seed", 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1")
        self._check("n", 1 <= self.n <= MAX_SAMPLES, f"1 to {MAX_SAMPLES} samples")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        wanted = 0 if self.logprobs is None else self.logprobs
        self._check(
            "logprobs", _is_integer(wanted) and 0 <= wanted <= MAX_TOP_LOGPROBS, f"None, or 0 to {MAX_TOP_LOGPROBS}"
        )
        self._normalise()

    def _normalise(self) -> None:
        """Checks what may be given in several forms, and keeps one."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = tuple(stop) if isinstance(stop, Iterable) else (None,)
        self._check("stop", all(isinstance(text, str) and text for text in stop), "a text or texts, none of them empty")
        ids = tuple(self.stop_token_ids) if isinstance(self.stop_token_ids, Iterable) else (None,)
        self._check("stop_token_ids", all(_is_integer(t) and t >= 0 for t in ids), "token ids")
        bias = self.logit_bias
        self._check(
            "logit_bias",
            isinstance(bias, Mapping)
            and all(_is_integer(t) and t >= 0 and _is_number(x) and -100 <= x <= 100 for t, x in bias.items()),
            "a mapping from token ids to numbers from -100 to 100",
        )
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)
        object.__setattr__(self, "logit_bias", dict(bias))

    def _check(self, name: str, holds: bool, needed: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r:.200}, needs {needed}")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request under way.

    Tokens and pages are arrays of C integers, so that a step's inputs are made by copying bytes.

    Attributes:
        token_ids: the prompt, at least one token, and what has been generated after it.
        request_id, index: the request, and which of its samples this is.
        stop_token_ids: tokens that end it.
        max_length: tokens it can reach, prompt included.
        leader: the request's first sample; the others wait until that has computed the prompt, and share its pages.
        text: what makes text of its new tokens, if anyone wants text.
        block_ids: pages of the KV cache it holds, in order of position.
        num_computed: its tokens already in the cache.
        num_registered: its leading pages that the prefix cache knows.
        num_cached: tokens of its prompt that it found in the cache when it first ran; None before.
    """

    tokens: InitVar[Iterable[int]]
    params: SamplingParams
    request_id: str = ""
    index: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    max_length: int = 0
    leader: "Sequence | None" = None
    text: StoppedText | None = None
    token_ids: array = field(init=False)
    prompt_len: int = field(init=False)
    block_ids: array = field(default_factory=lambda: array("i"))
    num_computed: int = 0
    num_registered: int = 0
    num_cached: int | None = None
    float_row: bytes = field(init=False)  # its row of the step's sampling_floats
    int_row: bytes = field(init=False)  # and of sampling_ints, the position left 0
    has_penalties: bool = field(init=False)
    _bias: tuple[bytes, bytes] | None = field(init=False)
    _early_bias: tuple[bytes, bytes] | None = field(init=False)  # while it has fewer than min_tokens

    def __post_init__(self, tokens: Iterable[int]) -> None:
        self.token_ids = array("i", tokens)
        self.prompt_len = len(self.token_ids)
        p = self.params
        self.has_penalties = p.has_penalties
        self.float_row = struct.pack(
            "6f", p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        )
        seed, prompt_len = (p.seed + self.index) % 2**63, self.prompt_len if self.has_penalties else 0
        self.int_row = struct.pack("6q", seed, 0, p.top_k, NO_FORCED_TOKEN, prompt_len, p.logprobs or 0)
        self._bias = _packed(p.logit_bias)
        never = dict.fromkeys(self.stop_token_ids, -math.inf)
        self._early_bias = _packed({**p.logit_bias, **never}) if p.min_tokens else self._bias

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :].tolist()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def bias(self) -> tuple[bytes, bytes] | None:
        """Token ids (int32) and values (float32) of the bias on its next token, if it has any."""
        if self._early_bias is None:
            return None
        early = len(self.token_ids) - self.prompt_len < self.params.min_tokens
        return self._early_bias if early else self._bias


def _packed(bias: Mapping[int, float]) -> tuple[bytes, bytes] | None:
    return (array("i", bias.keys()).tobytes(), array("f", bias.values()).tobytes()) if bias else None


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
