"""Our logits and greedy tokens against Hugging Face transformers itself, on checkpoints drawn afresh in every run."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.logits import all_logits, greedy

pytest.importorskip("torch", reason="no torch to compare with: pip install '.[live]'")
pytest.importorskip(
    "transformers", minversion="4.57", reason="no transformers >= 4.57 to compare with: pip install '.[live]'"
)

from tests.golden.hf_mixtral import CONFIG_VERSIONS, NEW_TOKENS, TRANSFORMERS_MAJOR, Shape, draw_checkpoint

# Both sides sum in float32, in different orders, and the logits stay below 10: honest differences are a few 1e-6,
# while a wrong rotation, mask, norm or expert moves them by 1e-2 and more.
TOLERANCE = 1e-4


@st.composite
def shapes(draw) -> Shape:
    """Any small Mixtral: grouped, multi-query or plain heads, odd sizes, and every way to write its config.json.

    Few layers and short prompts (below) make few router choices, so that a checkpoint without a near-tie is soon drawn.
    """
    # transformers 4 does not read rope_parameters: it would silently take another rope_theta than the file says.
    readable = CONFIG_VERSIONS if TRANSFORMERS_MAJOR >= 5 else CONFIG_VERSIONS[:-1]
    written_by = draw(st.sampled_from(readable))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    head_size = 2 * draw(st.integers(2, 12))
    implied = written_by == "4.36.2" or draw(st.booleans())
    experts = draw(st.integers(2, 8))
    return Shape(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, min(experts, 3))),
        hidden_size=heads * head_size if implied else draw(st.integers(16, 64)),
        intermediate_size=draw(st.integers(8, 64)),
        num_hidden_layers=draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(90, 200)),
        head_dim=None if implied else head_size,
        tie_word_embeddings=draw(st.booleans()),
        sliding_window=draw(st.none() | st.integers(1, 20)),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        written_by=written_by,
    )


@settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would load hundreds of checkpoints
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    shape=shapes(),
    lengths=st.lists(st.integers(1, 24), min_size=2, max_size=3),
    seed=st.integers(0, 2**31),
    shards=st.integers(1, 3),
)
def test_same_logits_and_greedy_tokens_as_transformers(tmp_path_factory, shape, lengths, seed, shards):
    directory = tmp_path_factory.mktemp("live")
    _, prompts, expected = draw_checkpoint(directory, shape, lengths, seed, shards)
    for ours, theirs in zip(all_logits(directory, prompts), expected.logits, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    assert greedy(directory, prompts, NEW_TOKENS) == expected.continuations
