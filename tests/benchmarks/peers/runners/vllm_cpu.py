"""vLLM for CPUs, bfloat16: its engine driven step by step, sampling at temperature 1."""

import os
import random
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path

from tests.benchmarks.peers.protocol import Engine, Request, serve

KV_CACHE_GIB = 1


def load(request: Request) -> Engine:
    os.environ |= {
        # In this process: its peak memory is that of the engine, and no queue stands between a step and its clock.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        # By default vLLM takes every processor of the machine.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: request.threads])),
        # What it compiles while loading stays with its environment: the first load takes longer than the next.
        "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=request.model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            seed=request.seed,
            enable_prefix_caching=False,
            max_model_len=max(case.context + case.new_tokens for case in request.cases) + 1,
            max_num_seqs=max(case.batch for case in request.cases),
            # Every prompt of a case in one step: decoding starts with all sequences at once.
            max_num_batched_tokens=max(max(case.batch * case.context for case in request.cases), 2048),
        )
    )
    names = count()

    def steps(prompts: list[list[int]], new_tokens: int, _: random.Random) -> Iterator[int]:
        parameters = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=new_tokens, detokenize=False)
        for prompt in prompts:
            engine.add_request(str(next(names)), {"prompt_token_ids": prompt}, parameters)
        so_far: dict[str, int] = {}
        while engine.has_unfinished_requests():
            before = sum(so_far.values())
            so_far |= {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
            yield sum(so_far.values()) - before

    return steps


def versions() -> dict[str, str]:
    return {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}


if __name__ == "__main__":
    serve(load, versions)
