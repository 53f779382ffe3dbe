"""Models shared by the suite: the demo checkpoint, exported once per kind and session."""

import functools
from pathlib import Path

import pytest

from export.export_model import export_model
from predict.model.weights import DEMO


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo checkpoint."""
    return DEMO


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """exported(dtype, quant_type) -> the folder of the demo checkpoint exported so, made at its first use."""

    @functools.cache
    def export(dtype: str, quant_type: str | None) -> Path:
        folder = tmp_path_factory.mktemp(f"{dtype}-{quant_type}") / "inference"
        export_model(str(DEMO), folder, dtype=dtype, quant_type=quant_type)
        return folder

    return export
