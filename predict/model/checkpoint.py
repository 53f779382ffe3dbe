"""A Hugging Face checkpoint folder read tensor by tensor: headers checked first, none copied, nothing unpickled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from predict.model.config import ConfigError, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The element types a Mixtral checkpoint may use: safetensors' name, ours, and what NumPy (without bfloat16) reads.
ELEMENT_TYPES: dict[str, tuple[str, np.dtype]] = {
    "F32": ("float32", np.dtype(np.float32)),
    "BF16": ("bfloat16", np.dtype(np.uint16)),
    "F16": ("float16", np.dtype(np.float16)),
}
PROBLEMS_SHOWN = 10


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not the model its config.json describes."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file, byte offset, safetensors dtype name, shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder holding model.safetensors, or shards with model.safetensors.index.json.

    Opening reads and checks headers only. ``read`` maps one tensor's bytes; slicing that reads those pages alone.

    Raises:
        CheckpointError: no safetensors files, a bad index, a truncated or damaged file; names the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.entries: dict[str, TensorEntry] = {}
        for file, promised in self._files().items():
            found = read_header(file)
            missing = sorted(promised - found.keys())
            if missing:
                raise CheckpointError(f"{file}: tensor {missing[0]} is not in it, though {self.folder / INDEX} says so")
            for name, entry in found.items():
                if name in self.entries:
                    raise CheckpointError(f"{file}: tensor {name} is also in {self.entries[name].file}")
                self.entries[name] = entry

    def _files(self) -> dict[Path, set[str]]:
        """Every file of the checkpoint, and the tensors the index promises in it."""
        index = self.folder / INDEX
        if not index.exists():
            if (self.folder / SINGLE).exists():
                return {self.folder / SINGLE: set()}
            pickles = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(
                p.name for p in self.folder.glob("*.pth")
            )
            if pickles:
                raise CheckpointError(
                    f"{self.folder}: only pickled weights ({pickles[0]}), which are never read here; "
                    "save the model with transformers' save_pretrained(..., safe_serialization=True)"
                )
            raise CheckpointError(
                f"{self.folder}: no {SINGLE} and no {INDEX}; needs a checkpoint in safetensors format"
            )
        try:
            weight_map = read_json(index, "a safetensors index").get("weight_map")
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is missing or empty, needs tensor names with their files")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{index}: tensor {name} is in {file!r}, needs the name of a file in the same folder"
                )
            files.setdefault(self.folder / file, set()).add(name)
        for file, names in files.items():
            if not file.exists():
                raise CheckpointError(f"{file}: no such file, though {INDEX} promises {len(names)} tensors in it")
        return files

    def check(self, expected: Mapping[str, tuple[int, ...]], unused: frozenset[str] = frozenset()) -> None:
        """Refuses the checkpoint unless it holds exactly the expected tensors, with their shapes, in a float type.

        Args:
            expected: name and shape of every tensor needed.
            unused: names that may be there without being needed.

        Raises:
            CheckpointError: one error that lists what is missing, extra, of another shape or of another dtype.
        """
        problems = [
            f"{self.folder}: tensor {n} {list(s)} is missing" for n, s in expected.items() if n not in self.entries
        ]
        for name, entry in self.entries.items():
            if name not in expected:
                if name not in unused:
                    problems.append(f"{entry.file}: tensor {name} {list(entry.shape)} does not belong to this model")
            elif entry.shape != expected[name]:
                problems.append(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, "
                    f"needs {list(expected[name])} (config.json)"
                )
            elif entry.dtype not in ELEMENT_TYPES:
                problems.append(
                    f"{entry.file}: tensor {name} is {entry.dtype}, needs one of {', '.join(ELEMENT_TYPES)}"
                )
        if problems:
            more = [f"... and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
            raise CheckpointError("\n".join(problems[:PROBLEMS_SHOWN] + more))

    def read(self, name: str) -> tuple[np.ndarray, str]:
        """The tensor ``name``, mapped read-only (bfloat16 as uint16), and its dtype's name."""
        entry = self.entries[name]
        dtype, numpy_dtype = ELEMENT_TYPES[entry.dtype]
        return np.memmap(entry.file, numpy_dtype, "r", entry.offset, entry.shape), dtype


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Name and place of every tensor of a safetensors file.

    Raises:
        CheckpointError: the file is no such file, or is damaged or truncated.
    """
    try:
        # safetensors refuses a truncated, overlapping or oversized header; NumPy then needs the offsets it hides.
        with safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged or truncated safetensors file ({error}); copy it again") from error
    header.pop("__metadata__", None)
    return {
        name: TensorEntry(file, 8 + length + tensor["data_offsets"][0], tensor["dtype"], tuple(tensor["shape"]))
        for name, tensor in header.items()
    }
