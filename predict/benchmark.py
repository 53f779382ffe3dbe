"""--benchmark: prefill and decoding of one sequence of random tokens, against the memory's read rate of that run."""

import sys
import time

import numpy as np

from ops.memory import read_bandwidth
from predict.engine.batch import Chunk, pack
from predict.engine.request import SamplingParams, Sequence
from predict.llm import LLM
from predict.model.config import MixtralConfig
from predict.runner import bytes_per_token

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
SHORT_CONTEXT = 5
REPEAT = 3
TOTAL_MAX_LENGTH = PREFILL_TOKENS + DECODE_TOKENS


def active_weight_bytes(config: MixtralConfig, world_size: int, dtype: str, quant_type: str | None) -> int:
    """Bytes of weights one token reads on one rank: attention, router, its chosen experts and lm_head."""
    element = 1 if quant_type else {"float32": 4, "bfloat16": 2}[dtype]
    hidden, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    attention = 2 * heads * config.head_dim * hidden  # q and o, k and v
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    router = 4 * config.num_local_experts * hidden  # float32, whole on every rank
    layers = config.num_hidden_layers * (element * (attention + experts) // world_size + router)
    return layers + element * config.vocab_size * hidden // world_size


def run(llm: LLM, show: bool) -> None:
    """Measures and, on the first rank, prints."""
    ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, PREFILL_TOKENS + 1).tolist()
    bandwidth = [read_bandwidth()]
    prefill, decode = [], []
    for _ in range(REPEAT):
        prefill.append(_seconds(llm, ids[:PREFILL_TOKENS], new_tokens=1)[0])
        decode += _seconds(llm, ids[:SHORT_CONTEXT], new_tokens=DECODE_TOKENS + 1)[1:]
    bandwidth.append(read_bandwidth())
    if not show:
        return
    weights = active_weight_bytes(llm.config, llm.ranks.world_size, llm.dtype, llm.quant_type)
    cache = bytes_per_token(llm.config, llm.ranks.world_size, llm.dtype) * (SHORT_CONTEXT + DECODE_TOKENS // 2)
    step, read = float(np.median(decode)), float(np.median(bandwidth))
    low, high = np.percentile(decode, [10, 90])
    print(f"decode, batch 1, context {SHORT_CONTEXT}: {1 / step:.2f} tokens/s (p10 {1 / high:.2f}, p90 {1 / low:.2f})")
    print(
        f"  active bytes a token, a rank: {(weights + cache) / 1e6:.1f} MB "
        f"(weights {weights / 1e6:.1f}, KV {cache / 1e6:.1f})"
    )
    print(f"  {(weights + cache) / step / 1e9:.1f} GB/s of {read / 1e9:.1f} GB/s read, measured in this run: ", end="")
    print(f"{100 * (weights + cache) / step / read:.0f} %")
    print(f"prefill, {PREFILL_TOKENS} tokens: {PREFILL_TOKENS / float(np.median(prefill)):.1f} tokens/s")
    sys.stdout.flush()


def _seconds(llm: LLM, prompt: list[int], new_tokens: int) -> list[float]:
    """Seconds of each step of one greedy request: its prefill first, then its decodes."""
    sequence = Sequence(list(prompt), SamplingParams(max_tokens=new_tokens, ignore_eos=True))
    manager = llm.engine.block_manager
    sequence.block_ids = manager.allocate(len(prompt) + new_tokens)
    seconds: list[float] = []
    while len(seconds) < new_tokens:
        chunk = Chunk(sequence, sequence.num_tokens - sequence.num_computed)
        started = time.perf_counter()
        tokens, _ = llm.runner.step(pack([chunk]))
        seconds.append(time.perf_counter() - started)
        sequence.num_computed = sequence.num_tokens
        sequence.token_ids.append(int(tokens[0]))
    manager.free(sequence.block_ids)
    return seconds
