"""The exported folder: it explains itself, and is refused when it is not what it says or what was asked for."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import paddle
import pytest

from export import export_model as exporter
from export.export_model import export_model
from export.program import as_program, save_program
from ops.library import ABI_VERSION
from ops.quantize import gate_up_shape
from predict.artifact import Artifact, ArtifactError
from predict.engine.batch import Chunk, pack
from predict.engine.request import SamplingParams, Sequence
from predict.llm import LLM
from predict.model.checkpoint import Checkpoint, read_header
from predict.model.config import ConfigError, MixtralConfig
from predict.model.source import find_model
from predict.model.weights import DEMO, load
from predict.parallel import alone

INT8 = ("bfloat16", "weight_only_int8")
FLOAT16 = Path(__file__).parents[1] / "golden" / "sliding_window_tied_float16"
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported(*INT8), tmp_path / "copy")


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.update(changes)
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def test_the_manifest_says_all_there_is_to_say(exported, demo):
    folder = exported(*INT8)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest.pop("files")
    config = MixtralConfig.read(demo / "config.json")
    assert manifest.pop("config") == json.loads(json.dumps(dataclasses.asdict(config)))
    assert manifest == {
        "format_version": 2,
        "paddle_version": paddle.__version__,
        "ops_abi_version": ABI_VERSION,
        "dtype": "bfloat16",
        "quant_type": "weight_only_int8",
        "weight_layout": "tile32x64",
        "world_size": 1,
        "block_size": 64,
    }
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(files) == present - {"manifest.json"}
    tokenizer = {"tokenizer.model", "tokenizer_config.json"}
    assert set(files) >= tokenizer | {"rank_0/model.json", "rank_0/model.safetensors", "generation_config.json"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert Artifact.open(folder).config == config


def test_quantised_weights_are_saved_packed(exported, demo):
    """One byte for a quantised weight, two for one of the embedding, four for a scale, a router weight and a norm."""
    config = MixtralConfig.read(demo / "config.json")
    hidden, experts, inner = config.hidden_size, config.num_local_experts, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = [(queries + 2 * keys + 2 * experts * inner, hidden), (hidden, queries), (experts * hidden, inner)]
    layer = sum(rows * columns + 4 * rows for rows, columns in shapes) + 4 * hidden * (experts + 2)
    vocabulary = config.vocab_size * (2 * hidden + hidden + 4)
    expected = config.num_hidden_layers * layer + vocabulary + 4 * hidden
    path = exported(*INT8) / "rank_0" / "model.safetensors"
    header = read_header(path)
    assert path.stat().st_size == min(entry.offset for entry in header.values()) + expected
    assert (header["layers.0.w13"].dtype, header["layers.0.w13"].shape) == (
        "U8",
        (experts, *gate_up_shape(inner, hidden)),
    )


@pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [
        ("bfloat16", "tile32x32", gate_up_shape),
        ("float16", "tile32x32", gate_up_shape),
        ("float32", "row_major", lambda inner, hidden, _: [2 * inner, hidden]),
    ],
)
def test_the_layout_of_other_weights_is_named(exported, demo, dtype, layout, shape):
    config = MixtralConfig.read(demo / "config.json")
    folder = exported(dtype, None)
    assert json.loads((folder / "manifest.json").read_text())["weight_layout"] == layout
    found = read_header(folder / "rank_0" / "model.safetensors")["layers.0.w13"].shape
    assert found == (config.num_local_experts, *shape(config.intermediate_size, config.hidden_size, dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "exported with format_version 1, this version needs 2; export it again"),
        ({"format_version": ...}, "exported with format_version None"),
        ({"ops_abi_version": 99}, f"exported with ops_abi_version 99, this version needs {ABI_VERSION}"),
        ({"weight_layout": "amx16x64"}, "exported with weight_layout 'amx16x64', this version needs 'tile32x64'"),
        ({"paddle_version": "2.6.1"}, f"exported with Paddle 2.6.1, this is {paddle.__version__}; export it again"),
        ({"paddle_version": 3}, "exported with Paddle 3,"),
        ({"dtype": "int4"}, "damaged manifest (dtype is 'int4', needs one of"),
        ({"quant_type": "int4"}, "damaged manifest (quant_type is 'int4', needs one of"),
        ({"world_size": "1"}, "damaged manifest (world_size is '1', needs a positive integer)"),
        ({"world_size": 2}, "damaged manifest (rank_1/model.json is not among its files)"),
        ({"block_size": 0}, "damaged manifest (block_size is 0, needs a positive integer)"),
        ({"block_size": ...}, "damaged manifest (block_size is missing)"),
        ({"config": []}, "damaged manifest"),
        ({"config": {"vocab_size": 3}}, "damaged manifest (config: hidden_size is missing"),
        ({"files": ...}, "damaged manifest (files is missing)"),
        ({"files": {}}, "damaged manifest (rank_0/model.json is not among its files)"),
        ({"files": []}, "damaged manifest"),
        ({"files": {"a": 1}}, "damaged manifest"),
    ],
)
def test_another_or_a_damaged_manifest_is_refused(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(ArtifactError, match=re.escape(message)) as caught:
        LLM(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("garbage", "not JSON"), ("[]", "holds a JSON list, needs an object")])
def test_a_manifest_that_is_none_is_refused(copy, text, message):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(copy)


def test_a_folder_without_a_manifest_is_no_export(copy, tmp_path):
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json, so .* its export did not finish; make one with"):
        LLM(copy, mode="static")
    with pytest.raises(ArtifactError, match=r"absent: no such folder; make one with export_model\.py"):
        LLM(tmp_path / "absent", mode="static")


@pytest.mark.parametrize("name", ["rank_0/model.safetensors", "rank_0/model.json", "tokenizer.model"])
def test_missing_and_truncated_files_are_named(copy, name):
    size = (copy / name).stat().st_size
    os.truncate(copy / name, 1000)
    with pytest.raises(
        ArtifactError, match=f"{name}: has 1000 bytes, the manifest says {size}; copy or export it again"
    ):
        LLM(copy)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: is missing, the manifest says {size}"):
        LLM(copy)


@pytest.mark.parametrize("name", ["rank_0/model.safetensors", "rank_0/model.json", "tokenizer_config.json"])
def test_verify_sees_a_flipped_bit(copy, name):
    LLM(copy, verify=True)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name}: its bytes have changed since the export; export it again"):
        LLM(copy, verify=True)


def test_a_program_paddle_cannot_load_is_refused(copy):
    program = copy / "rank_0" / "model.json"
    program.write_text("x" + program.read_text()[1:])
    with pytest.raises(ArtifactError, match=r"Paddle cannot load the program .* look for changed bytes with --verify"):
        LLM(copy)


def test_weights_of_another_export_are_refused(copy, exported):
    """The manifest would refuse another size; this is what it takes to get past it."""
    other = exported("bfloat16", None) / "rank_0" / "model.safetensors"
    shutil.copyfile(other, copy / "rank_0" / "model.safetensors")
    files = json.loads((copy / "manifest.json").read_text())["files"]
    files["rank_0/model.safetensors"]["bytes"] = other.stat().st_size
    edit(copy, files=files)
    with pytest.raises(ArtifactError, match=r"holds BF16 .*, the program beside it needs U8 .*; export it again"):
        LLM(copy)


def test_exporting_leaves_the_network_as_it_was(demo, tmp_path):
    source = find_model(demo)
    network = load(source.config, source.weights(), "bfloat16", "weight_only_int8")
    before = dict(network.named_buffers())
    save_program(network, tmp_path / "model", 64)
    assert {name: id(buffer) for name, buffer in network.named_buffers()} == {n: id(b) for n, b in before.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]  # and no weights beside the program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float32"},
            "exported with dtype bfloat16, asked for float32; use --dtype bfloat16, or export it again",
        ),
        ({"block_size": 32}, "exported with block_size 64, asked for 32; use --block_size 64, or export it again"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is for dummy models"),
        ({"mode": "dynamic"}, "is an exported model, which holds no checkpoint"),
    ],
)
def test_an_export_of_another_kind_is_refused(exported, options, message):
    with pytest.raises(ArtifactError if "num_hidden_layers" not in options else ValueError, match=re.escape(message)):
        LLM(exported(*INT8), **options)


@pytest.mark.parametrize("quant_type", [None, "weight_only_int8"])
def test_an_export_in_float16_is_for_gpus(exported, quant_type):
    folder = exported("float16", quant_type)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["dtype"], manifest["quant_type"]) == ("float16", quant_type)
    assert read_header(folder / "rank_0" / "model.safetensors")["embed_tokens"].dtype == "F16"
    sentence = (
        f"{folder}: the export is float16, which runs on GPUs only; export it again with --dtype bfloat16 or float32, "
        "or use --device gpu"
    )
    with pytest.raises(ArtifactError, match=re.escape(sentence)):
        LLM(folder)
    Artifact.open(folder).require("float16", quant_type, 1, None, "gpu")


def test_a_checkpoint_of_float16_is_exported_as_what_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="the checkpoint is float16, which runs on GPUs only; use --dtype float16 f"):
        export_model(str(FLOAT16), tmp_path, ranks=alone())
    assert export_model(str(FLOAT16), tmp_path, dtype="float16", ranks=alone()).dtype == "float16"
    table, _ = Checkpoint(FLOAT16).read("model.embed_tokens.weight")
    entry = read_header(tmp_path / "rank_0" / "model.safetensors")["embed_tokens"]
    np.testing.assert_array_equal(np.memmap(entry.file, np.float16, "r", entry.offset, entry.shape), table)


def test_quantisation_and_ranks_must_be_those_of_the_export(exported):
    plain = Artifact.open(exported("bfloat16", None))
    with pytest.raises(ArtifactError, match="asked for weight_only_int8; leave --quant_type out, or export it again"):
        plain.require(None, "weight_only_int8", 1, None)
    with pytest.raises(ArtifactError, match="exported for 1 ranks, running on 2; start it with a single process"):
        plain.require(None, None, 2, None)
    with pytest.raises(ArtifactError, match="exported for 4 ranks, running on 1; start it with --nproc_per_node 4"):
        dataclasses.replace(plain, world_size=4).require(None, None, 1, None)


def test_an_export_replaces_an_older_one(demo, tmp_path):
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / "inference"
        (folder / "rank_7").mkdir(parents=True, exist_ok=True)  # of an older export on more ranks
        (folder / "rank_7" / "model.pdiparams").touch()  # of format version 1
        assert export_model(str(demo), folder, dtype=dtype, ranks=alone()).dtype == dtype
    Artifact.open(folder).verify(show=False)
    assert not (folder / "rank_7").exists()


@pytest.mark.parametrize("part", ["save_program", "write_weights"])
def test_an_interrupted_export_leaves_no_manifest_and_can_be_repeated(demo, tmp_path, monkeypatch, part):
    folder = tmp_path / "inference"
    export_model(str(demo), folder, ranks=alone())

    def interrupted(*arguments):
        (folder / "rank_0" / "model.json").write_text("half a program")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporter, part, interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_model(str(demo), folder, ranks=alone())
    assert not Artifact.is_artifact(folder)
    export_model(str(demo), folder, ranks=alone())
    Artifact.open(folder).verify(show=False)


def test_an_export_that_cannot_load_leaves_the_older_one(demo, tmp_path):
    folder = tmp_path / "inference"
    export_model(str(demo), folder, ranks=alone())
    with pytest.raises(ConfigError, match="quant_type is 'int4'"):
        export_model(str(demo), folder, quant_type="int4", ranks=alone())
    Artifact.open(folder).verify(show=False)


@pytest.mark.parametrize("name", ["notes.txt", "rank_notes/a", "rank_0/mine", "tokenizer.model", "rank_0.txt"])
def test_what_no_export_wrote_is_never_deleted(demo, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match="which no export wrote; give an empty or new folder"):
        export_model(str(demo), tmp_path, ranks=alone())
    assert (tmp_path / name).read_text() == "precious"


def test_a_file_is_no_output_folder(demo, tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in ("file", "file/folder"):
        with pytest.raises(ConfigError, match=r"--output_path .* cannot be made \(.*\); give another folder"):
            export_model(str(demo), tmp_path / path, ranks=alone())


def test_a_dummy_model_is_exported_with_the_tokenizer_it_runs_on(tmp_path):
    export_model("dummy:demo", tmp_path / "dummy", num_hidden_layers=1, ranks=alone())
    static, dynamic = LLM(tmp_path / "dummy"), LLM("dummy:demo", num_hidden_layers=1)
    assert static.generate("The", SHORT) == dynamic.generate("The", SHORT)


def test_a_network_runs_as_its_program_without_a_file_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dynamic = LLM(DEMO, quant_type="weight_only_int8", kv_cache_memory=4 << 20).runner
    sequence = Sequence(list(range(40, 60)), SamplingParams(logprobs=20))
    sequence.block_ids.append(3)
    batch = pack([Chunk(sequence, 20)])
    expected = dynamic.step(batch)
    program = as_program(dynamic)
    assert program.mode == "static"
    assert all(np.array_equal(a, b) for a, b in zip(program.step(batch), expected, strict=True))
    assert list(tmp_path.iterdir()) == []
