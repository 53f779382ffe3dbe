"""config.json as transformers 4 and 5 write it, and what is refused."""

import json

import pytest

from predict.model.config import ConfigError, MixtralConfig
from predict.model.weights import CONFIGS, dummy_config

TINY = {
    "model_type": "mixtral",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_transformers_4_and_5_mean_the_same():
    five = {k: v for k, v in TINY.items() if k not in ("rope_theta", "torch_dtype")}
    five |= {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": None}
    assert MixtralConfig.from_dict(five) == MixtralConfig.from_dict(TINY)


def test_head_dim_is_hidden_over_heads_unless_given():
    assert MixtralConfig.from_dict(TINY).head_dim == 8
    assert MixtralConfig.from_dict(TINY | {"head_dim": 24}).head_dim == 24


def test_eos_may_be_a_list_or_nothing():
    assert MixtralConfig.from_dict(TINY | {"eos_token_id": [2, 7]}).eos_token_id == (2, 7)
    assert MixtralConfig.from_dict(TINY | {"eos_token_id": None}).eos_token_id == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', needs 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', needs 'silu'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32', needs an integer >= 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_local_experts 4"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 9}, "head_dim is 9, needs an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, needs a positive number"),
        ({"rope_theta": None}, "rope_theta is None, needs a positive number"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"torch_dtype": "float64"}, "dtype is 'float64', needs one of float32, bfloat16, float16"),
        ({"quantization_config": {"quant_method": "awq"}}, r"already quantised \(awq\)"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', needs token ids"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_what_is_no_mixtral_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        MixtralConfig.from_dict(TINY | change)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: No such file"):
        MixtralConfig.read(tmp_path / "config.json")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY)[:50])
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        MixtralConfig.read(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds a JSON list, needs an object"):
        MixtralConfig.read(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        MixtralConfig.read(path)


def test_shipped_configurations_are_readable():
    small, large = (MixtralConfig.read(CONFIGS / f"mixtral-{size}.json") for size in ("8x7b", "8x22b"))
    assert (small.hidden_size, small.num_hidden_layers, small.head_dim) == (4096, 32, 128)
    assert (large.hidden_size, large.num_hidden_layers, large.head_dim) == (6144, 56, 128)


def test_dummy_names_are_configurations():
    assert dummy_config("dummy:mixtral-8x7b", 2).num_hidden_layers == 2
    assert dummy_config(f"dummy:{CONFIGS / 'demo'}", None) == dummy_config("dummy:demo", None)
    with pytest.raises(ConfigError, match="no configuration 'mixtral-9x9b'; needs one of mixtral-8x22b, mixtral-8x7b"):
        dummy_config("dummy:mixtral-9x9b", None)
