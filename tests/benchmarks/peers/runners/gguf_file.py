"""Hugging Face checkpoint -> GGUF, in llama.cpp's environment: ``python -m ... CHECKPOINT TARGET FORMAT THREADS``.

BF16 is written with the gguf package, tensor by tensor; other formats are what llama.cpp's own quantiser makes of that.
Beside TARGET, TARGET.json says how many bytes a token reads.
"""

import ctypes
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np


class Checkpoint:
    """Tensors of a bfloat16 safetensors folder as views of its files (NumPy has no bfloat16: uint16)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def read(self, name: str) -> np.ndarray:
        file = self.folder / self.files[name]
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entry = json.loads(opened.read(length))[name]
        return np.memmap(file, np.uint16, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))


def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, list[str], int, bool]]:
    """GGUF name, the tensors stacked in it, heads whose rows are reordered (0: none), whether it stays float32."""
    config = checkpoint.config
    yield "token_embd.weight", ["model.embed_tokens.weight"], 0, False
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        yield f"{block}.attn_norm.weight", [f"{layer}.input_layernorm.weight"], 0, True
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": 0}
        for part, reordered in heads.items():
            yield f"{block}.attn_{part}.weight", [f"{layer}.self_attn.{part}_proj.weight"], reordered, False
        yield f"{block}.attn_output.weight", [f"{layer}.self_attn.o_proj.weight"], 0, False
        yield f"{block}.ffn_norm.weight", [f"{layer}.post_attention_layernorm.weight"], 0, True
        yield f"{block}.ffn_gate_inp.weight", [f"{layer}.block_sparse_moe.gate.weight"], 0, True
        for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
            experts = [
                f"{layer}.block_sparse_moe.experts.{e}.{theirs}.weight" for e in range(config["num_local_experts"])
            ]
            yield f"{block}.ffn_{ours}_exps.weight", experts, 0, False
    yield "output_norm.weight", ["model.norm.weight"], 0, True
    yield "output.weight", ["lm_head.weight"], 0, False


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in llama.cpp's order: the two halves of a head, which rotate together, by turns."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def write_bf16(checkpoint: Checkpoint, target: Path) -> None:
    """Peak memory is the experts' share of one projection of one layer."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_tokenizer_model("none")  # only ids go in and come out
    for name, sources, _, whole in tensors(checkpoint):
        shape = checkpoint.read(sources[0]).shape
        shape = shape if len(sources) == 1 else (len(sources), *shape)
        kind = gguf.GGMLQuantizationType.F32 if whole else gguf.GGMLQuantizationType.BF16
        dtype = np.dtype(np.float32 if whole else np.uint16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, sources, heads, whole in tensors(checkpoint):
        parts = [checkpoint.read(source) for source in sources]
        array = parts[0] if len(parts) == 1 else np.stack(parts)
        if heads:
            array = interleaved(array, heads)
        if whole:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        writer.write_tensor_data(array)
    writer.close()


def quantize(source: Path, target: Path, weight_format: str, threads: int) -> None:
    """llama.cpp's own quantiser with its own choices for each tensor.

    Raises:
        RuntimeError: it reports an error, after printing which.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weight_format}")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama_model_quantize to {weight_format} returned {status}")


def active_bytes(file: Path, config: dict) -> int:
    """Bytes of weights one token reads: all but the embedding, of the experts those that are chosen."""
    total = 0
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name != "token_embd.weight":
            share = config["num_experts_per_tok"] / config["num_local_experts"] if "_exps" in tensor.name else 1
            total += int(int(tensor.n_bytes) * share)
    return total


def describe(partial: Path, target: Path, config: dict) -> None:
    """Moves a file that is whole to its place, with what a token reads of it."""
    Path(f"{target}.json").write_text(json.dumps({"active_bytes": active_bytes(partial, config)}))
    partial.replace(target)


def main() -> None:
    folder, target, weight_format, threads = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    checkpoint = Checkpoint(folder)
    source, partial = target.with_name("BF16.gguf"), target.with_suffix(".partial")
    if not source.exists():
        write_bf16(checkpoint, partial)
        describe(partial, source, checkpoint.config)
    if target != source:
        quantize(source, partial, weight_format, threads)
        describe(partial, target, checkpoint.config)


if __name__ == "__main__":
    main()
