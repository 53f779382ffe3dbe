"""The one set of flags predictor and exporter share, and what they mean together."""

import argparse
import os
from pathlib import Path

from ops import RUNTIME_VARIABLE
from ops.device import gpu_place
from predict.engine.request import SamplingParams
from predict.model.config import why_not_on
from predict.model.mixtral import QUANT_TYPES
from predict.model.weights import DEMO

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
ONLY_PATH = "accepted because scripts for PaddleNLP pass it: it names the only path there is, and changes nothing"
# What greedy search has no use for.
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "seed")
REQUEST_FLAGS = (
    *SAMPLING_FLAGS,
    *(
        "batch_size",
        "max_num_batched_tokens",
        "kv_cache_memory",
        "src_length",
        "max_length",
        "total_max_length",
        "decode_strategy",
        "repetition_penalty",
    ),
    *("data_file", "output_file", "output_order", "resume", "prompt", "chat_template"),
)
# What an exported program leaves open: the exporter has no use for it.
PREDICTION_FLAGS = (*REQUEST_FLAGS, "benchmark", "verify")


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The command line of ``prog``. A flag that was not given is None, so that a use without effect can be refused."""
    p = argparse.ArgumentParser(prog, description=description, allow_abbrev=False)
    model = p.add_argument_group("model")
    model.add_argument(
        "--model_name_or_path",
        type=nonempty,
        metavar="MODEL",
        default=str(DEMO),
        help="checkpoint folder, exported folder (--mode static), dummy:mixtral-8x7b (random weights of that size), or "
        "a remote name such as mistralai/Mixtral-8x7B-Instruct-v0.1; default: the demo checkpoint",
    )
    add_model_flags(model, default_mode="dynamic")
    for flag in ("--inference_model", "--block_attn", "--append_attn"):
        model.add_argument(flag, nargs="?", const=True, type=_only_path, help=ONLY_PATH)
    model.add_argument(
        "--output_path", type=nonempty, metavar="DIR", help="exporter: the folder to write; default: ./inference"
    )

    text = p.add_argument_group("requests")
    text.add_argument("--prompt", metavar="TEXT", help="what to continue; in a terminal, asked for if left out")
    text.add_argument(
        "--data_file",
        type=nonempty,
        metavar="FILE",
        help='JSONL rows (or a .json list) {"src": ..., "tgt": ...}, numbered from 0; a row that cannot be answered is '
        "answered by its error, and the run goes on",
    )
    text.add_argument(
        "--output_file",
        type=nonempty,
        metavar="FILE",
        help="JSONL rows {id, src, output, output_token_ids, finish_reason} or {id, src, error}, written as rows are "
        "done; replaced if there is one, but for --resume",
    )
    text.add_argument(
        "--output_order",
        choices=["input", "finished"],
        help="of a data file's answers: as its rows, or as they are done; default: input",
    )
    text.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on with an output file that an earlier run on the same data file, ended in any way, has begun: its "
        "rows are kept (errors too: delete their lines to try again), the others appended; give the same other flags",
    )
    text.add_argument(
        "--chat_template",
        type=nonempty,
        metavar="TEMPLATE",
        help="ask as a chat: 'default' (the checkpoint's), 'mixtral' (built in), a template file, or a Jinja template; "
        "default: none (raw text)",
    )
    add_engine_flags(text)
    text.add_argument("--src_length", type=count, metavar="N", help="tokens of a prompt at the most; default: 1024")
    text.add_argument("--max_length", type=count, metavar="N", help="new tokens at the most; default: 128")
    text.add_argument(
        "--total_max_length", type=count, metavar="N", help="both together; default: src_length + max_length"
    )
    text.add_argument("--benchmark", action="store_true", default=None, help="measure speed: paddle-mixtral bench")

    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--decode_strategy", choices=["greedy_search", "sampling"], help="default: greedy_search")
    sampling.add_argument("--temperature", type=float, metavar="X", help="default: 1")
    sampling.add_argument("--top_p", type=float, metavar="X", help="default: 1 (off)")
    sampling.add_argument("--top_k", type=int, metavar="N", help="default: 0 (off)")
    sampling.add_argument("--min_p", type=float, metavar="X", help="default: 0 (off)")
    sampling.add_argument("--repetition_penalty", type=float, metavar="X", help="default: 1 (off)")
    sampling.add_argument(
        "--seed", type=int, metavar="N", help="of sampling: the same seed gives the same tokens; default: 0"
    )
    return p


def add_model_flags(model: argparse._ArgumentGroup, default_mode: str) -> None:
    """Adds the flags that say how a model is run, whatever it is run for."""
    model.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="float16 runs on GPUs only, float32 on CPUs only; default: the checkpoint's own",
    )
    model.add_argument(
        "--quant_type",
        type=_quant_type,
        metavar="TYPE",
        help="weight_only_int8 (alias: wint8): int8 weights; a8w8: activations in 8 bits, too: faster, less exact",
    )
    model.add_argument("--mode", choices=["dynamic", "static"], help=f"default: {default_mode}")
    model.add_argument("--block_size", type=count, metavar="N", help="tokens in a page of the KV cache; default: 64")
    model.add_argument("--num_hidden_layers", type=count, metavar="N", help="layers of a dummy model")
    model.add_argument(
        "--device",
        choices=["cpu", "gpu"],
        help="gpu: an NVIDIA GPU, with bfloat16 or float16 (or the device of a CustomDevice runtime in the folder "
        f"{RUNTIME_VARIABLE} names, as in tests); default: cpu",
    )
    model.add_argument("--threads", type=count, metavar="N", help="threads of each rank; default: processors / ranks")
    model.add_argument("--verify", action="store_true", default=None, help="static: hash the exported files before use")


def add_engine_flags(engine: argparse._ArgumentGroup) -> None:
    """Adds the flags that say how much runs at a time."""
    engine.add_argument(
        *("--batch_size", "--max_num_seqs"), type=count, metavar="N", help="requests that run together; default: 64"
    )
    engine.add_argument(
        "--max_num_batched_tokens", type=count, metavar="N", help="tokens a step computes at the most; default: 512"
    )
    engine.add_argument(
        "--kv_cache_memory",
        type=_bytes,
        metavar="BYTES",
        help="of each rank's KV cache, such as 8G; default: half of the free memory, or what the requests can use",
    )


def check_device(args: argparse.Namespace) -> None:
    """Refuses what no device here can do, before the model is opened.

    Raises:
        ValueError: --device gpu where there is none or nothing to drive it, or a --dtype that the device does not take.
    """
    if args.device == "gpu":
        try:
            gpu_place()
        except ValueError as error:
            raise ValueError(f"--device gpu: {error}") from error
    if args.dtype is not None and (reason := why_not_on(args.device or "cpu", args.dtype)):
        raise ValueError(f"--dtype {reason}")


def check_benchmark(args: argparse.Namespace) -> None:
    """Refuses flags beside --benchmark that it would ignore.

    Raises:
        ValueError: names the flag.
    """
    for flag in REQUEST_FLAGS:
        if args.benchmark and getattr(args, flag) is not None:
            raise ValueError(f"--{flag} has no effect on --benchmark, which runs requests of its own; leave it out")


def check_output_file(flag: str, path: Path) -> None:
    """Finds out before the model is loaded that a result could not be written.

    Raises:
        ValueError: --flag names a folder, a file in a folder that does not exist, or one this user may not write.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--{flag} {path}: there is no folder {path.parent}; make it, or give another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "is a folder" if path.is_dir() else "is not writable for this user"
        raise ValueError(f"--{flag} {path} {reason}; give another file")


