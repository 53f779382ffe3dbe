"""A data file is answered row by row, and killed runs resumed make the file of an undisturbed one."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from predict import command
from predict.predictor import main as predict
from tests.system.test_command_line import ENVIRONMENT, PREDICTOR, TIMEOUT_S, answers, refusal

WORDS = ["module", "function", "value", "object", "list", "path", "error", "class", "method", "raises", "when", "a"]
FLAGS = ["--max_length", "12", "--src_length", "30", "--batch_size", "8", "--threads", "1"]
BAD = {50: '{"src": oops}', 51: '{"tgt": "no question"}', 120: json.dumps({"src": "far too long " * 40})}
NUM_ROWS = 300


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name) -> the flags of a run on a file of NUM_ROWS rows, some of them bad, and its output file."""
    folder = tmp_path_factory.mktemp("rows")
    rng = random.Random(0)
    good = [json.dumps({"src": " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))}) for _ in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(BAD.get(i, row) for i, row in enumerate(good)) + "\n")

    def flags(name: str) -> tuple[list[str], Path]:
        path = folder / name
        return [*FLAGS, "--data_file", str(folder / "rows.jsonl"), "--output_file", str(path)], path

    return flags


@pytest.fixture(scope="module")
def undisturbed(run):
    flags, output = run("undisturbed")
    assert predict(flags) == 0
    return output.read_bytes()


def start(flags: list[str]) -> subprocess.Popen:
    return subprocess.Popen([*PREDICTOR, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)


def wait_for_bytes(process: subprocess.Popen, output: Path, size: int) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not output.exists() or output.stat().st_size < size:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.001)


def test_every_row_is_answered_in_order_and_bad_ones_by_their_error(undisturbed):
    rows = [json.loads(line) for line in undisturbed.splitlines()]
    assert [row["id"] for row in rows] == list(range(NUM_ROWS))
    assert {row["id"]: row["error"][:40] for row in rows if "error" in row} == {
        50: "line 51: not JSON (Expecting value at co",
        51: 'line 52: needs an object with a text "sr',
        120: "the prompt has 242 tokens, --src_length ",
    }
    assert all(row["output_token_ids"] and "src" in row for row in rows if "error" not in row)


def test_killed_at_random_moments_and_resumed_it_ends_as_an_undisturbed_run(run, undisturbed):
    flags, output = run("killed")
    moments, size = [], 0
    for _ in range(3):
        moments.append(size := random.randint(size + 1, size + (len(undisturbed) - size) // 4))
        process = start([*flags, "--resume"])  # the first starts from nothing
        wait_for_bytes(process, output, size)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, moments
        size = output.stat().st_size
        assert undisturbed.startswith(output.read_bytes()), moments
    assert predict([*flags, "--resume"]) == 0
    assert output.read_bytes() == undisturbed, moments


def test_as_they_finish_interrupted_and_torn_every_row_comes_once(run, undisturbed, capsys):
    flags, output = run("finished")
    flags += ["--output_order", "finished"]
    process = start(flags)
    wait_for_bytes(process, output, 2000)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=TIMEOUT_S)[1].decode()
    assert process.returncode == command.INTERRUPTED
    done = len(answers(output))  # whole lines only
    assert 0 < done < NUM_ROWS
    assert f"\nthe rows that are done are in {output}; the same command with --resume goes on\n\ninterrupted\n" in err
    assert "Traceback" not in err
    output.write_bytes(output.read_bytes()[:-5])  # as a kill in mid-write leaves it
    assert predict([*flags, "--resume"]) == 0
    err = capsys.readouterr().err
    assert f"resuming: {done - 1} of {NUM_ROWS} rows are in {output}, without the last line, which is torn" in err
    assert f"{NUM_ROWS} rows, 3 of them with an error; " in err
    assert sorted(output.read_bytes().splitlines()) == sorted(undisturbed.splitlines())

    assert predict([*flags, "--resume", "--model_name_or_path", "/not/needed"]) == 0
    assert f"all {NUM_ROWS} rows are in {output} already" in capsys.readouterr().err


def test_two_runs_do_not_write_one_file(run, capsys):
    flags, output = run("shared")
    process = start(flags)
    wait_for_bytes(process, output, 1)
    process.send_signal(signal.SIGSTOP)  # so that it is still there
    size = output.stat().st_size
    try:
        for more in (["--resume"], []):
            assert "is being written by another run" in refusal(predict, [*flags, *more], capsys)[1]
        assert output.stat().st_size == size
    finally:
        process.kill()
        process.communicate()


def test_no_answer_at_all_is_a_failure(run, capsys):
    flags, output = run("none")
    code, message = refusal(predict, [*flags, "--src_length", "1"], capsys)
    assert code == command.FAILED
    assert f"none of the {NUM_ROWS} rows could be answered; row 0: the prompt has " in message
    assert len(answers(output)) == NUM_ROWS


def test_what_is_no_output_of_these_rows_is_not_resumed(run, capsys):
    flags, output = run("foreign")
    output.write_text('{"id": 0, "src": "mine", "output": ""}\n')
    assert f"{output}, line 1 has another" in refusal(predict, [*flags, "--resume"], capsys)[1]
    assert output.read_text() == '{"id": 0, "src": "mine", "output": ""}\n'


def test_without_an_output_file_rows_are_printed(run, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"src": "The"}\noops\n')
    assert predict(["--data_file", str(tmp_path / "rows.jsonl"), "--max_length", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("[0] The")
    assert out.endswith("\n[1] error: line 2: not JSON (Expecting value at column 1)\n\n")
    assert "2 rows, 1 of them with an error; 2 tokens in " in err
