"""The command line that exports: traces the step of a checkpoint and writes a self-describing folder.

python ./predict/export_model.py --model_name_or_path DIR --output_path ./inference --dtype bfloat16 --inference_model
"""

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

from export.program import save_program
from ops import library
from predict.arguments import PREDICTION_FLAGS, parser
from predict.artifact import MANIFEST, PROGRAM, Artifact, refuse_artifact, write_manifest
from predict.command import run_command
from predict.llm import DEFAULT_BLOCK_SIZE
from predict.model.config import ConfigError, positive
from predict.model.source import ModelSource, find_model
from predict.model.weights import load
from predict.parallel import Ranks, alone, barrier
from predict.weights_file import write_weights

# What a folder needs besides program and weights: everything the predictor reads of a checkpoint.
TOKENIZER_FILES = (
    *("tokenizer.model", "sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
# What an export may have left in its folder; pdiparams are of format version 1.
_AT_ROOT = (MANIFEST, f"{MANIFEST}.partial", *COPIED)
WRITTEN = re.compile(rf"rank_\d+(/{PROGRAM}\.(json|safetensors|pdiparams))?|{'|'.join(map(re.escape, _AT_ROOT))}")


def export_model(
    model: str,
    output_path: str | Path,
    *,
    dtype: str | None = None,
    quant_type: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_hidden_layers: int | None = None,
    ranks: Ranks | None = None,
) -> Artifact:
    """Exports a checkpoint; every rank calls it and writes its own rank_N folder, rank 0 the files at the root.

    Raises:
        ValueError: (and its subclasses) anything that does not fit; an output folder that holds something else.
    """
    ranks = ranks or alone()
    folder, first = Path(output_path), ranks.rank == 0
    positive("block_size", block_size)
    refuse_artifact(model)
    source = find_model(model, num_hidden_layers)
    dtype = dtype or _own_dtype(source)
    weights = source.weights()
    if first:
        _check_output(folder)
    network = load(source.config, weights, dtype, quant_type, ranks.rank, ranks.world_size)
    if first:
        _clear(folder)
    barrier()
    program = folder / f"rank_{ranks.rank}" / PROGRAM
    program.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if first:
        print(
            f"exporting: tracing {source.config.num_hidden_layers} layers and writing {program.parent}", file=sys.stderr
        )
    save_program(network, program, block_size)
    write_weights(program.with_suffix(".safetensors"), dict(network.named_buffers()), first)
    barrier()
    if first:
        print(f"exporting: written in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        for name in COPIED if source.folder is not None else TOKENIZER_FILES:
            if (source.tokenizer_folder / name).exists():
                shutil.copyfile(source.tokenizer_folder / name, folder / name)
        write_manifest(folder, source.config, dtype, quant_type, ranks.world_size, block_size)
    barrier()
    return Artifact.open(folder)


def _own_dtype(source: ModelSource) -> str:
    """The checkpoint's; but an export that not every device runs is asked for by name."""
    if source.config.dtype == "float16":
        raise ConfigError(
            f"{source.name}: the checkpoint is float16, which runs on GPUs only; use --dtype float16 for them, or "
            "--dtype bfloat16 or float32"
        )
    return source.config.dtype


def _check_output(folder: Path) -> None:
    """Makes the folder; refuses one that holds anything but an older export, finished or not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if folder.exists() else error.strerror
        raise ConfigError(f"--output_path {folder} cannot be made ({reason}); give another folder") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output_path {folder} is not writable for this user; give another folder")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    foreign = [n for n in names if not WRITTEN.fullmatch(n)]
    if not foreign and not any(n.startswith("rank_") for n in names):
        foreign = names  # a tokenizer's folder, say
    if foreign:
        raise ConfigError(
            f"--output_path {folder} holds {foreign[0]}, which no export wrote; give an empty or new folder"
        )


def _clear(folder: Path) -> None:
    """Empties a checked folder: an older export goes, its manifest first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def export(args: argparse.Namespace, ranks: Ranks) -> None:
    """Runs the exporter on this rank."""
    if args.device == "gpu":
        raise ValueError("--device gpu: an export is the same for every device; leave --device out")
    for flag in PREDICTION_FLAGS:
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} is for predicting, an export does not depend on it; give it to predictor.py")
    if args.mode == "static":
        raise ValueError("--mode static: the exporter reads a checkpoint, which is dynamic; leave --mode out")
    if args.threads is not None or ranks.local_threads:
        library.set_num_threads(args.threads or ranks.local_threads)
    artifact = export_model(
        args.model_name_or_path,
        args.output_path or "./inference",
        dtype=args.dtype,
        quant_type=args.quant_type,
        block_size=DEFAULT_BLOCK_SIZE if args.block_size is None else args.block_size,
        num_hidden_layers=args.num_hidden_layers,
        ranks=ranks,
    )
    if ranks.rank == 0:
        size = sum(entry["bytes"] for entry in artifact.files.values())
        print(f"{artifact.folder}: {' '.join(filter(None, (artifact.dtype, artifact.quant_type)))}, ", end="")
        print(f"{artifact.world_size} rank(s), {size / 1e6:.1f} MB; run it with predictor.py --mode static")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser("export_model.py", "Exports a Mixtral checkpoint to a static program.").parse_args(argv)
    return run_command(lambda ranks: export(args, ranks))


if __name__ == "__main__":
    sys.exit(main())
