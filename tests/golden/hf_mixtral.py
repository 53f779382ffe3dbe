"""Tiny Mixtral checkpoints on disk, and what Hugging Face transformers computes from them.

Shared by make_golden.py (the committed files) and tests/predict/test_live_transformers.py (fresh ones). Needs torch and
transformers, 4.57 or later including 5: `pip install '.[live]'`. Nothing of this project is imported: a mistake of ours
cannot hide in the reference.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the matrices are tiny, and one thread makes the sums reproducible

TRANSFORMERS_MAJOR = int(transformers.__version__.split(".")[0])
EOS_TOKEN_ID = 2
NEW_TOKENS = 16
# A sound float32 implementation differs from this one by a few 1e-6. Where two logits, or the last chosen and the first
# rejected expert, lie closer than this, both answers would be right, and the checkpoint is drawn again.
MIN_LOGIT_GAP = 1e-3
MIN_ROUTER_GAP = 1e-4
CONFIG_VERSIONS = ("4.36.2", "4.51.3", "4.57.6", "5.23.0")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The architecture of one tiny Mixtral; field names are those of config.json.

    written_by is the transformers version whose config.json is imitated: "4.36.2" (no head_dim; as on the model cards
    of 8x7B and 8x22B), "4.51.3" (head_dim always a number), "4.57.6" (dtype for torch_dtype, head_dim may be null) or
    "5.23.0" (rope_parameters for rope_theta). dtype is that of the stored weights.
    """

    num_attention_heads: int
    num_key_value_heads: int
    num_local_experts: int
    num_experts_per_tok: int
    hidden_size: int = 32
    intermediate_size: int = 32
    num_hidden_layers: int = 2
    vocab_size: int = 128
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    dtype: str = "bfloat16"
    written_by: str = "5.23.0"

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


def config_json(shape: Shape) -> dict:
    """The keys and values that MixtralConfig.save_pretrained of transformers shape.written_by writes for this shape."""
    if shape.written_by not in CONFIG_VERSIONS:
        raise ValueError(f"written_by {shape.written_by!r} is not one of {', '.join(CONFIG_VERSIONS)}")
    config = dataclasses.asdict(shape) | {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 256,
        "model_type": "mixtral",
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "transformers_version": shape.written_by,
        "use_cache": True,
    }
    del config["written_by"]
    if shape.written_by == "4.36.2":
        if shape.head_dim is not None:
            raise ValueError(
                f"head_dim {shape.head_dim}: transformers 4.36.2 knows no head_dim; use None or a later one"
            )
        del config["head_dim"], config["router_jitter_noise"]
    if shape.written_by == "4.51.3":
        config["head_dim"] = shape.head_size
    if shape.written_by in ("4.36.2", "4.51.3"):
        config["torch_dtype"] = config.pop("dtype")
    if shape.written_by == "5.23.0":
        config["pad_token_id"] = None
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    return dict(sorted(config.items()))


def draw_weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Random weights by their names on disk, in shape.dtype, in the order in which the layers use them."""
    H, D, inner = shape.hidden_size, shape.head_size, shape.intermediate_size
    Hq, Hkv = shape.num_attention_heads, shape.num_key_value_heads
    random = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def draw(name: str, *size: int, mean: float = 0.0, std: float = 0.2) -> None:
        weights[name] = (mean + std * torch.randn(*size, generator=random)).to(getattr(torch, shape.dtype))

    draw("model.embed_tokens.weight", shape.vocab_size, H)
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}"
        draw(f"{at}.input_layernorm.weight", H, mean=1.0, std=0.1)
        draw(f"{at}.self_attn.q_proj.weight", Hq * D, H)
        draw(f"{at}.self_attn.k_proj.weight", Hkv * D, H)
        draw(f"{at}.self_attn.v_proj.weight", Hkv * D, H)
        draw(f"{at}.self_attn.o_proj.weight", H, Hq * D)
        draw(f"{at}.post_attention_layernorm.weight", H, mean=1.0, std=0.1)
        draw(f"{at}.block_sparse_moe.gate.weight", shape.num_local_experts, H)
        for expert in range(shape.num_local_experts):
            draw(f"{at}.block_sparse_moe.experts.{expert}.w1.weight", inner, H)
            draw(f"{at}.block_sparse_moe.experts.{expert}.w2.weight", H, inner)
            draw(f"{at}.block_sparse_moe.experts.{expert}.w3.weight", inner, H)
    draw("model.norm.weight", H, mean=1.0, std=0.1)
    if not shape.tie_word_embeddings:
        draw("lm_head.weight", shape.vocab_size, H)
    return weights


def write_checkpoint(directory: Path, shape: Shape, weights: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write config.json and the weights, as model.safetensors or as `shards` files and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config_json(shape))
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(tensor.nbytes for tensor in weights.values())
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    before = 0  # bytes: a tensor belongs to the shard in which it starts, so experts of one layer are torn apart
    for name, tensor in weights.items():
        parts[before * shards // total][name] = tensor
        before += tensor.nbytes
    weight_map = {}
    for number, part in enumerate(parts, 1):
        filename = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, directory / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, filename)
    metadata = {"total_size": total}
    if shape.written_by == "5.23.0":
        metadata = {"total_parameters": sum(tensor.numel() for tensor in weights.values()), "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict) -> None:
    """Write JSON the way transformers does: two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(directory: Path, **changes) -> transformers.MixtralForCausalLM:
    """The checkpoint in transformers, float32, eager attention and experts; `changes` replace entries of its config.

    Raises ValueError when a tensor is missing, superfluous or of the wrong shape, which transformers only logs.
    """
    if TRANSFORMERS_MAJOR >= 5:  # its default, grouped_mm, refuses rows that are no multiple of 16 bytes
        changes["experts_implementation"] = "eager"
    model, report = transformers.MixtralForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **changes
    )
    for problem, names in report.items():
        if names:
            raise ValueError(f"{directory}: transformers {transformers.__version__} reports {problem}: {names}")
    return model.eval()


