"""Make the golden checkpoints: tiny random Mixtrals and what Hugging Face transformers computes from them.

    pip install '.[live]'                         # torch and transformers; only this script and the live test need them
    python tests/golden/make_golden.py            # all of them, in place
    python tests/golden/make_golden.py --only odd_sizes --out golden

Writes for each configuration a folder with a whole checkpoint in the layout of the published Mixtrals (config.json and
model.safetensors, or shards and their index) and golden.safetensors:

    prompts        [N, L]     int64    token ids
    logits         [N, L, V]  float32  computed in float32 from the stored weights, each prompt alone, eager attention
    continuations  [N, 16]    int64    greedy tokens, each from a full pass without a cache

Its metadata entry "made" (JSON; one entry, so that a second run gives the same bytes) records the versions, the seed,
and how far every greedy and every router choice was from a tie. Weights are drawn again until none is near one.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.golden.hf_mixtral import Expected, Shape, draw_checkpoint, forward, load

HERE = Path(__file__).parent
PROMPTS = 2

# name: (architecture, prompt length, shards)
CASES: dict[str, tuple[Shape, int, int]] = {
    "mixtral_in_small": (Shape(4, 2, 8, 2, written_by="4.36.2"), 32, 1),
    "mha_tied": (
        Shape(
            4,
            4,
            4,
            2,
            intermediate_size=40,
            vocab_size=160,
            tie_word_embeddings=True,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
        ),
        28,
        1,
    ),
    "top1": (Shape(6, 2, 3, 1, hidden_size=48, intermediate_size=40, rope_theta=1e4, written_by="4.57.6"), 31, 1),
    "multi_query_top3_float32": (
        Shape(
            8, 1, 5, 3, intermediate_size=16, head_dim=8, tie_word_embeddings=True, rms_norm_eps=1e-6, dtype="float32"
        ),
        24,
        1,
    ),
    "sliding_window": (
        Shape(4, 2, 8, 2, intermediate_size=24, head_dim=16, sliding_window=8, rope_theta=1e4, written_by="4.51.3"),
        40,
        1,
    ),
    "sliding_window_tied_float16": (
        Shape(4, 4, 4, 2, tie_word_embeddings=True, sliding_window=12, rms_norm_eps=1e-6, dtype="float16"),
        29,
        1,
    ),
    "odd_sizes": (
        Shape(4, 1, 3, 2, hidden_size=40, intermediate_size=56, vocab_size=131, written_by="4.57.6"),
        27,
        1,
    ),
    "sharded": (
        Shape(8, 2, 4, 2, num_hidden_layers=3, intermediate_size=24, head_dim=24, vocab_size=96, rope_theta=1e4),
        25,
        3,
    ),
}


def check_round_trip(directory: Path) -> None:
    """Have transformers load and save the checkpoint: the same names and bits must come back, else RuntimeError."""
    model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype="auto")
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        ours, theirs = read_weights(directory), read_weights(Path(again))
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{directory}: transformers writes other names: {sorted(ours.keys() ^ theirs.keys())}")
    for name, tensor in ours.items():
        if tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name]):
            raise RuntimeError(f"{directory}: {name} comes back changed from transformers")


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the model*.safetensors of a folder by name."""
    weights = {}
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return weights


def window_effect(directory: Path, window: int, prompts: list[list[int]], expected: Expected) -> float:
    """Largest change of a logit when the window is lifted; RuntimeError unless it starts at position `window`."""
    unlimited = load(directory, sliding_window=None)
    change = np.stack(
        [abs(forward(unlimited, prompt)[0] - logits) for prompt, logits in zip(prompts, expected.logits, strict=True)]
    ).max(axis=(0, 2))  # [L]
    if change[:window].max() > 1e-5 or change[window:].min() < 1e-3:
        raise RuntimeError(f"{directory}: sliding_window {window} does not act from position {window} on: {change}")
    return float(change.max())


def make(directory: Path, shape: Shape, length: int, shards: int) -> dict[str, str]:
    """Write one folder and return what its golden.safetensors records under "made"."""
    seed, prompts, expected = draw_checkpoint(directory, shape, [length] * PROMPTS, 0, shards, varied=True)
    check_round_trip(directory)
    metadata = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": str(seed),
        "min_logit_gap": f"{expected.min_logit_gap:.2e}",
        "min_router_gap": f"{expected.min_router_gap:.2e}",
        "max_abs_logit": f"{np.abs(expected.logits).max():.2f}",
    }
    if shape.sliding_window is not None:
        metadata["window_effect"] = f"{window_effect(directory, shape.sliding_window, prompts, expected):.2f}"
    tensors = {
        "prompts": np.array(prompts, dtype=np.int64),
        "logits": np.stack(expected.logits),
        "continuations": np.array(expected.continuations, dtype=np.int64),
    }
    save_file(tensors, directory / "golden.safetensors", metadata={"made": json.dumps(metadata)})
    return metadata


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden checkpoints with Hugging Face transformers.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that receives one folder per configuration")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), help="configurations to make")
    arguments = parser.parse_args()
    for name in arguments.only:
        directory = arguments.out / name
        metadata = make(directory, *CASES[name])
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{name}: {size / 1000:.0f} kB, {metadata}")


if __name__ == "__main__":
    main()
