"""The weights of an exported program: what is written is what is read, mapped or copied, within the memory it needs."""

import gc
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open

from predict import weights_file
from predict.artifact import ArtifactError
from predict.model.checkpoint import CheckpointError
from predict.model.weights import host_view
from predict.weights_file import PAGE, read_weights, write_weights

MAPPED, COPIED = 0.0, 2.0  # shares of huge pages that any mapping has, and that none has
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def weights() -> dict[str, paddle.Tensor]:
    paddle.seed(0)
    return {
        "layers.0.w13_scale": paddle.randn([7]),
        "layers.0.w13": paddle.randint(0, 256, [3, 64, 4096]).astype("uint8"),
        "embed_tokens": paddle.randn([1000, 33]).astype("bfloat16"),
        "lm_head.weight": paddle.randint(0, 256, [5, 3]).astype("uint8"),
        "layers.1.w13": paddle.randn([3, 7]).astype("float16"),
    }


@pytest.fixture
def path(tmp_path, weights) -> Path:
    write_weights(tmp_path / "model.safetensors", weights, show=False)
    return tmp_path / "model.safetensors"


def kinds(weights):
    return {name: (str(w.dtype).removeprefix("paddle."), tuple(w.shape)) for name, w in weights.items()}


@pytest.mark.parametrize("share", [MAPPED, COPIED])
def test_what_is_written_is_read(path, weights, share, monkeypatch):
    monkeypatch.setattr(weights_file, "HUGE_SHARE", share)
    found = read_weights(path, kinds(weights), show=False)
    assert kinds(found) == kinds(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(host_view(found[name]), host_view(weight), err_msg=name)


@pytest.mark.parametrize("share", [MAPPED, COPIED])
def test_a_tensor_outlives_the_others_and_the_file(path, weights, share, monkeypatch):
    monkeypatch.setattr(weights_file, "HUGE_SHARE", share)
    one = read_weights(path, kinds(weights), show=False)["embed_tokens"]
    path.unlink()
    gc.collect()
    np.testing.assert_array_equal(host_view(one), host_view(weights["embed_tokens"]))


@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (5, 14),
    reason="Linux before 5.14 has no MADV_POPULATE_READ, so files are never mapped there",
)
def test_a_mapping_shares_the_file_and_a_copy_does_not(path, weights, monkeypatch):
    for share, shared in ((MAPPED, True), (COPIED, False)):
        monkeypatch.setattr(weights_file, "HUGE_SHARE", share)
        found = read_weights(path, kinds(weights), show=False)
        address = found["layers.0.w13"].data_ptr()
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        [area] = [m for m in maps if int(m[0].split("-")[0], 16) <= address < int(m[0].split("-")[1], 16)]
        assert (area[-1] == str(path)) == shared


def huge_kilobytes() -> int:
    return int(re.search(r"FilePmdMapped: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])


@pytest.mark.parametrize("pays", [True, False])
def test_a_file_cached_in_small_pages_is_read_again_in_huge_ones_if_that_pays(tmp_path, pays, monkeypatch):
    weights = {"w": paddle.randint(0, 256, [64 << 20]).astype("uint8")}
    written, copied = tmp_path / "written.safetensors", tmp_path / "copied.safetensors"
    write_weights(written, weights, show=False)
    found = read_weights(written, kinds(weights), show=False)
    if huge_kilobytes() < 60 << 10:
        pytest.skip("this system does not cache files in huge pages")
    del found
    with open(written, "rb", buffering=0) as source, open(copied, "wb", buffering=0) as target:
        while piece := source.read(64 << 10):
            target.write(piece)
        os.fsync(target.fileno())
    # A disk is faster than nothing, and slower than anything can be.
    monkeypatch.setattr(weights_file, "READING_AGAIN_PAYS", 0.0 if pays else math.inf)
    found = read_weights(copied, kinds(weights), show=False)
    np.testing.assert_array_equal(host_view(found["w"]), host_view(weights["w"]))
    assert (huge_kilobytes() >= 60 << 10) == pays


def test_anyone_can_read_the_file(path, weights):
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == set(weights)
        np.testing.assert_array_equal(file.get_tensor("layers.0.w13"), weights["layers.0.w13"].numpy())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % PAGE == 0
    offsets = {name: entry.offset for name, entry in weights_file.read_header(path).items()}
    # Sizes that are multiples of 786,432, 16, 4, 2 and 1 bytes, in this order.
    assert list(offsets) == ["layers.0.w13", "embed_tokens", "layers.0.w13_scale", "layers.1.w13", "lm_head.weight"]
    assert offsets["layers.0.w13"] % PAGE == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.w13": ("uint8", (3, 64, 64))}, "holds U8 [3, 64, 4096] for layers.0.w13, the program beside it "),
        ({"embed_tokens": ("float32", (1000, 33))}, "holds BF16 [1000, 33] for embed_tokens, "),
        ({"norm": ("float32", (33,))}, "holds nothing for norm, the program beside it needs F32 [33]"),
        ({"lm_head.weight": None}, "holds U8 [5, 3] for lm_head.weight, the program beside it needs nothing"),
    ],
)
def test_weights_of_another_program_are_refused(path, weights, changes, message):
    needed = {name: kind for name, kind in {**kinds(weights), **changes}.items() if kind is not None}
    with pytest.raises(ArtifactError, match=re.escape(message)) as caught:
        read_weights(path, needed, show=False)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("the two are not of one export; export it again")


def test_a_truncated_file_is_refused(path, weights):
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="damaged or truncated safetensors file"):
        read_weights(path, kinds(weights), show=False)


def test_a_file_that_shrinks_while_it_is_copied_is_refused(path, weights, monkeypatch):
    monkeypatch.setattr(weights_file, "HUGE_SHARE", COPIED)
    header, size = weights_file.read_header(path), path.stat().st_size

    def then_shrinks(file):
        os.truncate(file, size - 1)
        return header

    monkeypatch.setattr(weights_file, "read_header", then_shrinks)
    with pytest.raises(ArtifactError, match=f"ends at byte {size - 1} while being read; copy or export it again"):
        read_weights(path, kinds(weights), show=False)


MEMORY = """
import re, sys
from pathlib import Path
from predict import weights_file
weights_file.HUGE_SHARE = float(sys.argv[2])

def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kilobytes("VmRSS")
weights = weights_file.read_weights(Path(sys.argv[1]), {f"w{i}": ("uint8", (16 << 20,)) for i in range(4)}, show=False)
print(kilobytes("VmHWM") - before, kilobytes("VmRSS") - before)
"""


@pytest.mark.parametrize("share", [MAPPED, COPIED])
def test_loading_takes_the_weights_and_a_tenth(tmp_path, share):
    path = tmp_path / "model.safetensors"
    write_weights(path, {f"w{i}": paddle.full([16 << 20], i, "uint8") for i in range(4)}, show=False)
    command = [sys.executable, "-c", MEMORY, path, str(share)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, env=environment)
    peak, held = (int(kilobytes) << 10 for kilobytes in done.stdout.split())
    assert held >= 64 << 20
    assert peak <= 1.1 * (64 << 20)
