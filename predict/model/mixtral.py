"""Mixtral as a Paddle dynamic-graph network on our own operators: the step of the contract, written for both modes.

The residual stream and whatever is summed across ranks is float32; what enters a matrix product has the activation
dtype.
Shapes: T packed tokens, B sequences, S sampled rows, H hidden, I this rank's share of the intermediate size, E experts,
Hq / Hkv this rank's query / key-value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable

import paddle
from paddle import nn
from paddle.base.core import Place

from ops.blocks import Norm, PagedCache, Weight, attention_block, head, moe_block
from ops.collective import all_gather, all_reduce
from ops.embedding import embedding
from ops.quantize import INT8_ZERO, gate_up_shape, packed_shape
from ops.sampling import sample
from predict.model.config import DTYPES, ConfigError, MixtralConfig
from predict.model.memory import empty, host_view

# Both have int8 weights; by the bits of the fixed point that what they are multiplied with is rounded to.
QUANT_TYPES = {"weight_only_int8": 16, "a8w8": 8}


class Linear(nn.Layer):
    """A weight [out, in] in the activation dtype or int8; all but float32 packed."""

    padded = False

    def __init__(self, out_features: int, in_features: int, dtype: str, quant_type: str | None):
        super().__init__()
        self.out_features = out_features
        _add_weight(self, "weight", [out_features, in_features], dtype, quant_type, packed_shape)


class DecoderLayer(nn.Layer):
    """Attention and experts of one layer, as this rank holds them."""

    padded = False

    def __init__(self, config: MixtralConfig, dtype: str, quant_type: str | None, world_size: int):
        super().__init__()
        self.config, self.dtype, self.world_size = config, dtype, world_size
        self.num_heads = config.num_attention_heads // world_size
        self.num_kv_heads = config.num_key_value_heads // world_size
        hidden, head_dim = config.hidden_size, config.head_dim
        intermediate, experts = config.intermediate_size // world_size, config.num_local_experts
        _add_buffer(self, "input_layernorm", [hidden], "float32")
        self.qkv_proj = Linear((self.num_heads + 2 * self.num_kv_heads) * head_dim, hidden, dtype, quant_type)
        self.o_proj = Linear(hidden, self.num_heads * head_dim, dtype, quant_type)
        _add_buffer(self, "post_attention_layernorm", [hidden], "float32")
        _add_buffer(self, "gate", [experts, hidden], "float32")
        self.activation_bits = _activation_bits(quant_type)
        _add_weight(self, "w13", [experts, 2 * intermediate, hidden], dtype, quant_type, _gate_up_shape)
        _add_weight(self, "w2", [experts, hidden, intermediate], dtype, quant_type, packed_shape)

    def forward(self, residual, delta, cache: PagedCache):
        """residual [T, H] and what the layer before leaves to be added to it -> the same two after this layer."""
        config, eps = self.config, self.config.rms_norm_eps
        delta, residual = attention_block(
            residual,
            delta,
            Norm(self.input_layernorm, eps, self.dtype),
            _weight(self.qkv_proj, "weight"),
            _weight(self.o_proj, "weight"),
            cache,
            self.num_heads,
            self.num_kv_heads,
            config.rope_theta,
            config.sliding_window or 0,
            self.activation_bits,
        )
        delta, residual = moe_block(
            residual,
            all_reduce(delta, self.world_size),
            Norm(self.post_attention_layernorm, eps, self.dtype),
            self.gate,
            _weight(self, "w13"),
            _weight(self, "w2"),
            config.num_experts_per_tok,
            self.activation_bits,
        )
        return residual, all_reduce(delta, self.world_size)


class Mixtral(nn.Layer):
    """One rank's share of the network; ``predict.model.weights`` fills it.

    Args:
        config: the model.
        dtype: activations, KV cache and unquantised weights: "bfloat16", "float16" (which runs on a GPU) or "float32".
        quant_type: "weight_only_int8" (activations enter products in 16 bits), "a8w8" (in 8 bits), or None.
        world_size: ranks the heads, experts' intermediate size and vocabulary are split over.
        place: the device that is to hold it; None: the CPU.

    Raises:
        ConfigError: the sizes do not divide by world_size, or dtype or quant_type is unknown.
    """

    def __init__(
        self,
        config: MixtralConfig,
        dtype: str,
        quant_type: str | None = None,
        world_size: int = 1,
        place: Place | None = None,
    ):
        super().__init__()
        check_shardable(config, world_size)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, needs one of {', '.join(DTYPES)}")
        if quant_type is not None and quant_type not in QUANT_TYPES:
            raise ConfigError(f"quant_type is {quant_type!r}, needs {' or '.join(QUANT_TYPES)}, or none at all")
        self.config, self.dtype, self.quant_type, self.world_size = config, dtype, quant_type, world_size
        self.place = place
        _add_buffer(self, "embed_tokens", [config.vocab_size, config.hidden_size], dtype)
        self.layers = nn.LayerList(
            [DecoderLayer(config, dtype, quant_type, world_size) for _ in range(config.num_hidden_layers)]
        )
        _add_buffer(self, "norm", [config.hidden_size], "float32")
        self.lm_head = Linear(padded_vocab_share(config, world_size), config.hidden_size, dtype, quant_type)
        self.eval()

    def logits(self, token_ids, cu_seqlens, context_lens, block_tables, sample_rows, caches) -> paddle.Tensor:
        """Runs the layers over the packed tokens, writes the caches; gives the logits [S, V] float32 of sample_rows."""
        residual, delta = embedding(token_ids, self.embed_tokens), None  # [T, H]
        for i, layer in enumerate(self.layers):
            key_cache, value_cache = caches[2 * i], caches[2 * i + 1]
            cache = PagedCache(key_cache, value_cache, cu_seqlens, context_lens, block_tables)
            residual, delta = layer(residual, delta, cache)
        norm, weight = Norm(self.norm, self.config.rms_norm_eps, self.dtype), _weight(self.lm_head, "weight")
        bits = _activation_bits(self.quant_type)
        logits = head(residual, delta, norm, sample_rows, weight, self.lm_head.out_features, bits)
        logits = all_gather(logits, self.world_size)
        # The last rank's share of the vocabulary may be padded.
        return logits if logits.shape[1] == self.config.vocab_size else logits[:, : self.config.vocab_size]

    def forward(
        self,
        token_ids,
        cu_seqlens,
        context_lens,
        block_tables,
        sample_rows,
        sampling_floats,
        sampling_ints,
        history_ids,
        history_offsets,
        bias_ids,
        bias_values,
        bias_offsets,
        caches,
    ):
        """One step: see predict.engine.batch.StepBatch for the arguments.

        Args:
            caches: [key, value] of layer 0, of layer 1, ...: each [num_blocks, Hkv, block_size, D], written in place.

        Returns:
            next_tokens [S] int32, logprobs [S] float32, top_ids [S, 20] int32 and top_logprobs [S, 20] float32.
        """
        logits = self.logits(token_ids, cu_seqlens, context_lens, block_tables, sample_rows, caches)
        history, bias = (history_ids, history_offsets), (bias_ids, bias_values, bias_offsets)
        return sample(logits, sampling_floats, sampling_ints, *history, *bias)


def padded_vocab_share(config: MixtralConfig, world_size: int) -> int:
    """Rows of lm_head each rank holds; rows past the vocabulary are zero."""
    return -(-config.vocab_size // world_size)


def check_shardable(config: MixtralConfig, world_size: int) -> None:
    """Refuses a number of ranks that the heads or the experts' intermediate size do not divide by."""
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        value = getattr(config, name)
        if value % world_size:
            raise ConfigError(
                f"{name} {value} cannot be split over {world_size} ranks; use a number of ranks that divides it"
            )


