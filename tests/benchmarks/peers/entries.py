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


def _ours(weight_format: str, bytes_per_weight: float) -> Entry:
    return Entry(
        key=f"ours-{weight_format}",
        title=f"paddle-mixtral {weight_format}",
        runner="ours",
        environment=None,
        weight_format=weight_format,
        model=f"ours-{weight_format}",
        converter="ours_export",
        bytes_per_weight=bytes_per_weight,
    )


# In the order they run.
ENTRIES = {
    entry.key: entry
    for entry in (
        _ours("int8", 1.0),
        Entry(
            key="vllm",
            title="vLLM CPU bf16",
            runner="vllm_cpu",
            environment="vllm",
            weight_format="bf16",
            bytes_per_weight=2.0,
        ),
        _llama("Q8_0"),
        _llama("Q4_K_M"),
        _ours("bf16", 2.0),
        Entry(
            key="openvino",
            title="OpenVINO GenAI int8",
            runner="openvino_cb",
            environment="openvino",
            weight_format="int8",
            model="openvino-int8",
            converter="openvino_export",
            bytes_per_weight=1.0,
        ),
        Entry(
            key="transformers",
            title="transformers bf16",
            runner="hf",
            environment="transformers",
            weight_format="bf16",
            bytes_per_weight=2.0,
        ),
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
    converter = [entry.python(root), "-m", f"{process.RUNNERS}.{entry.converter}"]
    command = [*converter, str(models / CHECKPOINT), str(target), entry.weight_format, str(threads)]
    log = root / "logs" / f"convert-{entry.model}.log"
    process.run(command, log, PREPARE_TIMEOUT_S, process.offline(threads))


def active_bytes(entry: Entry, models: Path, config: MixtralConfig) -> int:
    """Bytes of weights one token reads at batch 1 (the scales of int8 rows and the KV cache are under 1 % of it)."""
    if entry.bytes_per_weight is None:
        return json.loads((models / f"{entry.model}.json").read_text())["active_bytes"]
    return int(active_weights(config) * entry.bytes_per_weight)
