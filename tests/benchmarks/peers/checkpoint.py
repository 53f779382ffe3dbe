"""The random checkpoint that every engine loads: Hugging Face's Mixtral layout, bfloat16, two layers."""

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from predict.model.config import MixtralConfig
from predict.model.weights import CONFIGS, DummyWeights, dummy_config, expected_tensors

NUM_HIDDEN_LAYERS = 2
SHARD_BYTES = 1 << 30
# "small" proves within seconds that a peer runs; its rates mean nothing. Rows are multiples of 256 (Q4_K's block).
SIZES: dict[str, dict[str, int]] = {
    "8x7b": {},
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
}


def sized_config(size: str) -> MixtralConfig:
    """Mixtral 8x7B with two layers and the changes of ``SIZES[size]``."""
    changes: dict[str, Any] = dict(SIZES[size])
    config = dummy_config("dummy:mixtral-8x7b", NUM_HIDDEN_LAYERS)
    if changes:
        changes["head_dim"] = changes["hidden_size"] // changes["num_attention_heads"]
    return replace(config, **changes)


def make_checkpoint(folder: Path, size: str) -> None:
    """Writes ``folder``, whole or not at all; peak memory is one tensor."""
    config = sized_config(size)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    raw = json.loads((CONFIGS / "mixtral-8x7b.json").read_text())
    raw |= {"num_hidden_layers": NUM_HIDDEN_LAYERS, **SIZES[size]}
    (partial / "config.json").write_text(json.dumps(raw, indent=2))
    _write_shards(partial, config)
    partial.rename(folder)


def active_weights(config: MixtralConfig) -> int:
    """Weights one token reads: attention, router, its chosen experts and lm_head; of the embedding a row, ignored."""
    total = 0
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2 and name != "model.embed_tokens.weight":
            size = math.prod(shape)
            total += size * config.num_experts_per_tok // config.num_local_experts if ".experts." in name else size
    return total


def _write_shards(folder: Path, config: MixtralConfig) -> None:
    weights = DummyWeights(config)
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in expected_tensors(config).items():
        size = 2 * math.prod(shape)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(names, file)
        _write_shard(folder / file, names, weights)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=1))


def _write_shard(file: Path, names: list[str], weights: DummyWeights) -> None:
    """The safetensors format by hand: its Python functions take all tensors of a file at once, and no bfloat16."""
    # transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape = weights.shapes[name]
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for name in names:
            out.write(weights.read(name)[0].data)
