"""transformers, eager, bfloat16: what ``generate`` runs, fed with random tokens in place of its own."""

import random
from collections.abc import Iterator

import torch
import transformers

from tests.benchmarks.peers.protocol import Engine, Request, serve


def load(request: Request) -> Engine:
    torch.set_num_threads(request.threads)
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.bfloat16).eval()

    def engine(prompts: list[list[int]], new_tokens: int, numbers: random.Random) -> Iterator[int]:
        cache = transformers.DynamicCache(config=model.config)
        tokens = prompts
        for _ in range(new_tokens):
            # [B, new] token ids; logits of the last position only, as generate asks for
            model(input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
            yield len(prompts)
            tokens = [[numbers.randrange(request.vocab_size)] for _ in prompts]

    return engine


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load, versions)
