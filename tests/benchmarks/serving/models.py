"""The model under measurement, as a dynamic graph and as a static program, each loaded when it is first asked for."""

import argparse
from functools import cached_property
from pathlib import Path
from typing import Any

from export.export_model import export_model
from predict.artifact import Artifact
from predict.llm import LLM


class Models:
    """Opens a checkpoint, or an exported folder.

    Args:
        args: the flags of __main__.
        folder: an empty folder; a checkpoint whose static program is asked for is exported there.

    Raises:
        ValueError: --mode dynamic for an exported folder, which has no dynamic graph; --verify for a checkpoint.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self._args, self._folder = args, folder
        self.exported = Artifact.is_artifact(args.model)
        if self.exported and args.mode == "dynamic":
            raise ValueError(f"{args.model} is an exported folder, which runs as --mode static; leave --mode out")
        if args.verify and not self.exported:
            raise ValueError("--verify is for exported folders; leave it out")

    @property
    def chosen(self) -> LLM:
        """In the mode of --mode; by default, what the model is."""
        return self.static if self.exported or self._args.mode == "static" else self.dynamic

    @cached_property
    def dynamic(self) -> LLM:
        """A checkpoint's dynamic graph."""
        return self._open(self._args.model, self._options)

    @cached_property
    def static(self) -> LLM:
        """The static program."""
        if self.exported:
            return self._open(self._args.model, self._options | {"verify": bool(self._args.verify)})
        export_model(self._args.model, self._folder, **self._options)
        return self._open(str(self._folder), {})

    @property
    def server_flags(self) -> list[str]:
        """What makes a server run the same model in the same way as ``chosen``."""
        from_folder = self.chosen.runner.mode == "static" and not self.exported
        options = {} if from_folder else self._options
        engine = {"max_num_seqs": self._args.max_num_seqs, "threads": self._args.threads}
        flags = [f"--{name}={value}" for name, value in (options | engine).items() if value is not None]
        return [str(self._folder) if from_folder else self._args.model, *flags]

    @property
    def _options(self) -> dict[str, Any]:
        names = ("dtype", "quant_type", "block_size", "num_hidden_layers")
        return {name: value for name in names if (value := getattr(self._args, name)) is not None}

    def _open(self, model: str, options: dict[str, Any]) -> LLM:
        return LLM(model, max_num_seqs=self._args.max_num_seqs, threads=self._args.threads, **options)
