"""What is compared: an engine with a weight format, the environment it runs in and the files it loads."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from predict.model.config import MixtralConfig
from tests.benchmarks.peers import process
from tests.benchmarks.peers.checkpoint import active_weights
from tests.benchmarks.peers.environments import ENVIRONMENTS, python_of, variables

CHECKPOINT = "checkpoint"
PREPARE_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        key: its name on the command line.
        runner: module of runners/ that measures it.
        environment: a name of ENVIRONMENTS; None: this project's own interpreter.
        model: file or folder beside the checkpoint that it loads.
        converter: module of runners/ that makes ``model`` of the checkpoint; None: it loads the checkpoint itself.
        bytes_per_weight: None where formats are mixed; the converter then says how much a token reads.
    """

    key: str
    title: str
    runner: str
    environment: str | None
    weight_format: str
    model: str = CHECKPOINT
    converter: str | None = None
    bytes_per_weight: float | None = None

    @property
    def ours(self) -> bool:
        return self.environment is None

    def python(self, root: Path) -> str:
        """Its interpreter, where environments are in ``root``."""
        return sys.executable if self.environment is None else str(python_of(ENVIRONMENTS[self.environment], root))

    def variables(self, root: Path) -> dict[str, str]:
        """Environment variables it runs with, besides those all engines get."""
        return {} if self.environment is None else variables(ENVIRONMENTS[self.environment], root)


def _llama(weight_format: str) -> Entry:
    return Entry(
        key=f"llama-{weight_format}",
        title=f"llama.cpp {weight_format}",
        runner="llama",
        environment="llama",
        weight_format=weight_format,
        model=f"{weight_format}.gguf",
        converter="gguf_file",
    )


# In the order they run.
ENTRIES = {
    entry.key: entry
    for entry in (
        Entry("ours-int8", "paddle-mixtral int8", "ours", None, "int8", "ours-int8", "ours_export", 1.0),
        Entry("vllm", "vLLM CPU bf16", "vllm_cpu", "vllm", "bf16", bytes_per_weight=2.0),
        _llama("Q8_0"),
        _llama("Q4_K_M"),
        Entry("ours-bf16", "paddle-mixtral bf16", "ours", None, "bf16", "ours-bf16", "ours_export", 2.0),
        Entry(
            "openvino",
            "OpenVINO GenAI int8",
            "openvino_cb",
            "openvino",
            "int8",
            "openvino-int8",
            "openvino_export",
            1.0,
        ),
        Entry("transformers", "transformers bf16", "hf", "transformers", "bf16", bytes_per_weight=2.0),
        _llama("BF16"),
    )
}


def is_ready(entry: Entry, models: Path) -> bool:
    """Whether what ``entry`` loads need not be made: never so for this project, whose exporter is being worked on."""
    return entry.converter is None or ((models / entry.model).exists() and not entry.ours)


def convert(entry: Entry, root: Path, models: Path, threads: int) -> None:
    """Makes what ``entry`` loads out of ``models/checkpoint``, in place of what is there.

    Raises:
        ProcessFailed: the converter failed; says why.
    """
    target = models / entry.model
    if target.is_dir():
        shutil.rmtree(target)
    module = f"{process.RUNNERS}.{entry.converter}"
    command = [
        entry.python(root),
        "-m",
        module,
        str(models / CHECKPOINT),
        str(target),
        entry.weight_format,
        str(threads),
    ]
    log = root / "logs" / f"convert-{entry.model}.log"
    process.run(command, log, PREPARE_TIMEOUT_S, process.offline(threads))


def active_bytes(entry: Entry, models: Path, config: MixtralConfig) -> int:
    """Bytes of weights one token reads at batch 1 (the scales of int8 rows and the KV cache are under 1 % of it)."""
    if entry.bytes_per_weight is None:
        return json.loads((models / f"{entry.model}.json").read_text())["active_bytes"]
    return int(active_weights(config) * entry.bytes_per_weight)
