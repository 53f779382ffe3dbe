"""The exported folder: what is in it, and the manifest by which it explains itself.

manifest.json                     written last: a folder without it is an export that did not finish
config.json, tokenizer.model, ... copied from the checkpoint
rank_0/model.json, model.safetensors  the program of each rank, and the weights it takes
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle

from ops.library import ABI_VERSION
from ops.quantize import INT8_LAYOUT, SIXTEEN_BIT_LAYOUT
from predict.model.config import DTYPES, ConfigError, MixtralConfig, positive, read_json, why_not_on
from predict.model.mixtral import QUANT_TYPES
from predict.progress import progress

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
PROGRAM = "model"
HASH_CHUNK = 1 << 22


class ArtifactError(ValueError):
    """An exported folder that is incomplete, changed, or not what was asked for."""


def weight_layout(dtype: str | None, quant_type: str | None) -> str:
    """How the matrices of an exported model lie in its files and in memory: as the kernels multiply with them."""
    if quant_type is not None:
        return INT8_LAYOUT
    return "row_major" if dtype == "float32" else SIXTEEN_BIT_LAYOUT


def refuse_artifact(model: str | Path) -> None:
    """Refuses an exported folder where a checkpoint is needed.

    Raises:
        ArtifactError: it is one.
    """
    if Artifact.is_artifact(model):
        raise ArtifactError(
            f"{model} is an exported model, which holds no checkpoint; give the checkpoint, "
            "or predict with --mode static"
        )


@dataclass(frozen=True)
class Artifact:
    """An exported folder whose manifest has been read and whose files have the sizes it states."""

    folder: Path
    config: MixtralConfig
    dtype: str
    quant_type: str | None
    world_size: int
    block_size: int
    files: dict[str, dict[str, Any]]

    @staticmethod
    def is_artifact(folder: str | Path) -> bool:
        return (Path(folder) / MANIFEST).exists()

    @staticmethod
    def open(folder: str | Path) -> "Artifact":
        """Reads and checks the manifest.

        Raises:
            ArtifactError: not an artefact, another format, operator ABI or Paddle than this one, or a file missing or
                of another size.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            found = f"no {MANIFEST}, so this is no exported model or its export did not finish"
            raise ArtifactError(
                f"{folder}: {found if folder.is_dir() else 'no such folder'}; make one with "
                "export_model.py --model_name_or_path CHECKPOINT --output_path DIR, or use --mode dynamic"
            )
        try:
            manifest = read_json(folder / MANIFEST, "the manifest of an exported model")
        except ConfigError as error:
            raise ArtifactError(f"{error}; export the model again") from error
        wanted = {
            "format_version": FORMAT_VERSION,
            "ops_abi_version": ABI_VERSION,
            "weight_layout": weight_layout(manifest.get("dtype"), manifest.get("quant_type")),
        }
        for key, needed in wanted.items():
            if manifest.get(key) != needed:
                raise ArtifactError(
                    f"{folder}: exported with {key} {manifest.get(key)!r}, this version needs {needed!r}; "
                    "export it again"
                )
        if _minor(manifest.get("paddle_version")) != _minor(paddle.__version__):
            raise ArtifactError(
                f"{folder}: exported with Paddle {manifest.get('paddle_version')}, this is {paddle.__version__}; "
                "export it again, or install that Paddle"
            )
        try:
            artifact = Artifact._from_manifest(folder, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise ArtifactError(f"{folder / MANIFEST}: damaged manifest ({reason}); export the model again") from error
        artifact._check_sizes()
        return artifact

    @staticmethod
    def _from_manifest(folder: Path, manifest: dict[str, Any]) -> "Artifact":
        """The manifest's values, checked one by one: whatever fails is a damaged manifest."""
        for key, allowed in {"dtype": DTYPES, "quant_type": (None, *QUANT_TYPES)}.items():
            if manifest[key] not in allowed:
                raise ConfigError(f"{key} is {manifest[key]!r}, needs one of {allowed}")
        files = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
        artifact = Artifact(
            folder,
            MixtralConfig.from_dict({**manifest["config"], "model_type": "mixtral"}, "config"),
            manifest["dtype"],
            manifest["quant_type"],
            positive("world_size", manifest["world_size"]),
            positive("block_size", manifest["block_size"]),
            files,
        )
        for rank in range(artifact.world_size):
            for suffix in ("json", "safetensors"):
                if (name := f"rank_{rank}/{PROGRAM}.{suffix}") not in files:
                    raise ConfigError(f"{name} is not among its files")
        return artifact

    def _check_sizes(self) -> None:
        for name, entry in self.files.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ArtifactError(f"{path}: {found}, the manifest says {entry['bytes']}; copy or export it again")

    def require(
        self,
        dtype: str | None,
        quant_type: str | None,
        world_size: int,
        block_size: int | None,
        device: str = "cpu",
    ) -> None:
        """Refuses an artefact that is not what was asked for (None asks for nothing: a flag left out), or that "cpu" or
        "gpu", whichever ``device`` is, cannot run.

        Raises:
            ArtifactError: says what the artefact is, what was asked, and what to do.
        """
        asked = {"dtype": dtype, "quant_type": quant_type, "block_size": block_size}
        for name, value in asked.items():
            found = getattr(self, name)
            if value is not None and value != found:
                remedy = f"use --{name} {found}" if found is not None else f"leave --{name} out"
                raise ArtifactError(
                    f"{self.folder}: exported with {name} {found}, asked for {value}; {remedy}, or export it again"
                )
        if world_size != self.world_size:
            start = (
                f"--nproc_per_node {self.world_size}"
                if self.world_size > 1
                else "a single process, without the launcher"
            )
            raise ArtifactError(
                f"{self.folder}: exported for {self.world_size} ranks, running on {world_size}; start it with {start}, "
                f"or export it again on {world_size}"
            )
        if reason := why_not_on(device, self.dtype, "export it again with"):
            raise ArtifactError(f"{self.folder}: the export {reason}")

    def verify(self, show: bool = True) -> None:
        """Hashes every file.

        Raises:
            ArtifactError: a file's bytes are not those that were exported.
        """
        with progress("verifying", sum(e["bytes"] for e in self.files.values()), "B", show) as bar:
            for name, entry in self.files.items():
                if sha256(self.folder / name, bar) != entry["sha256"]:
                    raise ArtifactError(
                        f"{self.folder / name}: its bytes have changed since the export; export it again"
                    )

    def program(self, rank: int) -> Path:
        """Path of a rank's program and weights, without their suffixes."""
        return self.folder / f"rank_{rank}" / PROGRAM


def write_manifest(
    folder: Path,
    config: MixtralConfig,
    dtype: str,
    quant_type: str | None,
    world_size: int,
    block_size: int,
) -> None:
    """Writes manifest.json over every file the folder holds; nothing may be written to the folder afterwards."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    with progress("hashing", sum(p.stat().st_size for p in paths), "B") as bar:
        files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p, bar)} for p in paths}
    manifest = {
        "format_version": FORMAT_VERSION,
        "paddle_version": paddle.__version__,
        "ops_abi_version": ABI_VERSION,
        "dtype": dtype,
        "quant_type": quant_type,
        "weight_layout": weight_layout(dtype, quant_type),
        "world_size": world_size,
        "block_size": block_size,
        "config": dataclasses.asdict(config),
        "files": files,
    }
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / MANIFEST)


def sha256(path: Path, bar: Any) -> str:
    """Hexadecimal SHA-256 of a file; ``bar`` sees the bytes go by."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(HASH_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _minor(version: Any) -> list[str]:
    return str(version).split(".")[:2]
