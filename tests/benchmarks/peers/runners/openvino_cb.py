"""OpenVINO GenAI's continuous batching, driven step by step, sampling at temperature 1."""

import random
from collections.abc import Iterator
from itertools import count

import openvino
import openvino_genai

from tests.benchmarks.peers.protocol import Engine, Request, serve

KV_CACHE_GB = 1


def load(request: Request) -> Engine:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = KV_CACHE_GB
    scheduler.max_num_seqs = max(case.batch for case in request.cases)
    # Every prompt of a case in one step: decoding starts with all sequences at once.
    scheduler.max_num_batched_tokens = max(case.batch * case.context for case in request.cases)
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        request.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": request.threads}
    )
    names = count()

    def steps(prompts: list[list[int]], new_tokens: int, numbers: random.Random) -> Iterator[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = new_tokens, True
        config.do_sample, config.temperature = True, 1.0
        config.rng_seed = numbers.getrandbits(31)
        handles = [
            pipeline.add_request(next(names), openvino.Tensor([prompt]), config)  # [1, context]
            for prompt in prompts
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            given = 0
            for handle in handles:
                if handle.can_read():
                    given += sum(len(output.generated_ids) for output in handle.read().values())
            yield given

    return steps


def versions() -> dict[str, str]:
    return {"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__}


if __name__ == "__main__":
    serve(load, versions)
