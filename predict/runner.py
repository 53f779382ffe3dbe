"""One step(): the only two places that know whether the network runs as a dynamic graph or as an exported program."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paddle
from paddle import inference
from paddle.base.core import Place

from ops import library
from ops.gpu_group import check_gpus
from predict.engine.batch import INPUT_NAMES, StepBatch, StepResult
from predict.model.config import MixtralConfig
from predict.model.memory import CPU, ELEMENT_BYTES, empty
from predict.model.mixtral import Mixtral
from predict.weights_file import read_weights

# Paddle's own memory beside weights and caches grows from this.
_GPU_POOL_MB = 100

# What a step no longer needs is given back once that much of it has come together: at 0, Paddle's default, its executor
# wakes a thread for every operator.
_GARBAGE_GB = 1 / 16


def cache_shapes(config: MixtralConfig, world_size: int, num_blocks: int, block_size: int) -> list[list[int]]:
    """Shapes of the step's caches in order: key and value of every layer, [num_blocks, Hkv, block_size, D]."""
    shape = [num_blocks, config.num_key_value_heads // world_size, block_size, config.head_dim]
    return [shape] * (2 * config.num_hidden_layers)


def cache_names(config: MixtralConfig) -> list[str]:
    """Names of the caches as inputs of an exported program, in the same order."""
    return [f"{kind}_cache_{i}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]


def bytes_per_token(config: MixtralConfig, world_size: int, dtype: str) -> int:
    """Bytes of KV cache one token takes on one rank."""
    heads = config.num_key_value_heads // world_size
    return 2 * config.num_hidden_layers * heads * config.head_dim * ELEMENT_BYTES[dtype]


def _empty_caches(
    config: MixtralConfig, world_size: int, dtype: str, num_blocks: int, block_size: int, place: Place | None
) -> list[paddle.Tensor]:
    # Uninitialised on purpose: memory is only touched where tokens are written to it.
    shapes = cache_shapes(config, world_size, num_blocks, block_size)
    try:
        if place is None:
            return [empty(shape, dtype) for shape in shapes]
        return [paddle.empty(shape, dtype, device=place) for shape in shapes]
    except (MemoryError, OSError) as error:  # the latter is a CustomDevice's
        size = num_blocks * block_size * bytes_per_token(config, world_size, dtype)
        raise MemoryError(
            f"the KV cache of {num_blocks} pages of {block_size} tokens needs {size / 1e9:.1f} GB, more than there "
            "is; use a smaller --kv_cache_memory"
        ) from error


def _result(batch: StepBatch, fetches: list[Callable[[], np.ndarray]], place: Place | None) -> StepResult:
    """A step's outputs, each had by a call: a copy, on a GPU. What no row asks for is not fetched."""
    wanted = len(fetches) if batch.wants_top_logprobs else 2
    result = StepResult(*(fetch() for fetch in fetches[:wanted]))
    if place is not None:
        check_gpus()
        rows = np.flatnonzero(result.tokens < 0)  # a device's word for what the CPU's operator refuses itself
        if rows.size:
            raise ValueError(
                f"sample: row {rows[0]} of logits holds NaN or +inf, or nothing but -inf (its bias added); needs "
                "finite numbers (-inf: masked)"
            )
    return result


class _Changes:
    """Which inputs differ from those of the step before: few, from decode to decode, and on a GPU each copy costs."""

    def __init__(self) -> None:
        self.last: list[tuple[tuple[int, ...], bytes] | None] = [None] * len(INPUT_NAMES)

    def among(self, arrays: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        for i, array in enumerate(arrays):
            content = (array.shape, array.tobytes())
            if content != self.last[i]:
                yield i, array
                self.last[i] = content


class DynamicRunner:
    """Steps by calling the network."""

    mode = "dynamic"

    def __init__(self, model: Mixtral, num_blocks: int, block_size: int):
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.vocab_size = model.config.vocab_size
        self.caches = _empty_caches(model.config, model.world_size, model.dtype, num_blocks, block_size, model.place)
        self.changes = _Changes()
        self.inputs: list[paddle.Tensor | None] = [None] * len(INPUT_NAMES)

    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step."""
        with paddle.no_grad():
            outputs = self.model(*self._tensors(batch.arrays()), self.caches)
        return _result(batch, [x.numpy for x in outputs], self.model.place)

    def logits(self, batch: StepBatch) -> np.ndarray:
        """The logits [S, V] float32 the step would sample from."""
        arguments = [*self._tensors(batch.arrays()[:5]), self.caches]
        with paddle.no_grad():
            logits = self.model.logits(*arguments).numpy()
        check_gpus()
        return logits

    def _tensors(self, arrays: list[np.ndarray]) -> list[paddle.Tensor]:
        for i, array in self.changes.among(arrays):
            self.inputs[i] = paddle.to_tensor(array, place=self.model.place or CPU)
        return self.inputs[: len(arrays)]


class StaticRunner:
    """Steps by running an exported program; its weights and caches are bound once, the caches written in place.

    Args:
        program: path of program and weights without their suffixes (.json, .safetensors).
        show: show a progress bar while loading.
        place: the device that runs it; None: the CPU.
        weights: its inputs of these names, on that device; None: those of the file.
    """

    mode = "static"

    def __init__(
        self,
        program: Path,
        config: MixtralConfig,
        world_size: int,
        dtype: str,
        num_blocks: int,
        block_size: int,
        show: bool = False,
        place: Place | None = None,
        weights: dict[str, paddle.Tensor] | None = None,
    ):
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, config.vocab_size
        self.place = place
        settings = inference.Config(f"{program}.json", "")
        if place is None:
            settings.disable_gpu()
        elif place.is_gpu_place():
            settings.enable_use_gpu(_GPU_POOL_MB, place.gpu_device_id())
        else:
            settings.enable_custom_device(place.custom_device_type(), place.custom_device_id())
        settings.disable_onednn()  # ten times slower than Paddle's own kernels on operators this small
        settings.disable_glog_info()
        settings.set_cpu_math_library_num_threads(library.num_threads())
        paddle.set_flags({"FLAGS_eager_delete_tensor_gb": _GARBAGE_GB})
        self.predictor = inference.create_predictor(settings)
        self.inputs = [self.predictor.get_input_handle(name) for name in INPUT_NAMES]
        self.changes = _Changes()
        self.outputs = [self.predictor.get_output_handle(name) for name in self.predictor.get_output_names()]
        names = cache_names(config)
        if weights is None:
            needed = {}
            for name in set(self.predictor.get_input_names()).difference(INPUT_NAMES, names):
                handle = self.predictor.get_input_handle(name)
                needed[name] = (handle.type().name.lower(), tuple(handle.shape()))
            weights = read_weights(program.with_suffix(".safetensors"), needed, show, place)
        self.weights = weights  # the predictor keeps no reference to what it shares
        self.caches = _empty_caches(config, world_size, dtype, num_blocks, block_size, place)
        for name, tensor in [*self.weights.items(), *zip(names, self.caches, strict=True)]:
            self.predictor.get_input_handle(name).share_external_data(tensor)

    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step."""
        for i, array in self.changes.among(batch.arrays()):
            self.inputs[i].copy_from_cpu(array)
        self.predictor.run()
        return _result(batch, [handle.copy_to_cpu for handle in self.outputs], self.place)