def check_data_flags(args: argparse.Namespace) -> None:
    """Refuses flags of data files where there is none.

    Raises:
        ValueError: names the flag.
    """
    if args.prompt is not None and args.data_file is not None:
        raise ValueError("--prompt and --data_file were both given; give one of them")
    if args.output_order is not None and args.data_file is None:
        raise ValueError("--output_order has no effect without --data_file; leave it out")
    if args.resume and (args.data_file is None or args.output_file is None):
        raise ValueError("--resume goes on with the --output_file of a --data_file; give both")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the sampling flags ask for.

    Raises:
        ValueError: a value out of range, or a flag that greedy search would ignore.
    """
    given = {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}
    if args.decode_strategy == "sampling":
        given.setdefault("temperature", 1.0)
    elif given:
        raise ValueError(f"--{next(iter(given))} has no effect on greedy search; add --decode_strategy sampling")
    if given.get("temperature") == 0:
        raise ValueError("--temperature 0 is greedy search; give a positive one, or --decode_strategy greedy_search")
    if args.repetition_penalty is not None:
        given["repetition_penalty"] = args.repetition_penalty
    return SamplingParams(max_tokens=128 if args.max_length is None else args.max_length, **given)


def count(text: str) -> int:
    """An argument's type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, needs an integer of at least 1")
    return int(text)


def _bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isdecimal() or int(number) < 1 or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}, needs a number of bytes, such as 8G (units of 1024: K, M, G, T)")
    return int(number) * UNITS[unit]


def nonempty(text: str) -> str:
    """An argument's type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty; name something, or leave the flag out")
    return text


def _quant_type(text: str) -> str:
    name = "weight_only_int8" if text == "wint8" else text
    if name not in QUANT_TYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not supported; use weight_only_int8 (or wint8) or a8w8, or leave the flag out"
        )
    return name


def _only_path(text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    raise argparse.ArgumentTypeError(
        f"{text!r}: this is the only path there is and cannot be switched off; leave the flag out"
    )
