"""llama.cpp through the C functions of llama-cpp-python: its Python class would add copies of the logits."""

import random
from collections.abc import Iterator
from importlib.metadata import version

import llama_cpp

from tests.benchmarks.peers.protocol import Engine, Request, serve

CELLS = 256  # contexts are padded to a multiple of it


def load(request: Request) -> Engine:
    """One context for every batch size: cells of one are not searched by the sequences of another."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request.model.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {request.model}; its reason is above")
    contexts = {1: _context(model, request, 1)} | {
        case.batch: _context(model, request, case.batch) for case in request.cases if case.batch > 1
    }

    def engine(prompts: list[list[int]], new_tokens: int, numbers: random.Random) -> Iterator[int]:
        context = contexts[len(prompts)]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        lengths, tokens = [0] * len(prompts), prompts
        for _ in range(new_tokens):
            _decode(context, tokens, lengths)
            yield len(prompts)
            lengths = [length + len(new) for length, new in zip(lengths, tokens, strict=True)]
            tokens = [[numbers.randrange(request.vocab_size)] for _ in prompts]

    return engine


def _context(model, request: Request, batch: int):
    cases = [case for case in request.cases if case.batch == batch]
    longest = max([case.context + case.new_tokens for case in cases] + [CELLS])
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_seq_max = batch
    parameters.n_ctx = batch * (-(-longest // CELLS) * CELLS)
    parameters.n_batch = max([batch * case.context for case in cases] + [CELLS])  # a prompt is one call
    parameters.n_threads = parameters.n_threads_batch = request.threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context for {batch} sequences of {longest}; its reason is above")
    return context


def _decode(context, tokens: list[list[int]], lengths: list[int]) -> None:
    """Runs new tokens of each sequence behind the ``lengths`` it has; logits for the last of each."""
    batch = llama_cpp.llama_batch_init(sum(map(len, tokens)), 0, 1)
    try:
        for sequence, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            for i, token in enumerate(ids):
                n = batch.n_tokens
                batch.token[n], batch.pos[n] = token, length + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = i == len(ids) - 1
                batch.n_tokens = n + 1
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")


def versions() -> dict[str, str]:
    return {"llama-cpp-python": version("llama-cpp-python")}


if __name__ == "__main__":
    serve(load, versions)
