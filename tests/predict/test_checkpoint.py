"""Checkpoints: read exactly, and refused by file and tensor before anything large is allocated."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from predict.model.checkpoint import Checkpoint, CheckpointError
from predict.model.config import MixtralConfig
from predict.model.weights import convert, expected_tensors, load, open_checkpoint
from tests.predict.test_config import TINY

CONFIG = MixtralConfig.from_dict(TINY)
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {n: random.standard_normal(s).astype(np.float32) for n, s in expected_tensors(CONFIG).items()}


@pytest.fixture
def folder(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def test_tensors_are_read_as_they_are(folder):
    checkpoint = open_checkpoint(folder, CONFIG)
    for name, expected in tensors().items():
        array, dtype = checkpoint.read(name)
        assert dtype == "float32"
        np.testing.assert_array_equal(array, expected)


def test_missing_extra_misshapen_and_mistyped_tensors_are_one_error(folder):
    changed = tensors()
    del changed["model.norm.weight"]
    changed["model.layers.7.extra"] = np.zeros(3, np.float32)
    changed[ROUTER] = np.zeros((4, 31), np.float32)
    changed["lm_head.weight"] = np.zeros((100, 32), np.int32)
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder, CONFIG)
    message = str(error.value)
    assert "tensor model.norm.weight [32] is missing" in message
    assert "model.safetensors: tensor model.layers.7.extra [3] does not belong to this model" in message
    assert f"tensor {ROUTER} has shape [4, 31], needs [4, 32]" in message
    assert "tensor lm_head.weight is I32, needs one of F32, BF16, F16" in message


def test_many_problems_are_cut_short(folder):
    save_file({"model.norm.weight": np.zeros(32, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"and \d+ more") as error:
        open_checkpoint(folder, CONFIG)
    assert len(str(error.value).splitlines()) == 11


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files_are_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        Checkpoint(folder)


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\), which are never read"):
        Checkpoint(tmp_path)


@pytest.fixture
def sharded(folder):
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(whole), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: whole[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_shards_are_one_checkpoint(sharded):
    checkpoint = open_checkpoint(sharded, CONFIG)
    np.testing.assert_array_equal(checkpoint.read(ROUTER)[0], tensors()[ROUTER])


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: no such file, though .* promises"):
        Checkpoint(sharded)


def test_an_index_that_lies_is_refused(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match="tensor ghost is not in it"):
        Checkpoint(sharded)


def test_an_index_cannot_leave_its_folder(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({ROUTER: "../model.safetensors"}))
    with pytest.raises(CheckpointError, match="needs the name of a file in the same folder"):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "again.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"other": "again.safetensors"}))
    with pytest.raises(CheckpointError, match=r"is not in it|is also in"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_bad_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(sharded)


def test_element_types_convert_exactly_or_round_to_even():
    values = np.array([0.0, -1.5, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.1e38, -np.inf, 65504.0], np.float32)
    bits = convert(values, "float32", "bfloat16")
    back = convert(bits, "bfloat16", "float32")
    np.testing.assert_array_equal(back[:2], values[:2])
    assert back[2] == 1.0  # a tie, to the even neighbour
    assert back[3] == 1.0 + 2**-6  # a tie, to the even neighbour
    assert back[5] == -np.inf
    np.testing.assert_array_equal(convert(back, "float32", "bfloat16"), bits)
    half = np.array([65504.0, 6e-8], np.float16)
    np.testing.assert_array_equal(convert(half, "float16", "float32"), half.astype(np.float32))
    nan = convert(np.array([np.nan], np.float32), "float32", "bfloat16")
    assert np.isnan(convert(nan, "bfloat16", "float32")).all()


def test_float16_is_rounded_to_the_nearest_or_refused():
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 65519.0, -np.inf], np.float32)
    expected = np.array([1, 1 + 2**-9, 0, 2**-23, 65504, -np.inf], np.float16)
    np.testing.assert_array_equal(convert(ties, "float32", "float16"), expected)
    assert np.isnan(convert(np.array([np.nan], np.float32), "float32", "float16")).all()
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = convert(bits, "bfloat16", "float32")
    fit = ~(np.abs(values) >= 65520) | np.isinf(values)
    np.testing.assert_array_equal(convert(bits[fit], "bfloat16", "float16"), values[fit].astype(np.float16))
    for value, said in ((65520.0, "65520"), (-1e30, r"1e\+30")):
        with pytest.raises(OverflowError, match=f"{said} is beyond float16, whose largest number is 65504"):
            convert(np.array([np.inf, value], np.float32), "float32", "float16")


@pytest.mark.parametrize(
    ("name", "quant_type"),
    [("model.layers.1.block_sparse_moe.experts.3.w2.weight", None), ("model.embed_tokens.weight", "weight_only_int8")],
)
def test_a_value_beyond_float16_names_its_tensor(folder, name, quant_type):
    changed = tensors()
    changed[name][5, 7] = -70000
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name}: 70000 is beyond float16, .*; use --dtype bfloat16"):
        load(CONFIG, open_checkpoint(folder, CONFIG), "float16", quant_type)


def test_a_value_that_cannot_be_quantised_names_its_tensor(folder):
    changed = tensors()
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    changed[name][5, 7] = np.inf
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name} cannot be quantised: .*row"):
        load(CONFIG, open_checkpoint(folder, CONFIG), "float32", "weight_only_int8")
