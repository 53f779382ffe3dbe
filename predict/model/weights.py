"""A rank's share of the weights: read slice by slice, quantised before it is split, written straight into the network.

Peak host memory is the rank's own weights plus one tensor of the checkpoint.
"""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import paddle

# By name: NumPy imports its random numbers when they are first used, and an interrupt inside that import is lost.
from numpy.random import SFC64, Generator
from paddle.base.core import Place

from ops.device import synchronize
from ops.quantize import INT8_ZERO, pack_into, quantize_int8_into
from predict.model.checkpoint import Checkpoint, CheckpointError
from predict.model.config import ConfigError, MixtralConfig, positive
from predict.model.memory import host_view, on_device
from predict.model.mixtral import DecoderLayer, Mixtral, padded_vocab_share
from predict.model.noise import Noise
from predict.progress import progress

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEMO = CONFIGS / "demo"
DUMMY_PREFIX = "dummy:"
# Random weights are integers times this power of two: exact in all types, and of about initializer_range (0.02).
DUMMY_STEP = 2.0**-12


class WeightSource(Protocol):
    """Where tensors come from: a Checkpoint, or DummyWeights."""

    def read(self, name: str) -> tuple[np.ndarray, str]:
        """The whole tensor (bfloat16 as uint16) and its dtype's name; slices of it are all that need be touched."""
        ...


class DummyWeights:
    """Seeded random weights of a configuration's shapes, for running true sizes without a checkpoint."""

    def __init__(self, config: MixtralConfig, seed: int = 0):
        self.shapes = expected_tensors(config)
        self.seed = seed
        int8 = np.clip(np.arange(256, dtype=np.uint8).view(np.int8), -127, 127)
        self.packed_int8_of_byte = (int8.astype(np.int16) + INT8_ZERO).astype(np.uint8)
        self.bfloat16_of_byte = ((int8 * np.float32(DUMMY_STEP)).view(np.uint32) >> 16).astype(np.uint16)

    def read(self, name: str) -> tuple[np.ndarray, str]:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.full(shape, 0x3F80, np.uint16), "bfloat16"  # norms: ones
        random = Generator(SFC64([self.seed, zlib.crc32(name.encode())]))
        bits = np.frombuffer(random.bytes(int(np.prod(shape))), np.uint8)
        return self.bfloat16_of_byte[bits].reshape(shape), "bfloat16"

    def noise(self, place: Place, dtype: str, quant_type: str | None) -> Noise:
        """The same kind of weights, packed, for a device to make: those of int8 are times DUMMY_STEP."""
        if quant_type is not None:
            return Noise(place, self.packed_int8_of_byte, self.seed)
        return Noise(place, convert(self.bfloat16_of_byte, "bfloat16", dtype).view(np.uint16), self.seed)


def expected_tensors(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint in Hugging Face's Mixtral layout."""
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.block_sparse_moe.gate.weight": (config.num_local_experts, hidden),
        }
        for e in range(config.num_local_experts):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            shapes |= {
                f"{expert}.w1.weight": (intermediate, hidden),
                f"{expert}.w2.weight": (hidden, intermediate),
                f"{expert}.w3.weight": (intermediate, hidden),
            }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def unused_tensors(config: MixtralConfig) -> frozenset[str]:
    """Tensors some checkpoints carry that hold nothing new: rotary tables, and the head of a tied model."""
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_hidden_layers)}
    return frozenset(tables | ({"lm_head.weight"} if config.tie_word_embeddings else set()))


def dummy_config(name: str, num_hidden_layers: int | None) -> MixtralConfig:
    """The configuration ``dummy:NAME`` means: a file of configs/ by its name, or a path to a config.json.

    Raises:
        ConfigError: no such configuration; lists those there are.
    """
    wanted = name.removeprefix(DUMMY_PREFIX)
    shipped = {p.stem: p for p in sorted(CONFIGS.glob("*.json"))} | {"demo": DEMO / "config.json"}
    path = shipped.get(wanted, Path(wanted))
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{name}: no configuration {wanted!r}; needs one of {', '.join(shipped)}, or the path of a config.json"
        )
    config = MixtralConfig.read(path)
    if num_hidden_layers is None:
        return config
    return replace(config, num_hidden_layers=positive("num_hidden_layers", num_hidden_layers))


