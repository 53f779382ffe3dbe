"""What pip is told to install beside the package."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def requirements(tmp_path: Path, site: Path) -> list[str]:
    """The package's dependencies as setup.py states them where ``site`` is on the path."""
    out = tmp_path / "metadata"
    out.mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(out)]
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)
    return (out / "paddle_mixtral.egg-info" / "requires.txt").read_text().split("[")[0].split()


def test_paddlepaddle_is_required(tmp_path):
    assert "paddlepaddle==3.3.1" in requirements(tmp_path, tmp_path)


def test_an_installed_paddlepaddle_gpu_is_left_as_it_is(tmp_path):
    metadata = tmp_path / "paddlepaddle_gpu-3.3.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: paddlepaddle-gpu\nVersion: 3.3.1\n")
    found = requirements(tmp_path, tmp_path)
    assert "sentencepiece>=0.2" in found
    assert not [name for name in found if name.startswith("paddlepaddle")]
