"""The command line that generates: one model, dynamic or static, on one rank or many.

python ./predict/predictor.py --model_name_or_path DIR --dtype bfloat16 --mode dynamic --inference_model --append_attn
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from predict import startup

if __name__ == "__main__":
    startup.begin()  # before Paddle is imported

from predict.arguments import check_benchmark, check_device, check_output_file, parser, sampling_params
from predict.bench.command import run_bench
from predict.command import run_command
from predict.completion import Collector, Completion
from predict.dataset import Row, read_rows
from predict.engine.engine import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS
from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.parallel import Ranks
from predict.progress import progress

EXAMPLE_PROMPT = "This module provides"
DEFAULT_SRC_LENGTH = 1024


def predict(args: argparse.Namespace, ranks: Ranks) -> None:
    """Runs the predictor on this rank; rank 0 alone prints and writes."""
    check_device(args)
    check_benchmark(args)
    if args.output_path is not None:
        raise ValueError("--output_path is where the exporter writes; the predictor writes answers to --output_file")
    if args.benchmark:
        run_bench(args, ranks)
        return
    params = sampling_params(args)
    src_length = DEFAULT_SRC_LENGTH if args.src_length is None else args.src_length
    first = ranks.rank == 0
    rows = _rows(args, ranks)
    if args.output_file is not None:
        _check_output_file(Path(args.output_file), args.data_file)
    started = time.perf_counter()
    llm = LLM(
        args.model_name_or_path,
        mode=args.mode or "dynamic",
        dtype=args.dtype,
        quant_type=args.quant_type,
        max_num_seqs=args.batch_size or DEFAULT_MAX_NUM_SEQS,
        max_num_batched_tokens=args.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS,
        kv_cache_memory=args.kv_cache_memory,
        total_max_length=_total_max_length(args, src_length, params),
        block_size=args.block_size,
        threads=args.threads,
        chat_template=None if args.chat_template in (None, "none", "default") else args.chat_template,
        verify=bool(args.verify),
        num_hidden_layers=args.num_hidden_layers,
        ranks=ranks,
    )
    if first:
        print(f"{llm.description}, ready in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    chat = args.chat_template not in (None, "none")
    prompts = [_encode(llm, row, chat, src_length, params) for row in rows]
    with open(args.output_file, "w", encoding="utf-8") if args.output_file and first else nullcontext() as output:
        _answer(llm, rows, prompts, params, chat, output, first)


def _rows(args: argparse.Namespace, ranks: Ranks) -> list[Row]:
    if args.data_file is not None:
        if args.prompt is not None:
            raise ValueError("--prompt and --data_file were both given; give one of them")
        return read_rows(args.data_file)
    if args.prompt is not None:
        return [Row(0, args.prompt)]
    if ranks.world_size == 1 and sys.stdin.isatty():
        try:
            return [Row(0, input("Prompt: "))]
        except EOFError:
            raise ValueError("no prompt was typed; type one, or give --prompt or --data_file") from None
    if ranks.rank == 0:
        print(f"no --prompt, no --data_file and no terminal to ask in: continuing {EXAMPLE_PROMPT!r}", file=sys.stderr)
    return [Row(0, EXAMPLE_PROMPT)]


def _check_output_file(path: Path, data_file: str | None) -> None:
    """Finds out before the model is loaded that the answers could not be written, or would replace the questions."""
    check_output_file("output_file", path)
    if data_file is not None and path.exists() and path.samefile(data_file):
        raise ValueError(f"--output_file {path} is the --data_file, which it would replace; give another file")


def _total_max_length(args: argparse.Namespace, src_length: int, params: SamplingParams) -> int | None:
    if src_length < 1:
        raise ValueError(f"--src_length is {src_length}, needs a positive number")
    if args.total_max_length is not None:
        return args.total_max_length
    return None if args.src_length is None and args.max_length is None else src_length + params.max_tokens


def _encode(llm: LLM, row: Row, chat: bool, src_length: int, params: SamplingParams) -> list[int]:
    try:
        ids = llm.encode_chat([{"role": "user", "content": row.src}]) if chat else llm.tokenizer.encode(row.src)
    except ValueError as error:
        raise ValueError(f"row {row.id}: {error}") from error
    if len(ids) > src_length:
        raise ValueError(
            f"row {row.id} has {len(ids)} tokens, --src_length is {src_length}; raise it or shorten the text"
        )
    llm.check_prompt(row.id, ids, params)
    return ids


def _answer(
    llm: LLM,
    rows: list[Row],
    prompts: list[list[int]],
    params: SamplingParams,
    chat: bool,
    output: TextIO | None,
    first: bool,
) -> None:
    """Each row printed or written, in their order, as soon as it and those before it are done; a single one streams."""
    alone = len(rows) == 1 and first
    if alone:
        print(rows[0].src, end="\n" if chat else "", flush=True)
    collectors = {i: Collector(prompt, 0) for i, prompt in enumerate(prompts)}
    done: set[int] = set()
    written = 0
    with progress("generating", len(rows), "row", first and not alone) as bar:
        for i, delta in llm.stream_tokens(prompts, params, chat):
            collectors[i].add(delta)
            if alone:
                print(delta.text, end="" if delta.finish_reason is None else "\n", flush=True)
            if delta.finish_reason is not None:
                done.add(i)
                bar.update(1)
            while written in done:
                row, completion = rows[written], collectors.pop(written).completion()
                if first and not alone and output is None:
                    print(f"[{row.id}] {row.src}{'' if not chat else chr(10)}{completion.text}\n")
                if output is not None:
                    output.write(_record(row, completion) + "\n")
                    output.flush()
                written += 1


def _record(row: Row, completion: Completion) -> str:
    return json.dumps(
        {
            "id": row.id,
            "src": row.src,
            "output": completion.text,
            "output_token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
        },
        ensure_ascii=False,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser("predictor.py", "Generates text with Mixtral, from a checkpoint or an exported program.").parse_args(
        argv
    )
    return run_command(lambda ranks: predict(args, ranks))


if __name__ == "__main__":
    sys.exit(main())
