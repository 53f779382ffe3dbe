"""--benchmark: prefill and decoding of one sequence of random tokens, against the memory's read rate of that run."""

import time
from collections.abc import Iterator
from itertools import islice

import numpy as np

from ops.memory import MemoryReader
from predict.engine.batch import Chunk, pack
from predict.engine.request import SamplingParams, Sequence
from predict.llm import LLM
from predict.model.config import MixtralConfig
from predict.runner import bytes_per_token

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
SHORT_CONTEXT = 5
REPEAT = 3
STEPS_BETWEEN_READS = 8
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
    ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, PREFILL_TOKENS).tolist()
    reader = MemoryReader()
    prefill, decode, share = [], [], []
    active = active_weight_bytes(llm.config, llm.ranks.world_size, llm.dtype, llm.quant_type)
    cache = bytes_per_token(llm.config, llm.ranks.world_size, llm.dtype) * (SHORT_CONTEXT + DECODE_TOKENS // 2)
    bandwidth = [reader.bandwidth()]
    for _ in range(REPEAT):
        prefill.append(next(_steps(llm, ids, new_tokens=1)))
        steps = _steps(llm, ids[:SHORT_CONTEXT], new_tokens=DECODE_TOKENS + 1)
        next(steps)  # the prompt
        # The rate of a shared machine's memory changes within seconds: every few steps are held against the rates
        # measured just before and just after them.
        bandwidth.append(reader.bandwidth())
        while group := list(islice(steps, STEPS_BETWEEN_READS)):
            bandwidth.append(reader.bandwidth())
            around = (bandwidth[-2] + bandwidth[-1]) / 2
            share.append((active + cache) / float(np.median(group)) / around)
            decode += group
    if not show:
        return
    step, (low, high) = float(np.median(decode)), np.percentile(decode, [10, 90])
    print(f"decode, batch 1, context {SHORT_CONTEXT}: {1 / step:.2f} tokens/s (p10 {1 / high:.2f}, p90 {1 / low:.2f})")
    print(f"  active bytes a token, a rank: {(active + cache) / 1e6:.1f} MB ", end="")
    print(f"(weights {active / 1e6:.1f}, KV {cache / 1e6:.1f})")
    print(f"  {(active + cache) / step / 1e9:.1f} GB/s; memory reads at {np.median(bandwidth) / 1e9:.1f} GB/s ", end="")
    print(f"({min(bandwidth) / 1e9:.1f} to {max(bandwidth) / 1e9:.1f} in this run)")
    print(f"  {100 * np.median(share):.0f} % of the read rate around each few steps")
    print(f"prefill, {PREFILL_TOKENS} tokens: {PREFILL_TOKENS / float(np.median(prefill)):.1f} tokens/s", flush=True)


def _steps(llm: LLM, prompt: list[int], new_tokens: int) -> Iterator[float]:
    """Seconds of each step of one greedy request: its prefill first, then its decodes."""
    sequence = Sequence(list(prompt), SamplingParams(max_tokens=new_tokens, ignore_eos=True))
    manager = llm.engine.block_manager
    sequence.block_ids = manager.allocate(len(prompt) + new_tokens)
    try:
        for _ in range(new_tokens):
            chunk = Chunk(sequence, sequence.num_tokens - sequence.num_computed)
            started = time.perf_counter()
            tokens, _ = llm.runner.step(pack([chunk]))
            yield time.perf_counter() - started
            sequence.num_computed = sequence.num_tokens
            sequence.token_ids.append(int(tokens[0]))
    finally:
        manager.free(sequence.block_ids)
