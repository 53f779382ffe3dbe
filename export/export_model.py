"""The command line that exports: traces the step of a checkpoint and writes a self-describing folder.

python ./predict/export_model.py --model_name_or_path DIR --output_path ./inference --dtype bfloat16 --inference_model
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from export.program import save_program
from ops import library
from predict.arguments import PREDICTION_FLAGS, check_device, parser
from predict.artifact import MANIFEST, Artifact, write_manifest
from predict.command import run_command
from predict.llm import DEFAULT_BLOCK_SIZE
from predict.model.config import ConfigError
from predict.model.source import find_model
from predict.model.weights import load
from predict.parallel import Ranks, barrier

# What a folder needs besides program and weights: everything the predictor reads of a checkpoint.
MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    *("tokenizer.model", "sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)


def export_model(
    model: str,
    output_path: str | Path,
    *,
    dtype: str | None = None,
    quant_type: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_hidden_layers: int | None = None,
    ranks: Ranks,
) -> Artifact:
    """Exports a checkpoint; every rank calls it and writes its own rank_N folder, rank 0 the files at the root.

    Raises:
        ValueError: (and its subclasses) anything that does not fit; an output folder that holds something else.
    """
    folder, first = Path(output_path), ranks.rank == 0
    source = find_model(model, num_hidden_layers)
    dtype = dtype or source.default_dtype()
    weights = source.weights()
    if first:
        _clear(folder)
    barrier()
    network = load(source.config, weights, dtype, quant_type, ranks.rank, ranks.world_size)
    program = folder / f"rank_{ranks.rank}" / "model"
    program.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if first:
        print(
            f"exporting: tracing {source.config.num_hidden_layers} layers and writing {program.parent}", file=sys.stderr
        )
    save_program(network, program, block_size)
    barrier()
    if first:
        print(f"exporting: written in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        copied = [(source.tokenizer_folder, TOKENIZER_FILES)] + [
            (f, MODEL_FILES) for f in [source.folder] if f is not None
        ]
        for origin, names in copied:
            for name in names:
                if (origin / name).exists():
                    shutil.copyfile(origin / name, folder / name)
        write_manifest(folder, source.config, dtype, quant_type, ranks.world_size, block_size)
    barrier()
    return Artifact.open(folder)


def _clear(folder: Path) -> None:
    """An empty folder to export to; an older export goes, its manifest first; anything else stays and is an error."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_path {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    names = {p.name for p in folder.iterdir()}
    foreign = sorted(
        n
        for n in names
        if n not in {MANIFEST, f"{MANIFEST}.partial", *MODEL_FILES, *TOKENIZER_FILES} and not n.startswith("rank_")
    )
    if foreign or (names and not any(n.startswith("rank_") for n in names)):
        raise ConfigError(
            f"--output_path {folder} holds {(foreign or sorted(names))[0]}, which no export wrote; "
            "give an empty or new folder"
        )
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def export(args: argparse.Namespace, ranks: Ranks) -> None:
    """Runs the exporter on this rank."""
    check_device(args)
    for flag in PREDICTION_FLAGS:
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag} is decided when predicting: an exported program takes any; give it to predictor.py"
            )
    if args.mode == "static":
        raise ValueError("--mode static: the exporter reads a checkpoint, which is dynamic; leave --mode out")
    if args.threads is not None or ranks.local_threads:
        library.set_num_threads(args.threads or ranks.local_threads)
    artifact = export_model(
        args.model_name_or_path,
        args.output_path or "./inference",
        dtype=args.dtype,
        quant_type=args.quant_type,
        block_size=args.block_size or DEFAULT_BLOCK_SIZE,
        num_hidden_layers=args.num_hidden_layers,
        ranks=ranks,
    )
    if ranks.rank == 0:
        size = sum(entry["bytes"] for entry in artifact.files.values())
        print(f"{artifact.folder}: {artifact.dtype}{' weight_only_int8' if artifact.quant_type else ''}, ", end="")
        print(f"{artifact.world_size} rank(s), {size / 1e6:.1f} MB; run it with predictor.py --mode static")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser("export_model.py", "Exports a Mixtral checkpoint to a static program.").parse_args(argv)
    return run_command(lambda ranks: export(args, ranks))


if __name__ == "__main__":
    sys.exit(main())