def open_checkpoint(folder: Path, config: MixtralConfig) -> Checkpoint:
    """The checkpoint of a folder, its tensors checked against the configuration before anything large is allocated.

    Raises:
        CheckpointError: see predict.model.checkpoint.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_tensors(config), unused_tensors(config))
    return checkpoint


def load(
    config: MixtralConfig,
    source: WeightSource,
    dtype: str,
    quant_type: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    place: Place | None = None,
) -> Mixtral:
    """Builds the network and fills it with this rank's share of ``source``.

    Args:
        dtype: of activations and unquantised weights: "bfloat16", "float16" or "float32".
        quant_type: "weight_only_int8", "a8w8" (the same weights) or None. Whole rows are quantised before they are
            split, so scales do not depend on the number of ranks.
        place: a device to copy the weights to, layer by layer, so that the host holds little more than one; None: they
            stay on the CPU. A device makes a dummy's large weights itself, others than a CPU's and than those of
            another number of ranks.

    Raises:
        CheckpointError: a value that cannot be quantised, or is beyond float16; names the tensor.
    """
    model = Mixtral(config, dtype, quant_type, world_size, place)
    _Loader(model, source, rank).load()
    return model


def convert(array: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """Element type ``dtype`` to ``to``, rounded to nearest even; bfloat16 as uint16.

    Raises:
        OverflowError: a finite value rounds to no finite float16.
    """
    if dtype == to:
        return array
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    if to == "float32":
        return array.astype(np.float32, copy=False)
    if to == "float16":
        try:
            with np.errstate(over="raise"):
                return array.astype(np.float16)
        except FloatingPointError:
            largest = np.abs(array[np.isfinite(array)]).max()
            raise OverflowError(f"{largest:g} is beyond float16, whose largest number is 65504") from None
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


class _Loader:
    def __init__(self, model: Mixtral, source: WeightSource, rank: int):
        self.model, self.source, self.rank = model, source, rank
        self.config, self.world_size = model.config, model.world_size
        shapes = expected_tensors(self.config)
        work = "loading weights" if model.quant_type is None else "quantising weights"
        self.bar = progress(work, sum(int(np.prod(s)) for s in shapes.values()), "weights", rank == 0)
        self.noise = None
        if model.place is not None and isinstance(source, DummyWeights):
            self.noise = source.noise(model.place, model.dtype, model.quant_type)

    def load(self) -> None:
        model = self.model
        with self.bar:
            self._plain(model.embed_tokens, "model.embed_tokens.weight")
            if self.noise is not None:
                self.noise.set_tokens_apart(host_view(model.embed_tokens))
            for i, layer in enumerate(model.layers):
                name = f"model.layers.{i}"
                self._plain(layer.input_layernorm, f"{name}.input_layernorm.weight")
                self._plain(layer.post_attention_layernorm, f"{name}.post_attention_layernorm.weight")
                self._plain(layer.gate, f"{name}.block_sparse_moe.gate.weight")
                if not self._made(name, layer.qkv_proj, layer.o_proj, layer):
                    self._matrices(name, layer)
                self._move(layer)
            self._plain(model.norm, "model.norm.weight")
            if model.config.tie_word_embeddings:
                self._vocabulary("model.embed_tokens.weight")
            elif not self._made("lm_head.weight", model.lm_head):
                self._vocabulary("lm_head.weight")
            self._move(model)
        if self.noise is not None:
            synchronize(self.noise.place)

    def _matrices(self, name: str, layer: DecoderLayer) -> None:
        """Attention's projections and the experts of one layer."""
        row = 0
        for part in ("q_proj", "k_proj", "v_proj"):
            row += self._rows(layer.qkv_proj, "weight", f"{name}.self_attn.{part}.weight", at=row)
        self._columns(layer.o_proj, "weight", f"{name}.self_attn.o_proj.weight")
        for e in range(self.config.num_local_experts):
            expert = f"{name}.block_sparse_moe.experts.{e}"
            up = self._rows(layer, "w13", f"{expert}.w1.weight", expert=e, half=0)
            self._rows(layer, "w13", f"{expert}.w3.weight", at=up, expert=e, half=1)
            self._columns(layer, "w2", f"{expert}.w2.weight", expert=e)

    def _made(self, name: str, *parts: paddle.nn.Layer) -> bool:
        """Has the device make all packed weights of some layers, if they are a dummy's and fill their tiles."""
        if self.noise is None or any(part.padded for part in parts):
            return False
        for number, part in enumerate(parts):
            for weight in ("weight", "w13", "w2"):
                if not hasattr(part, weight):
                    continue
                made = self.noise.make(part, weight, f"{name} {number} {weight} {self.rank}")
                self.bar.update(made * self.world_size)
                if self.model.quant_type is not None:
                    host_view(getattr(part, f"{weight}_scale"))[...] = DUMMY_STEP
        return True

    def _move(self, layer: paddle.nn.Layer) -> None:
        """What of the layer is still on the CPU goes to the model's device, if it has one."""
        if self.model.place is None:
            return
        for part in layer.sublayers(include_self=True):
            for name, buffer in list(part.named_buffers(include_sublayers=False)):
                if buffer.place.is_cpu_place():
                    setattr(part, name, on_device(buffer, self.model.place))

    def _read(self, name: str) -> tuple[np.ndarray, str]:
        array, dtype = self.source.read(name)
        self.bar.update(array.size)
        return array, dtype

    def _plain(self, target: paddle.Tensor, name: str) -> None:
        """The whole tensor, the same on every rank, never quantised."""
        array, dtype = self._read(name)
        host_view(target)[...] = _converted(name, array, dtype, str(target.dtype).removeprefix("paddle."))

    def _rows(
        self,
        layer: paddle.nn.Layer,
        weight: str,
        name: str,
        at: int = 0,
        expert: int | None = None,
        half: int | None = None,
    ) -> int:
        """This rank's share of the output rows, to row ``at`` on; returns how many. ``half``: see pack_into."""
        array, dtype = self._read(name)
        share = array.shape[0] // self.world_size
        self._fill(layer, weight, name, array[self.rank * share :][:share], dtype, at, expert, half)
        return share

    def _fill(self, layer, weight: str, name: str, rows: np.ndarray, dtype: str, at=0, expert=None, half=None) -> None:
        """``rows`` to row ``at`` on of the layer's weight, or of one expert of it."""
        target = _part(host_view(getattr(layer, weight)), expert)
        if self.model.quant_type is not None:
            scale = _part(host_view(getattr(layer, f"{weight}_scale")), expert)[at : at + len(rows)]
            rows = _quantised(name, rows, scale, dtype)
        else:
            rows = _converted(name, rows, dtype, self.model.dtype)
        if rows.dtype == np.float32:
            target[at : at + len(rows)] = rows
        else:
            pack_into(rows, target, at if half is None else 0, half)

    def _columns(self, layer: paddle.nn.Layer, weight: str, name: str, expert: int | None = None) -> None:
        """This rank's share of the input columns; the scale of a row is that of the whole row."""
        array, dtype = self._read(name)
        share = array.shape[1] // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        target = _part(host_view(getattr(layer, weight)), expert)
        if self.model.quant_type is not None:
            scale = _part(host_view(getattr(layer, f"{weight}_scale")), expert)
            columns = _quantised(name, array, scale, dtype)[:, mine]
        else:
            columns = _converted(name, array[:, mine], dtype, self.model.dtype)
        if columns.dtype == np.float32:
            target[...] = columns
        else:
            pack_into(columns, target)

    def _vocabulary(self, name: str) -> None:
        """This rank's rows of lm_head, zero past the vocabulary."""
        array, dtype = self._read(name)
        share = padded_vocab_share(self.config, self.world_size)
        rows = array[self.rank * share :][:share]
        head = self.model.lm_head
        if len(rows) < share:
            host_view(head.weight)[...] = 0 if self.model.quant_type is None else INT8_ZERO
        self._fill(head, "weight", name, rows, dtype)
        if self.model.quant_type is not None:
            host_view(head.weight_scale)[len(rows) :] = 1


def _converted(name: str, array: np.ndarray, dtype: str, to: str) -> np.ndarray:
    try:
        return convert(array, dtype, to)
    except OverflowError as error:
        raise CheckpointError(f"tensor {name}: {error}; use --dtype bfloat16") from error


def _quantised(name: str, weight: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """``weight`` in int8; its scales go to ``scale``."""
    q = np.empty(weight.shape, np.int8)
    try:
        quantize_int8_into(weight, q, scale, dtype)
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be quantised: {error}") from error
    return q


def _part(view: np.ndarray, expert: int | None) -> np.ndarray:
    return view if expert is None else view[expert]
