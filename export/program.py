"""Tracing the step into a static program."""

from pathlib import Path

import paddle
from paddle.static import InputSpec

from predict.engine.batch import INPUT_NAMES
from predict.model.mixtral import Mixtral
from predict.runner import cache_names, cache_shapes

# Rank and element type of every input of StepBatch; every size is free.
_INPUTS = {
    "token_ids": (1, "int32"),
    "cu_seqlens": (1, "int32"),
    "context_lens": (1, "int32"),
    "block_tables": (2, "int32"),
    "sample_rows": (1, "int32"),
    "sampling_floats": (2, "float32"),
    "sampling_ints": (2, "int64"),
    "history_ids": (1, "int32"),
    "history_offsets": (1, "int32"),
}


def save_program(model: Mixtral, path: Path, block_size: int) -> None:
    """Traces the whole step, sampling included, and writes ``path``.json and ``path``.pdiparams.

    The number of tokens, sequences, sampled rows and cache pages stay free; block_size is fixed.
    """
    specs: list = [InputSpec([None] * _INPUTS[name][0], _INPUTS[name][1], name) for name in INPUT_NAMES]
    shapes = cache_shapes(model.config, model.world_size, -1, block_size)
    specs.append([InputSpec(s, model.dtype, n) for s, n in zip(shapes, cache_names(model.config), strict=True)])
    traced = paddle.jit.to_static(model, input_spec=specs, full_graph=True)
    paddle.jit.save(traced, str(path))