@torch.no_grad()
def forward(model: transformers.MixtralForCausalLM, prompt: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [L, V] and router probabilities [layers, L, E] of one prompt, float32, without a cache."""
    output = model(torch.tensor([list(prompt)]), use_cache=False, output_router_logits=True)
    return output.logits[0].numpy(), torch.stack(output.router_logits).softmax(-1).numpy()


def greedy(model: transformers.MixtralForCausalLM, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The continuation of largest logits; every token from a fresh pass over all that precedes it."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(forward(model, tokens)[0][-1].argmax()))
    return tokens[len(prompt) :]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What transformers computes for each prompt, logits [L, V] and greedy continuation, and how clear the choices are.

    min_logit_gap: between the best two logits, over the positions that choose a token; min_router_gap: between the
    probabilities of the last chosen and the first rejected expert, over all positions and layers.
    """

    logits: list[np.ndarray]
    continuations: list[list[int]]
    min_logit_gap: float
    min_router_gap: float
    all_experts_used: bool

    def is_clear(self) -> bool:
        """True when no sound float32 implementation could choose otherwise, and no continuation ends early by EOS."""
        return (
            self.min_logit_gap >= MIN_LOGIT_GAP
            and self.min_router_gap >= MIN_ROUTER_GAP
            and not any(EOS_TOKEN_ID in tokens for tokens in self.continuations)
        )

    def is_varied(self) -> bool:
        """True when every layer uses all its experts and no continuation just repeats a token or two."""
        return self.all_experts_used and all(len(set(tokens)) > len(tokens) // 3 for tokens in self.continuations)


def expect(model: transformers.MixtralForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int) -> Expected:
    """Run every prompt alone and measure the gaps over prompt and continuation."""
    chosen = model.config.num_experts_per_tok
    logits, continuations, logit_gaps, router_gaps, experts = [], [], [], [], []
    for prompt in prompts:
        continuation = greedy(model, prompt, new_tokens)
        all_logits, probabilities = forward(model, [*prompt, *continuation[:-1]])
        best = np.sort(all_logits[len(prompt) - 1 :], axis=-1)
        logit_gaps.append((best[:, -1] - best[:, -2]).min())
        order = -np.sort(-probabilities, axis=-1)
        if chosen < order.shape[-1]:
            router_gaps.append((order[..., chosen - 1] - order[..., chosen]).min())
        experts.append(np.argsort(-probabilities, axis=-1)[..., :chosen])
        logits.append(forward(model, prompt)[0])
        continuations.append(continuation)
    used = [set(layer.ravel().tolist()) for layer in np.concatenate(experts, axis=1)]
    return Expected(
        logits,
        continuations,
        min_logit_gap=float(min(logit_gaps)),
        min_router_gap=float(min(router_gaps, default=1.0)),
        all_experts_used=all(len(layer) == model.config.num_local_experts for layer in used),
    )


def draw_checkpoint(
    directory: Path, shape: Shape, lengths: Sequence[int], seed: int, shards: int = 1, varied: bool = False
) -> tuple[int, list[list[int]], Expected]:
    """Write a random checkpoint whose choices are clear and, if asked for, varied (Expected), from seed, seed + 1, ...

    Returns the seed that served, random prompts of the given lengths, and what transformers computes from the files.
    Raises RuntimeError when 200 seeds do not serve: some shapes (one layer, tied embeddings) are hardly ever varied.
    """
    for attempt in range(seed, seed + 200):
        random = np.random.default_rng(attempt)
        prompts = [random.integers(0, shape.vocab_size, length).tolist() for length in lengths]
        write_checkpoint(directory, shape, draw_weights(shape, attempt), shards)
        expected = expect(load(directory), prompts, NEW_TOKENS)
        if expected.is_clear() and (expected.is_varied() or not varied):
            return attempt, prompts, expected
    raise RuntimeError(f"no checkpoint with clear choices among 200 seeds from {seed} for {shape}")
