"""Our logits and greedy tokens against Hugging Face transformers', as tests/golden/make_golden.py recorded them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.logits import all_logits, greedy

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "golden").glob("*/golden.safetensors"))
assert FOLDERS, "tests/golden holds no golden.safetensors; restore it or run tests/golden/make_golden.py"

# Both sides sum in float32, in different orders, and the logits stay below 6: honest differences are a few 1e-6,
# while a wrong rotation, mask, norm or expert moves them by 1e-2 and more.
TOLERANCE = 1e-4


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_equal_golden(folder):
    golden = load_file(folder / "golden.safetensors")
    logits = all_logits(folder, golden["prompts"].tolist())
    np.testing.assert_allclose(np.stack(logits), golden["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_greedy_tokens_equal_golden(folder):
    golden = load_file(folder / "golden.safetensors")
    continuations = golden["continuations"]
    assert greedy(folder, golden["prompts"].tolist(), continuations.shape[1]) == continuations.tolist()
