"""The HTTP server's command line: paddle-mixtral serve MODEL (or this file, under the launcher of several ranks)."""

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

from predict import startup

if __name__ == "__main__":
    startup.begin()  # before Paddle is imported

from predict.arguments import add_engine_flags, add_model_flags, check_device, count, nonempty
from predict.command import run_command
from predict.engine.engine import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS
from predict.followers import RankedRunner, follow
from predict.llm import LLM
from predict.model.weights import DEMO
from predict.parallel import Ranks
from predict.serving.app import create_app
from predict.serving.run import Server, bind
from predict.serving.service import Service

API_KEY_VARIABLE = "PADDLE_MIXTRAL_API_KEY"


def parser() -> argparse.ArgumentParser:
    """The flags of `paddle-mixtral serve`."""
    p = argparse.ArgumentParser(
        "paddle-mixtral serve", description="Serves Mixtral by OpenAI's HTTP API.", allow_abbrev=False
    )
    p.add_argument(
        "model",
        type=nonempty,
        metavar="MODEL",
        nargs="?",
        default=str(DEMO),
        help="checkpoint folder, exported folder, dummy:mixtral-8x7b, or a remote name; default: the demo checkpoint",
    )
    add_model_flags(p.add_argument_group("model"), default_mode="what the folder is")
    engine = p.add_argument_group("engine")
    add_engine_flags(engine)
    engine.add_argument(
        *("--total_max_length", "--max_model_len"),
        type=count,
        metavar="N",
        help="tokens of a prompt and its answer at the most; default: the model's, up to 4096",
    )
    server = p.add_argument_group("server")
    server.add_argument("--host", type=nonempty, metavar="ADDRESS", default="127.0.0.1", help="default: 127.0.0.1")
    server.add_argument("--port", type=_port, metavar="N", default=8000, help="default: 8000; 0: any that is free")
    server.add_argument(
        "--api_key",
        type=nonempty,
        metavar="KEY",
        help=f"asked for on every route but /health; the variable {API_KEY_VARIABLE} keeps it out of `ps`",
    )
    server.add_argument(
        "--served_model_name",
        type=nonempty,
        metavar="NAME",
        help="what clients call the model; default: its folder's name",
    )
    server.add_argument(
        "--chat_template",
        type=nonempty,
        metavar="TEMPLATE",
        help="'default' (the checkpoint's own), 'mixtral' (built in), a template file, or a Jinja template",
    )
    server.add_argument(
        "--drain_timeout",
        type=_seconds,
        metavar="S",
        default=60.0,
        help="seconds that requests under way may take to finish after SIGTERM or Ctrl-C; default: 60",
    )
    server.add_argument(
        "--max_body_bytes", type=count, metavar="N", default=4 << 20, help="of a request; default: 4194304"
    )
    return p


def serve_model(args: argparse.Namespace, ranks: Ranks) -> None:
    """Serves on rank 0, while the other ranks compute with it; returns when the server has ended well.

    Raises:
        SystemExit: the server has ended otherwise; its code says how.
        ValueError: anything that does not fit.
    """
    check_device(args)
    api_key = _api_key(args.api_key)
    if ranks.rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches every rank; rank 0 ends the others
        follow(_load(args, ranks).runner)
        return
    started = time.perf_counter()
    with bind(args.host, args.port) as bound:
        llm = _load(args, ranks)
        print(f"{llm.description}, ready in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        ranked = RankedRunner(llm.runner) if ranks.world_size > 1 else None
        name = args.served_model_name or _served_name(args.model)
        service = Service(llm, name) if ranked is None else Service(llm, name, llm.new_engine(ranked), ranked.check)
        app = create_app(service, api_key, args.max_body_bytes)
        status = Server(service, app, bound, args.drain_timeout).serve_until_ended()
    if service.worker.running:  # in a step that does not end; Python would wait for it, or crash
        os._exit(status)
    if ranked is not None and not service.worker.failed:
        ranked.check()
        ranked.close()
    if status:
        raise SystemExit(status)


def _load(args: argparse.Namespace, ranks: Ranks) -> LLM:
    return LLM(
        args.model,
        mode=args.mode,
        dtype=args.dtype,
        quant_type=args.quant_type,
        max_num_seqs=args.batch_size or DEFAULT_MAX_NUM_SEQS,
        max_num_batched_tokens=args.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS,
        kv_cache_memory=args.kv_cache_memory,
        total_max_length=args.total_max_length,
        block_size=args.block_size,
        threads=args.threads,
        chat_template=None if args.chat_template == "default" else args.chat_template,
        verify=bool(args.verify),
        num_hidden_layers=args.num_hidden_layers,
        device=args.device or "cpu",
        ranks=ranks,
    )


def _api_key(given: str | None) -> str | None:
    """The key from the command line, else from the environment.

    Raises:
        ValueError: it has characters no HTTP header can carry.
    """
    key = os.environ.get(API_KEY_VARIABLE) if given is None else given
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise ValueError(
            f"the API key (--api_key or {API_KEY_VARIABLE}) is empty or has characters no HTTP header can carry; "
            "use printable ASCII without spaces at its ends"
        )
    return key


def _served_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}, needs a port, 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}, needs a number of seconds, 0 or more")
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda ranks: serve_model(args, ranks), step_timeout_s=math.inf)


if __name__ == "__main__":
    sys.exit(main())
