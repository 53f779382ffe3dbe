"""The command line that generates: one model, dynamic or static, on one rank or many.

python ./predict/predictor.py --model_name_or_path DIR --dtype bfloat16 --mode dynamic --inference_model --append_attn
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from predict import startup

if __name__ == "__main__":
    startup.begin()  # before Paddle is imported

from predict.answers import Answer, Earlier, open_answers, read_earlier
from predict.arguments import (
    check_benchmark,
    check_data_flags,
    check_device,
    check_output_file,
    parser,
    sampling_params,
)
from predict.bench.command import run_bench
from predict.command import run_command
from predict.completion import Collector
from predict.data_run import run_data_file
from predict.dataset import DataFile
from predict.engine.engine import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS
from predict.engine.request import SamplingParams
from predict.llm import LLM
from predict.model.chat import load_chat_template
from predict.parallel import Ranks

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
    check_data_flags(args)
    params = sampling_params(args)
    src_length = DEFAULT_SRC_LENGTH if args.src_length is None else args.src_length
    total_max_length = _total_max_length(args, src_length, params)
    rows = None if args.data_file is None else DataFile(args.data_file)
    prompt = _prompt(args, ranks) if rows is None else None
    output = None if args.output_file is None else Path(args.output_file)
    if output is not None:
        _check_output_file(output, args.data_file)
    # Every rank reads it before the model is loaded, where they meet; rank 0 writes it afterwards.
    earlier = read_earlier(output, rows) if output and rows and args.resume else Earlier()
    if rows is not None and len(earlier.ids) == len(rows) and not earlier.torn:
        if ranks.rank == 0:
            print(f"all {len(rows)} rows are in {output} already", file=sys.stderr)
        return
    llm = _load(args, ranks, total_max_length)
    chat = args.chat_template not in (None, "none")

    def encode(src: str) -> list[int]:
        ids = llm.encode_chat([{"role": "user", "content": src}]) if chat else llm.tokenizer.encode(src)
        if len(ids) > src_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, --src_length is {src_length}; raise it or shorten the text"
            )
        return ids

    if chat:
        load_chat_template(llm.tokenizer, llm.chat_template)  # a missing one is no fault of the rows
    if prompt is not None:
        ids = encode(prompt)
        llm.check_prompt(0, ids, params)
        with open_answers(output, 0) if output and ranks.rank == 0 else nullcontext() as file:
            answer = _answer(llm, prompt, ids, params, chat, ranks.rank == 0)
            if file is not None:
                file.write(answer.line())
    elif rows is not None:
        run_data_file(
            llm,
            rows,
            encode,
            params,
            chat=chat,
            in_order=args.output_order != "finished",
            output=output,
            earlier=earlier,
        )


def _prompt(args: argparse.Namespace, ranks: Ranks) -> str:
    if args.prompt is not None:
        return args.prompt
    if ranks.world_size == 1 and sys.stdin.isatty():
        try:
            return input("Prompt: ")
        except EOFError:
            raise ValueError("no prompt was typed; type one, or give --prompt or --data_file") from None
    if ranks.rank == 0:
        print(f"no --prompt, no --data_file and no terminal to ask in: continuing {EXAMPLE_PROMPT!r}", file=sys.stderr)
    return EXAMPLE_PROMPT


def _check_output_file(path: Path, data_file: str | None) -> None:
    """Finds out before the model is loaded that the answers could not be written, or would replace the questions."""
    check_output_file("output_file", path)
    if data_file is not None and path.exists() and path.samefile(data_file):
        raise ValueError(f"--output_file {path} is the --data_file, which it would replace; give another file")


def _total_max_length(args: argparse.Namespace, src_length: int, params: SamplingParams) -> int | None:
    if args.total_max_length is not None:
        return args.total_max_length
    return None if args.src_length is None and args.max_length is None else src_length + params.max_tokens


def _load(args: argparse.Namespace, ranks: Ranks, total_max_length: int | None) -> LLM:
    started = time.perf_counter()
    llm = LLM(
        args.model_name_or_path,
        mode=args.mode or "dynamic",
        dtype=args.dtype,
        quant_type=args.quant_type,
        max_num_seqs=args.batch_size or DEFAULT_MAX_NUM_SEQS,
        max_num_batched_tokens=args.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS,
        kv_cache_memory=args.kv_cache_memory,
        total_max_length=total_max_length,
        block_size=args.block_size,
        threads=args.threads,
        chat_template=None if args.chat_template in (None, "none", "default") else args.chat_template,
        verify=bool(args.verify),
        num_hidden_layers=args.num_hidden_layers,
        device=args.device or "cpu",
        ranks=ranks,
    )
    if ranks.rank == 0:
        print(f"{llm.description}, ready in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return llm


def _answer(llm: LLM, prompt: str, ids: list[int], params: SamplingParams, chat: bool, show: bool) -> Answer:
    """The answer to a single prompt, which streams to the screen."""
    if show:
        print(prompt, end="\n" if chat else "", flush=True)
    collector = Collector(ids, 0)
    for _, delta in llm.stream_tokens([ids], params, chat):
        collector.add(delta)
        if show:
            print(delta.text, end="" if delta.finish_reason is None else "\n", flush=True)
    return Answer(0, prompt, collector.completion())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser("predictor.py", "Generates text with Mixtral, from a checkpoint or an exported program.").parse_args(
        argv
    )
    return run_command(lambda ranks: predict(args, ranks))


if __name__ == "__main__":
    sys.exit(main())