def _activation_bits(quant_type: str | None) -> int:
    return 16 if quant_type is None else QUANT_TYPES[quant_type]


def _weight(layer: nn.Layer, name: str) -> Weight:
    """What :func:`_add_weight` made."""
    return Weight(getattr(layer, name), getattr(layer, f"{name}_scale", None))


def _add_buffer(layer: nn.Layer, name: str, shape: list[int], dtype: str) -> None:
    layer.register_buffer(name, empty(shape, dtype))


def _add_weight(
    layer: nn.Layer,
    name: str,
    shape: list[int],
    dtype: str,
    quant_type: str | None,
    shape_in_tiles: Callable[[int, int, str], list[int]],
) -> None:
    """``name``, weights of ``shape`` as the kernels take them: packed, but for float32; with int8, ``name``_scale, one
    float32 per output row. ``layer.padded`` becomes true where tiles hold more than the weights."""
    if quant_type is None and dtype == "float32":
        _add_buffer(layer, name, shape, dtype)
        return
    element = dtype if quant_type is None else "int8"
    packed = [*shape[:-2], *shape_in_tiles(shape[-2], shape[-1], element)]
    _add_buffer(layer, name, packed, "uint8" if element == "int8" else element)
    if math.prod(packed) != math.prod(shape):
        layer.padded = True
        host_view(getattr(layer, name))[...] = INT8_ZERO if element == "int8" else 0
    if element == "int8":
        _add_buffer(layer, f"{name}_scale", shape[:-1], "float32")


def _gate_up_shape(rows: int, columns: int, dtype: str) -> list[int]:
    return gate_up_shape(rows // 2, columns, dtype)
