"""What is measured: settled, and refused where it cannot be, before anything large is loaded."""

import math
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from paddle.base.core import Place

from ops.device import device_memory, ranks_sharing
from predict.artifact import Artifact, refuse_artifact
from predict.engine.engine import DEFAULT_MAX_NUM_BATCHED_TOKENS
from predict.llm import DEFAULT_BLOCK_SIZE
from predict.model.config import MixtralConfig, positive
from predict.model.memory import ELEMENT_BYTES
from predict.model.source import find_model
from predict.model.weights import DUMMY_PREFIX, expected_tensors
from predict.runner import bytes_per_token

DEFAULT_PROMPT_LEN = (512, 2048)
DEFAULT_BATCH_SIZE = (1, 8, 32)
DEFAULT_CONTEXT_LEN = (5, 512, 4096)
DEFAULT_BATCH_CONTEXT_LEN = (128,)
DEFAULT_GEN_LEN = 64
DEFAULT_REPEAT = 5


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None where a flag was left out.

    Attributes:
        max_num_batched_tokens: new tokens a step computes at the most: a longer prompt takes several.
        prompt_len: tokens of the prompts whose prefill is timed.
        gen_len: decode steps of a repetition.
        batch_size: sequences that decode together.
        context_len: tokens in the cache when one sequence begins to decode.
        batch_context_len: the same for each sequence of a batch of several.
        repeat: times everything is measured, in turns.
    """

    model: str
    mode: str | None = None
    dtype: str | None = None
    quant_type: str | None = None
    block_size: int | None = None
    num_hidden_layers: int | None = None
    threads: int | None = None
    verify: bool = False
    device: str = "cpu"
    max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS
    prompt_len: tuple[int, ...] | None = None
    gen_len: int = DEFAULT_GEN_LEN
    batch_size: tuple[int, ...] | None = None
    context_len: tuple[int, ...] | None = None
    batch_context_len: tuple[int, ...] | None = None
    repeat: int = DEFAULT_REPEAT

    @property
    def traces(self) -> bool:
        """Whether the program is made on the spot, of a dummy: its weights are written nowhere."""
        return self.mode == "static" and self.model.startswith(DUMMY_PREFIX)


@dataclass(frozen=True)
class Decode:
    """Decoding of ``batch_size`` sequences, each with ``context_len`` tokens in the cache at the first step."""

    batch_size: int
    context_len: int


@dataclass(frozen=True)
class Plan:
    """What is measured of which model.

    Attributes:
        static: whether the model runs as a program: an exported one, or that of a dummy.
        dtype, quant_type, block_size: those the model will run with.
        prompt_lens, decodes: the measurements.
        left_out: sentences that name the defaults this model is too short for.
    """

    config: MixtralConfig
    static: bool
    dtype: str
    quant_type: str | None
    block_size: int
    prompt_lens: tuple[int, ...]
    decodes: tuple[Decode, ...]
    gen_len: int
    repeat: int
    max_num_batched_tokens: int
    left_out: tuple[str, ...]

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """(sequences, tokens) of the contexts to build, longest first; a batch is made of the first sequences."""
        groups, built = [], 0
        for decode in sorted(self.decodes, key=lambda d: -d.context_len):
            if decode.batch_size > built:
                groups.append((decode.batch_size - built, decode.context_len))
                built = decode.batch_size
        return groups

    @property
    def pages(self) -> list[range]:
        """Pages of the KV cache: one range for each sequence of ``contexts``, the last for the prompt being timed."""
        counts = [pages for sequences, pages in self._pages for _ in range(sequences)]
        ends = list(accumulate(counts, initial=0))
        return [range(first, end) for first, end in pairwise(ends)]

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache in all."""
        return sum(sequences * pages for sequences, pages in self._pages)

    @property
    def _pages(self) -> list[tuple[int, int]]:
        lengths = [(sequences, tokens + self.gen_len) for sequences, tokens in self.contexts]
        lengths.append((1, max(self.prompt_lens, default=1)))
        return [(sequences, -(-tokens // self.block_size)) for sequences, tokens in lengths]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, at least 2: what a model must be opened for."""
        return max(2, *self.prompt_lens, *(d.context_len + self.gen_len for d in self.decodes))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory, all ranks together, without what ranks hold in common more than once."""
        element = ELEMENT_BYTES[self.dtype]
        total = 0
        for name, shape in expected_tensors(self.config).items():
            float32 = len(shape) == 1 or name.endswith("block_sparse_moe.gate.weight")  # norms and routers
            plain = self.quant_type is None or name == "model.embed_tokens.weight"
            total += math.prod(shape) * (4 if float32 else element if plain else 1)
        return total

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV cache the measurements fill, all ranks together."""
        return self.num_pages * self.block_size * bytes_per_token(self.config, 1, self.dtype)


def make_plan(options: Options, world_size: int, place: Place | None = None) -> Plan:
    """Reads the model's configuration and settles what is measured.

    Args:
        place: this rank's device; None: the CPU.

    Raises:
        ValueError: a flag without effect, a length the model or this machine's memory is too small for, or a model that
            cannot be opened.
    """
    static = Artifact.is_artifact(options.model) if options.mode is None else options.mode == "static"
    if static and not options.traces:
        artifact = Artifact.open(options.model)
        artifact.require(options.dtype, options.quant_type, world_size, options.block_size, options.device)
        config, dtype, quant_type = artifact.config, artifact.dtype, artifact.quant_type
        block_size = artifact.block_size
    else:
        refuse_artifact(options.model)
        source = find_model(options.model, options.num_hidden_layers)
        config, dtype, quant_type = source.config, source.dtype(options.dtype, options.device), options.quant_type
        block_size = positive("block_size", DEFAULT_BLOCK_SIZE if options.block_size is None else options.block_size)
    left_out: list[str] = []
    batches = DEFAULT_BATCH_SIZE if options.batch_size is None else options.batch_size
    _refuse_without_effect(options, batches)
    limit = config.max_position_embeddings
    prompts = _fitting("prompt_len", options.prompt_len, DEFAULT_PROMPT_LEN, 0, limit, left_out)
    decodes: list[Decode] = []
    if 1 in batches:
        contexts = _fitting("context_len", options.context_len, DEFAULT_CONTEXT_LEN, options.gen_len, limit, left_out)
        decodes += [Decode(1, n) for n in contexts]
    if several := [b for b in batches if b > 1]:
        contexts = _fitting(
            "batch_context_len",
            options.batch_context_len,
            DEFAULT_BATCH_CONTEXT_LEN,
            options.gen_len,
            limit,
            left_out,
        )
        decodes += [Decode(b, n) for n in contexts for b in several]
    plan = Plan(
        config,
        static,
        dtype,
        quant_type,
        block_size,
        prompts,
        tuple(decodes),
        options.gen_len,
        options.repeat,
        options.max_num_batched_tokens,
        tuple(left_out),
    )
    if place is None:
        _check_memory(plan, _free_memory(), "this machine has")
    else:
        free = device_memory(place)[1] * world_size // ranks_sharing(place, world_size)
        _check_memory(plan, free, "the GPU has" if world_size == 1 else "the ranks' GPUs have")
    return plan


def _refuse_without_effect(options: Options, batches: tuple[int, ...]) -> None:
    if options.context_len is not None and 1 not in batches:
        raise ValueError(
            "--context_len is for decoding one sequence, and --batch_size has no 1; add it, or give --batch_context_len"
        )
    if options.batch_context_len is not None and max(batches) == 1:
        raise ValueError(
            "--batch_context_len is for decoding several sequences, and --batch_size names no more than 1; "
            "add a larger one, or give --context_len"
        )


def _fitting(
    name: str,
    asked: tuple[int, ...] | None,
    default: tuple[int, ...],
    gen_len: int,
    limit: int,
    left_out: list[str],
) -> tuple[int, ...]:
    """The lengths asked for, which must fit; of the default ones those that fit, the others noted in ``left_out``."""
    after = f" and {gen_len} new tokens (--gen_len)" if gen_len else ""
    for n in asked or ():
        if n + gen_len > limit:
            raise ValueError(
                f"--{name} {n}{after} is more than the {limit} tokens of the model's max_position_embeddings; lower it"
            )
    if asked is not None:
        return asked
    for n in default:
        if n + gen_len > limit:
            left_out.append(f"--{name} {n}{after} is left out: the model's max_position_embeddings is {limit}")
    return tuple(n for n in default if n + gen_len <= limit)


def _free_memory() -> int | None:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _check_memory(plan: Plan, free: int | None, where: str) -> None:
    needed = plan.weight_bytes + plan.cache_bytes
    if free is not None and needed > free:
        raise MemoryError(
            f"the weights need {plan.weight_bytes / 1e9:.1f} GB and the KV cache {plan.cache_bytes / 1e9:.1f} GB, "
            f"{where} {free / 1e9:.1f} GB free; use fewer --num_hidden_layers of a dummy model, --quant_type "
            "weight_only_int8, or a smaller --batch_size, --context_len or --batch_context_len"
        )
