"""Where a model comes from: a folder, a dummy of some configuration, or a remote name."""

import re
from dataclasses import dataclass
from pathlib import Path

from predict.model.config import ConfigError, MixtralConfig, why_not_on
from predict.model.weights import DEMO, DUMMY_PREFIX, DummyWeights, WeightSource, dummy_config, open_checkpoint

REMOTE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NEEDED = (
    f"needs a checkpoint folder, {DUMMY_PREFIX}mixtral-8x7b, or a remote name "
    "such as mistralai/Mixtral-8x7B-Instruct-v0.1"
)
DOWNLOADED = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A model found but not loaded; ``folder`` is None for a dummy."""

    name: str
    config: MixtralConfig
    folder: Path | None

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies: a dummy borrows the demo's, to turn text into tokens it can run on."""
        return self.folder or DEMO

    def weights(self) -> WeightSource:
        """The tensors, checked against the configuration."""
        return DummyWeights(self.config) if self.folder is None else open_checkpoint(self.folder, self.config)

    def dtype(self, asked: str | None, device: str) -> str:
        """The element type of activations: what was asked for; None: the checkpoint's.

        Raises:
            ConfigError: "cpu" or "gpu", whichever ``device`` is, has no kernels for it.
        """
        dtype = asked or self.config.dtype
        if reason := why_not_on(device, dtype):
            raise ConfigError(f"dtype {reason}" if asked else f"{self.name}: the checkpoint {reason}")
        return dtype


def find_model(name: str | Path, num_hidden_layers: int | None = None) -> ModelSource:
    """Finds a checkpoint folder, ``dummy:CONFIG``, or the remote model org/model (which is downloaded).

    Raises:
        ConfigError: nothing of that name, or no readable Mixtral config.json in it.
    """
    name = str(name)
    if not name:
        raise ConfigError(f"the model's name is empty; {NEEDED}")
    if name.startswith(DUMMY_PREFIX):
        return ModelSource(name, dummy_config(name, num_hidden_layers), None)
    if num_hidden_layers is not None:
        raise ConfigError(f"--num_hidden_layers is for dummy models ({DUMMY_PREFIX}...); {name} has the layers it has")
    folder = Path(name)
    if not folder.exists() and REMOTE_NAME.fullmatch(name):
        folder = _download(name)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{name} {found}; {NEEDED}")
    return ModelSource(name, MixtralConfig.read(folder / "config.json"), folder)


def _download(name: str) -> Path:
    """The snapshot of a remote model's configuration, tokenizer and safetensors files, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{name}: no such folder here, and the hub could not be reached or has no such model ({reason})"
        ) from error
