"""The command lines: every flag works or is refused in one sentence; nothing ends in a traceback."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from export.export_model import main as export
from predict import command
from predict.llm import LLM
from predict.predictor import main as predict

ROOT = Path(__file__).resolve().parents[2]
PREDICTOR = [sys.executable, str(ROOT / "predict" / "predictor.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
TIMEOUT_S = 120
THE = ["--prompt", "The", "--max_length", "3"]
ROWS = ["This module provides", "The", "Return"]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"src": row}) + "\n" for row in ROWS))
    return str(path)


def status(main, arguments) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # argparse
        return end.code


def refusal(main, arguments, capsys) -> tuple[int, str]:
    """Exit status and message of a command that prints nothing else but progress."""
    code = status(main, arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    [message] = [line for line in err.splitlines() if "error: " in line]
    return code, message


def answers(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


USAGE = {
    "--nope": "unrecognized arguments: --nope",
    "--mod static": "unrecognized arguments: --mod static",
    "--dtype int4": "invalid choice: 'int4'",
    "--mode eager": "invalid choice: 'eager'",
    "--device tpu": "invalid choice: 'tpu'",
    "--decode_strategy beam": "invalid choice: 'beam'",
    "--quant_type int4": "'int4' is not supported; use weight_only_int8 (or wint8) or a8w8",
    "--block_attn false": "'false': this is the only path there is and cannot be switched off",
    "--threads x": "argument --threads: 'x', needs an integer of at least 1",
    "--temperature hot": "argument --temperature: invalid float value: 'hot'",
    **{
        f"--{flag} {value}": f"argument --{flag}: '{value}', needs an integer of at least 1"
        for flag in ("threads", "block_size", "src_length", "max_length", "total_max_length", "max_num_batched_tokens")
        for value in (0, -1)
    },
    "--batch_size 0": "argument --batch_size/--max_num_seqs: '0', needs an integer of at least 1",
    "--kv_cache_memory 5X": "argument --kv_cache_memory: '5X', needs a number of bytes, such as 8G",
    "--kv_cache_memory 0": "needs a number of bytes",
    "--num_hidden_layers 0": "needs an integer of at least 1",
    **{
        f"--{flag} ": f"argument --{flag}: '' is empty"
        for flag in ("model_name_or_path", "output_path", "data_file", "output_file", "chat_template")
    },
}


@pytest.mark.parametrize("flags", USAGE)
@pytest.mark.parametrize("main", [predict, export], ids=["predict", "export"])
def test_usage_errors_exit_with_2(main, flags, capsys):
    code, message = refusal(main, flags.split(" "), capsys)
    assert code == 2
    assert USAGE[flags] in message


SAMPLED = "--prompt The --decode_strategy sampling"
REFUSED = {
    "--model_name_or_path /nope": "/nope does not exist; needs a checkpoint folder, dummy:mixtral-8x7b, or a remote",
    "--model_name_or_path dummy:nope": "dummy:nope: no configuration 'nope'; needs one of",
    "--model_name_or_path /nope --mode static": "/nope: no such folder; make one with export_model.py",
    "--mode static": "no manifest.json, so this is no exported model",
    "--verify": "verify is for exported folders (mode static)",
    "--num_hidden_layers 2": "--num_hidden_layers is for dummy models",
    "--dtype float16": "--dtype is float16, which runs on GPUs only; use --dtype bfloat16 or float32",
    "--output_path x": "--output_path is where the exporter writes; the predictor writes answers to --output_file",
    "--threads 100000": "threads is 100000, needs 1 to 1024",
    "--kv_cache_memory 900T": "more than there is free for a rank",
    "--kv_cache_memory 1K": "hold no page: 64 tokens of",
    "--max_length 100000": "is 101024, needs 2 to 2048, the model's max_position_embeddings; lower it",
    "--src_length 1 --prompt The": "the prompt has 2 tokens, --src_length is 1; raise it or shorten the text",
    "--total_max_length 2 --prompt The": "prompt 0: the prompt has 2 tokens, total_max_length is 2: no room",
    "--temperature 0.5": "--temperature has no effect on greedy search; add --decode_strategy sampling",
    "--top_p 0.5": "--top_p has no effect on greedy search",
    "--top_k 5": "--top_k has no effect on greedy search",
    "--min_p 0.5 --decode_strategy greedy_search": "--min_p has no effect on greedy search",
    "--seed 5": "--seed has no effect on greedy search",
    f"{SAMPLED} --temperature 0": "--temperature 0 is greedy search; give a positive one",
    f"{SAMPLED} --temperature nan": "temperature is nan, needs a number >= 0",
    f"{SAMPLED} --top_p nan": "top_p is nan, needs a number above 0 and up to 1",
    f"{SAMPLED} --top_k -1": "top_k is -1, needs an integer from 0 (off) to 2^31 - 1",
    f"{SAMPLED} --top_k 99999999999999999999": "top_k is 99999999999999999999, needs",
    f"{SAMPLED} --min_p 2": "min_p is 2.0, needs a number from 0 (off) to 1",
    f"{SAMPLED} --seed -1": "seed is -1, needs an integer from 0 to 2^63 - 1",
    "--repetition_penalty nan": "repetition_penalty is nan, needs a positive number",
    "--prompt a --data_file b": "--prompt and --data_file were both given; give one of them",
    "--output_order finished": "--output_order has no effect without --data_file; leave it out",
    "--resume --output_file a": "--resume goes on with the --output_file of a --data_file; give both",
    "--resume --data_file a": "--resume goes on with the --output_file of a --data_file; give both",
    "--data_file /nope.jsonl": "/nope.jsonl: No such file or directory; --data_file needs a JSONL file",
    "--output_file /nope/a": "--output_file /nope/a: there is no folder /nope; make it, or give another file",
    "--output_file /": "--output_file / is a folder; give another file",
    "--output_file /dev/full --prompt The --max_length 1": "the output could not be written (No space left on device)",
    "--benchmark --resume": "--resume has no effect on --benchmark",
    "--chat_template /nope": "chat template '/nope' is neither 'mixtral', nor a file, nor a Jinja template",
    "--chat_template {{oops": "the given chat template has a syntax error",
    **{
        f"--benchmark --{flag} {value}": f"--{flag} has no effect on --benchmark"
        for flag, value in {
            **{"prompt": "a", "data_file": "a", "output_file": "a", "chat_template": "mixtral", "batch_size": 2},
            **{"output_order": "input"},
            **{"src_length": 2, "max_length": 2, "total_max_length": 2, "decode_strategy": "sampling", "seed": 1},
            **{"max_num_batched_tokens": 9, "kv_cache_memory": 9},
            **{"temperature": 1, "top_p": 1, "top_k": 1, "min_p": 0, "repetition_penalty": 1},
        }.items()
    },
}


@pytest.mark.parametrize("flags", REFUSED)
def test_the_predictor_refuses_in_one_sentence(flags, capsys):
    if "/dev/full" in flags:  # found while writing: the answer is on the screen by then
        assert status(predict, flags.split(" ")) == command.FAILED
        assert REFUSED[flags] in capsys.readouterr().err
        return
    code, message = refusal(predict, flags.split(" "), capsys)
    assert code == command.FAILED
    assert REFUSED[flags] in message


FOR_THE_PREDICTOR = {
    **{"batch_size": "1", "src_length": "1", "max_length": "1", "total_max_length": "9", "data_file": "a"},
    **{"output_order": "input"},
    **{"output_file": "a", "prompt": "a", "chat_template": "a", "decode_strategy": "sampling", "temperature": "1"},
    **{"max_num_batched_tokens": "9", "kv_cache_memory": "9"},
    **{"top_p": "1", "top_k": "1", "min_p": "1", "repetition_penalty": "1", "seed": "1"},
}


@pytest.mark.parametrize(
    "flags", [["--benchmark"], ["--verify"], ["--resume"], *([f"--{f}", v] for f, v in FOR_THE_PREDICTOR.items())]
)
def test_the_exporter_refuses_what_an_export_does_not_depend_on(flags, capsys):
    code, message = refusal(export, flags, capsys)
    assert code == command.FAILED
    assert f"{flags[0]} is for predicting, an export does not depend on it; give it to predictor.py" in message


def test_the_exporter_refuses_what_it_cannot_export_or_write(exported, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    inference = str(exported("bfloat16", None))
    for flags, message in {
        f"--output_path {tmp_path}": "holds mine, which no export wrote; give an empty or new folder",
        f"--output_path {tmp_path}/mine": "cannot be made (there is a file of that name); give another folder",
        "--output_path /proc/nope": "--output_path /proc/nope cannot be made",
        f"--model_name_or_path {inference}": "is an exported model, which holds no checkpoint; give the checkpoint",
        "--mode static": "--mode static: the exporter reads a checkpoint, which is dynamic; leave --mode out",
        "--device gpu": "--device gpu: an export is the same for every device; leave --device out",
    }.items():
        code, found = refusal(export, flags.split(), capsys)
        assert code == command.FAILED
        assert message in found
    assert not Path("inference").exists()


def test_export_then_static_gives_the_rows_of_dynamic(tmp_path, data_file, capsys):
    accepted = ["--inference_model", "--block_attn", "1", "--append_attn", "true", "--device", "cpu", "--threads", "2"]
    kind = ["--dtype", "float32", "--quant_type", "wint8", "--block_size", "16", *accepted]
    out = str(tmp_path / "inference")
    assert export(["--output_path", out, "--mode", "dynamic", *kind]) == 0
    assert "float32 weight_only_int8, 1 rank(s)" in capsys.readouterr().out

    lengths = ["--src_length", "20", "--max_length", "4", "--total_max_length", "24", "--max_num_seqs", "2"]
    lengths += ["--max_num_batched_tokens", "7", "--kv_cache_memory", "8M"]
    sampling = ["--decode_strategy", "sampling", "--temperature", "0.8", "--top_p", "0.9", "--top_k", "40"]
    sampling += ["--min_p", "0.01", "--repetition_penalty", "1.1", "--seed", "3"]
    for mode, model in (("dynamic", []), ("static", ["--model_name_or_path", out, "--verify"])):
        flags = ["--mode", mode, *model, *kind, *lengths, *sampling, "--data_file", data_file]
        assert predict([*flags, "--output_file", str(tmp_path / mode)]) == 0
        assert "generating" in capsys.readouterr().err
    rows = answers(tmp_path / "static")
    assert rows == answers(tmp_path / "dynamic")
    assert [(row["id"], row["src"]) for row in rows] == list(enumerate(ROWS))
    assert all(row.keys() == {"id", "src", "output", "output_token_ids", "finish_reason"} for row in rows)


@pytest.mark.parametrize("template", [None, "none", "default", "mixtral", "{{ messages[0]['content'] }}", "file"])
def test_chat_templates(demo, tmp_path, capsys, template):
    (tmp_path / "t.jinja").write_text("{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]")
    value = str(tmp_path / "t.jinja") if template == "file" else template
    flags = [] if template is None else ["--chat_template", value]
    assert predict([*THE, *flags, "--output_file", str(tmp_path / "out")]) == 0
    llm = LLM(demo, chat_template=None if template in (None, "none", "default") else value)
    raw = template in (None, "none")
    prompt = llm.tokenizer.encode("The") if raw else llm.encode_chat([{"role": "user", "content": "The"}])
    [row] = answers(tmp_path / "out")
    assert row["output_token_ids"] == llm.generate([prompt], predictor_params())[0].token_ids
    # What streams to the screen is what the file holds.
    assert capsys.readouterr().out == f"The{'' if raw else chr(10)}{row['output']}\n"


def predictor_params():
    from predict.engine.request import SamplingParams

    return SamplingParams(max_tokens=3)


def test_a_file_is_not_replaced_by_a_command_that_fails(tmp_path, data_file, capsys):
    assert "is the --data_file" in refusal(predict, ["--data_file", data_file, "--output_file", data_file], capsys)[1]
    (tmp_path / "old").write_text("precious")
    flags = ["--data_file", data_file, "--max_length", "100000", "--output_file", str(tmp_path / "old")]
    assert "max_position_embeddings" in refusal(predict, flags, capsys)[1]
    assert (tmp_path / "old").read_text() == "precious"
    assert len(Path(data_file).read_text().splitlines()) == len(ROWS)


def test_without_prompt_file_or_terminal_an_example_is_continued(capsys):
    assert predict(["--max_length", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("This module provides")
    assert "no --prompt, no --data_file and no terminal to ask in: continuing 'This module provides'" in err


def shell(script: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script.replace("PREDICTOR", " ".join(PREDICTOR))],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=TIMEOUT_S,
        cwd=ROOT,
    )


def test_a_reader_that_has_seen_enough_ends_the_predictor_quietly():
    result = shell("PREDICTOR --prompt The --max_length 300 | head -1; exit ${PIPESTATUS[0]}")
    assert result.returncode == command.FAILED
    assert "rror" not in result.stderr


def test_closed_streams_and_a_narrow_locale_do_no_harm(tmp_path):
    result = shell(
        f"PREDICTOR --prompt naïve --max_length 1 --output_file {tmp_path}/a >&- 2>&- <&-; "
        f"PREDICTOR --prompt naïve --max_length 1 --output_file {tmp_path}/b",
        LC_ALL="C",
        PYTHONIOENCODING="ascii",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("na\\xefve")
    assert answers(tmp_path / "a") == answers(tmp_path / "b")


def test_a_broken_installation_is_named_without_a_traceback():
    result = shell("PREDICTOR --prompt The", PADDLE_MIXTRAL_ISA="nope")
    assert result.returncode == 1
    assert result.stderr.startswith("error: PADDLE_MIXTRAL_ISA is 'nope', which this processor or build does not have;")


def test_the_installed_command_has_them_all():
    main = f"{sys.executable} -m predict.main"
    result = shell(
        f"{main}; {main} --help; {main} predict --nope; {main} export --nope; {main} serve --nope; {main} bench --nope"
    )
    assert result.returncode == 2
    assert result.stdout.startswith("usage: paddle-mixtral {predict,export,serve,bench} ...")
    assert result.stderr.count("unrecognized arguments: --nope") == 3
    assert "the following arguments are required: MODEL" in result.stderr


@pytest.mark.parametrize("moment", ["while Paddle is imported", "while weights are loaded"])
def test_ctrl_c_leaves_no_traceback(moment):
    flags = ["--model_name_or_path", "dummy:mixtral-8x7b", "--num_hidden_layers", "2", *THE]
    process = subprocess.Popen(
        [*PREDICTOR, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    if moment == "while Paddle is imported":
        while "libpaddle" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
    else:
        process.stderr.read(len("\rloading weights:"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert out == ""
    assert "Traceback" not in err
    if moment == "while Paddle is imported":
        assert process.returncode == -signal.SIGINT  # 130 in a shell
    else:
        assert process.returncode == command.INTERRUPTED
        assert err.endswith("\ninterrupted\n")


def test_a_terminal_is_asked_for_the_prompt():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PREDICTOR, "--max_length", "3"], stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT
    )
    os.close(theirs)
    deadline = threading.Timer(TIMEOUT_S, process.kill)
    deadline.start()
    screen = b""
    try:
        while data := os.read(ours, 1000):
            screen += data
            if screen.endswith(b"Prompt: "):
                os.write(ours, b"The\n")
    except OSError:  # how Linux reports that the other side is closed
        pass
    deadline.cancel()
    os.close(ours)
    assert process.wait() == 0, screen
    text = screen.decode().replace("\r", "\n")
    assert text.startswith("Prompt: The\n")
    # The answer follows the prompt again, after the progress of loading.
    assert "\nThe" in text.partition(" ready in ")[2]
