"""Mixtral's configuration as Hugging Face's config.json states it, checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
# The activations that each kind of device has kernels for.
DEVICE_DTYPES = {"cpu": ("bfloat16", "float32"), "gpu": ("bfloat16", "float16")}
_MISSING = object()


class ConfigError(ValueError):
    """A config.json that cannot be read, or describes something this network is not."""


def why_not_on(device: str, dtype: str, remedy: str = "use") -> str | None:
    """Why activations of ``dtype`` cannot run on "cpu" or "gpu", to follow what they are of; None: they can.

    Args:
        remedy: what to do with --dtype to have others.
    """
    if dtype in DEVICE_DTYPES[device]:
        return None
    if dtype not in DTYPES:
        return f"is {dtype!r}, needs {' or '.join(DEVICE_DTYPES[device])}"
    [other] = (name for name, dtypes in DEVICE_DTYPES.items() if dtype in dtypes)
    return (
        f"is {dtype}, which runs on {other.upper()}s only; {remedy} --dtype {' or '.join(DEVICE_DTYPES[device])}, "
        f"or use --device {other}"
    )


@dataclass(frozen=True)
class MixtralConfig:
    """What the network needs to know; field names are Hugging Face's.

    Attributes:
        head_dim: size of one head; hidden_size / num_attention_heads where the file does not say.
        sliding_window: positions a token sees, itself included; None: all before it.
        dtype: element type of the checkpoint, "float32", "bfloat16" or "float16".
        eos_token_id: ids that end a generation; may be empty.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]

    @staticmethod
    def read(path: str | Path) -> "MixtralConfig":
        """Reads a config.json written by transformers 4 or 5.

        Raises:
            ConfigError: no such file, not JSON, not a Mixtral, a value missing or out of range; says what is needed.
        """
        return MixtralConfig.from_dict(read_json(path, "a Mixtral checkpoint's config.json"), str(path))

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str = "config.json") -> "MixtralConfig":
        """The same from parsed JSON; ``source`` names it in errors."""
        fields = _Fields(raw, source)
        if raw.get("model_type") != "mixtral":
            raise ConfigError(f"{source}: model_type is {raw.get('model_type')!r}, needs 'mixtral'")
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{source}: hidden_act is {raw['hidden_act']!r}, needs 'silu'")
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise ConfigError(
                f"{source}: the checkpoint is already quantised ({method}); give one in bfloat16, float16 or float32 "
                "and quantise here with --quant_type weight_only_int8"
            )
        hidden_size = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        if raw.get("head_dim") is None and hidden_size % heads:
            raise ConfigError(
                f"{source}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads} "
                "and no head_dim is given"
            )
        config = MixtralConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim", hidden_size // heads),
            num_local_experts=fields.integer("num_local_experts"),
            num_experts_per_tok=fields.integer("num_experts_per_tok"),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.positive("rms_norm_eps"),
            rope_theta=fields.rope_theta(),
            sliding_window=fields.integer("sliding_window", None),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            dtype=fields.dtype(),
            bos_token_id=fields.integer("bos_token_id", None, minimum=0),
            eos_token_id=fields.token_ids("eos_token_id"),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ConfigError(
                f"{source}: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        if config.num_experts_per_tok > config.num_local_experts:
            raise ConfigError(
                f"{source}: num_experts_per_tok {config.num_experts_per_tok} is more than "
                f"num_local_experts {config.num_local_experts}"
            )
        if config.head_dim % 2:
            raise ConfigError(f"{source}: head_dim is {config.head_dim}, needs an even number (rotary embedding)")
        return config


def positive(name: str, value: Any) -> int:
    """``value`` if it is a positive integer.

    Raises:
        ConfigError: it is not; says which value and what is needed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}, needs a positive integer")
    return value


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: no such file, not JSON, or not an object; ``what`` says what was expected there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; needs {what}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); needs {what}") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON (line {error.lineno}: {error.msg}); needs {what}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, needs an object: {what}")
    return value


class _Fields:
    """Typed access to the raw JSON, with errors that name file, key and value."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw = raw
        self.source = source

    def integer(self, key: str, default: Any = _MISSING, minimum: int = 1) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"{self.source}: {key} is missing, needs an integer >= {minimum}")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{self.source}: {key} is {value!r}, needs an integer >= {minimum}")
        return value

    def positive(self, key: str) -> float:
        return self._positive(key, self.raw.get(key))

    def _positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self.source}: {key} is {value!r}, needs a positive number")
        return float(value)

    def rope_theta(self) -> float:
        """rope_theta (transformers 4) or rope_parameters.rope_theta (transformers 5)."""
        parameters = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type != "default":
            raise ConfigError(f"{self.source}: rope_type is {rope_type!r}, only 'default' (no scaling) is supported")
        return self._positive("rope_theta", parameters.get("rope_theta", self.raw.get("rope_theta")))

    def dtype(self) -> str:
        """dtype (transformers 5) or torch_dtype (transformers 4); float32 without either, as in transformers."""
        value = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        if value not in DTYPES:
            raise ConfigError(f"{self.source}: dtype is {value!r}, needs one of {', '.join(DTYPES)}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or null."""
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ConfigError(f"{self.source}: {key} is {value!r}, needs token ids (integers >= 0)")
        return tuple(ids)
