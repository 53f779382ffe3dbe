"""One step(): the only two places that know whether the network runs as a dynamic graph or as an exported program."""

from pathlib import Path

import numpy as np
import paddle
from paddle import inference

from ops import library
from predict.engine.batch import INPUT_NAMES, StepBatch, StepResult
from predict.model.config import MixtralConfig
from predict.model.mixtral import Mixtral
from predict.weights_file import read_weights


def cache_shapes(config: MixtralConfig, world_size: int, num_blocks: int, block_size: int) -> list[list[int]]:
    """Shapes of the step's caches in order: key and value of every layer, [num_blocks, Hkv, block_size, D]."""
    shape = [num_blocks, config.num_key_value_heads // world_size, block_size, config.head_dim]
    return [shape] * (2 * config.num_hidden_layers)


def cache_names(config: MixtralConfig) -> list[str]:
    """Names of the caches as inputs of an exported program, in the same order."""
    return [f"{kind}_cache_{i}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]


def bytes_per_token(config: MixtralConfig, world_size: int, dtype: str) -> int:
    """Bytes of KV cache one token takes on one rank."""
    element = {"float32": 4, "bfloat16": 2}[dtype]
    return 2 * config.num_hidden_layers * config.num_key_value_heads // world_size * config.head_dim * element


def _empty_caches(
    config: MixtralConfig, world_size: int, dtype: str, num_blocks: int, block_size: int
) -> list[paddle.Tensor]:
    # Uninitialised on purpose: a page's memory is only touched when tokens are written to it.
    try:
        return [paddle.empty(shape, dtype) for shape in cache_shapes(config, world_size, num_blocks, block_size)]
    except MemoryError as error:
        size = num_blocks * block_size * bytes_per_token(config, world_size, dtype)
        raise MemoryError(
            f"the KV cache of {num_blocks} pages of {block_size} tokens needs {size / 1e9:.1f} GB, more than this "
            "machine has; use a smaller --kv_cache_memory"
        ) from error


class DynamicRunner:
    """Steps by calling the network."""

    mode = "dynamic"

    def __init__(self, model: Mixtral, num_blocks: int, block_size: int):
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.vocab_size = model.config.vocab_size
        self.caches = _empty_caches(model.config, model.world_size, model.dtype, num_blocks, block_size)

    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step."""
        with paddle.no_grad():
            outputs = self.model(*map(paddle.to_tensor, batch.arrays()), self.caches)
        return StepResult(*(x.numpy() for x in outputs))

    def logits(self, batch: StepBatch) -> np.ndarray:
        """The logits [S, V] float32 the step would sample from."""
        arguments = [*map(paddle.to_tensor, batch.arrays()[:5]), self.caches]
        with paddle.no_grad():
            return self.model.logits(*arguments).numpy()


class StaticRunner:
    """Steps by running an exported program; its weights and caches are bound once, the caches written in place.

    Args:
        program: path of program and weights without their suffixes (.json, .safetensors).
        show: show a progress bar while loading.
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
    ):
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, config.vocab_size
        settings = inference.Config(f"{program}.json", "")
        settings.disable_gpu()
        settings.disable_onednn()  # ten times slower than Paddle's own kernels on operators this small
        settings.disable_glog_info()
        settings.set_cpu_math_library_num_threads(library.num_threads())
        self.predictor = inference.create_predictor(settings)
        self.inputs = [self.predictor.get_input_handle(name) for name in INPUT_NAMES]
        self.outputs = [self.predictor.get_output_handle(name) for name in self.predictor.get_output_names()]
        names = cache_names(config)
        needed = {}
        for name in set(self.predictor.get_input_names()).difference(INPUT_NAMES, names):
            handle = self.predictor.get_input_handle(name)
            needed[name] = (handle.type().name.lower(), tuple(handle.shape()))
        # The predictor keeps no reference to what it shares.
        self.weights = read_weights(program.with_suffix(".safetensors"), needed, show)
        self.caches = _empty_caches(config, world_size, dtype, num_blocks, block_size)
        for name, tensor in [*self.weights.items(), *zip(names, self.caches, strict=True)]:
            self.predictor.get_input_handle(name).share_external_data(tensor)

    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step."""
        for handle, array in zip(self.inputs, batch.arrays(), strict=True):
            handle.copy_from_cpu(array)
        self.predictor.run()
        return StepResult(*(handle.copy_to_cpu() for handle in self.outputs))
