"""Tracing the step into a static program, which takes its weights as inputs."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import paddle
from paddle.static import InputSpec

from predict.engine.batch import INPUTS
from predict.model.mixtral import Mixtral
from predict.runner import DynamicRunner, StaticRunner, cache_names, cache_shapes


def save_program(network: Mixtral, path: Path, block_size: int) -> None:
    """Traces the whole step, sampling included, and writes ``path``.json, which holds no weights.

    The number of tokens, sequences, sampled rows and cache pages stay free; block_size is fixed. The weights are inputs
    named as the network's buffers.
    """
    buffers = dict(network.named_buffers())
    batch = [InputSpec([None] * rank, dtype, name) for name, (rank, dtype) in INPUTS.items()]
    shapes = cache_shapes(network.config, network.world_size, -1, block_size)
    caches = [InputSpec(s, network.dtype, n) for s, n in zip(shapes, cache_names(network.config), strict=True)]
    weights = {name: InputSpec.from_tensor(buffer, name) for name, buffer in buffers.items()}

    def step(batch, caches, weights):
        _take_weights(network, weights)
        return network(*batch, caches)

    try:
        traced = paddle.jit.to_static(step, input_spec=[batch, caches, weights], full_graph=True)
        with warnings.catch_warnings():
            for remark in ("What you save is a function", "no variable in your model"):  # both as they should be
                warnings.filterwarnings("ignore", remark)
            paddle.jit.save(traced, str(path))
    finally:
        _take_weights(network, buffers)


def as_program(runner: DynamicRunner) -> StaticRunner:
    """Runs a runner's network as the program an export would have; nothing is written but that, to a temporary folder.

    Weights stay where they are, the caches are made anew: the runner given cannot be used any more.
    """
    network = runner.model
    with TemporaryDirectory() as folder:
        program = Path(folder) / "model"
        save_program(network, program, runner.block_size)
        runner.caches.clear()
        return StaticRunner(
            program,
            network.config,
            network.world_size,
            network.dtype,
            runner.num_blocks,
            runner.block_size,
            place=network.place,
            weights=dict(network.named_buffers()),
        )


@paddle.jit.not_to_static  # a part of Python's, not of the program's
def _take_weights(network: Mixtral, weights: Mapping[str, paddle.Tensor | paddle.pir.Value]) -> None:
    """Puts ``weights``, traced or real, in the place of the network's buffers of the same names."""
    layers = dict(network.named_sublayers(include_self=True))
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        # Assigning a traced value to a buffer would have the program copy it, so the buffer goes first.
        delattr(layers[path], attribute)
        if isinstance(weight, paddle.Tensor):
            layers[path].register_buffer(attribute, weight)
        else:
            setattr(layers[path], attribute, weight)
