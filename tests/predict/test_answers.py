"""The output file of a data file: what an earlier run left is read, and nothing else is taken for it."""

import json

import pytest

from predict.answers import Answer, Earlier, open_answers, read_earlier
from predict.completion import Completion
from predict.dataset import DataFile

COMPLETION = Completion([1], 0, "né\u2028", [5, 6], [0.0, 0.0], None, "length", None)
LINES = [
    Answer(0, "a\n{é", COMPLETION).line(),
    Answer(2, "c", error="too long").line(),
    Answer(1, None, error="not JSON").line(),
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"src": "a\n{é"}) + '\noops\n{"src": "c"}\n{"src": "d"}\n')
    return DataFile(path)


def test_a_line_is_a_line_whatever_it_says():
    assert [line.count(b"\n") for line in LINES] == [1, 1, 1]
    assert json.loads(LINES[0]) == {
        **{"id": 0, "src": "a\n{é", "output": "né\u2028", "output_token_ids": [5, 6], "finish_reason": "length"}
    }
    assert json.loads(LINES[1]) == {"id": 2, "src": "c", "error": "too long"}
    assert json.loads(LINES[2]) == {"id": 1, "error": "not JSON"}


def test_cut_anywhere_the_whole_lines_are_kept_and_the_torn_one_is_dropped(tmp_path, rows):
    path, data = tmp_path / "out", b"".join(LINES)
    ends = [len(b"".join(LINES[:i])) for i in range(4)]
    ids = [0, 2, 1]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        earlier = read_earlier(path, rows)
        assert earlier == Earlier(frozenset(ids[:whole]), max(0, whole - 1), ends[whole], cut > ends[whole])
        with open_answers(path, earlier.size) as file:
            file.write(b"next")
        assert path.read_bytes() == b"".join(LINES[:whole]) + b"next"


def test_without_a_file_there_is_nothing_to_keep(tmp_path, rows):
    assert read_earlier(tmp_path / "out", rows) == Earlier()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\n", "line 1 is not JSON"),
        (b"\n", "line 1 is not JSON"),
        (LINES[0] + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
        (b"[0]\n", "line 1 is no answer"),
        (b'{"id": true, "output": ""}\n', "line 1 is no answer"),
        (b'{"id": 0, "src": "a"}\n', "line 1 is no answer"),
        (LINES[0] + Answer(4, "e", error="").line(), "line 2 has the id 4, the data file has rows 0 to 3"),
        (Answer(-1, "e", error="").line(), "line 1 has the id -1, the data file has rows 0 to 3"),
        (Answer(0, "b", COMPLETION).line(), 'line 1 has another "src" than row 0 of the data file'),
        (Answer(0, None, error="not JSON").line(), 'line 1 has another "src" than row 0 of the data file'),
        (Answer(1, "now it is", COMPLETION).line(), 'line 1 has another "src" than row 1 of the data file'),
        (LINES[0] + LINES[1] + LINES[0], "line 3: a second line with the id 0; delete one of them to --resume"),
        (b"precious", "line 1 is no beginning of an answer"),
        (LINES[0] + b'{"id": "a', "line 2 is no beginning of an answer"),
    ],
)
def test_what_these_rows_did_not_make_is_refused_and_left_alone(tmp_path, rows, content, message):
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is looked at
        read_earlier(path, rows)
    assert str(caught.value).startswith(f"--output_file {path}, {message}")
    assert path.read_bytes() == content


def test_a_file_is_written_by_one_run_at_a_time(tmp_path, rows):
    path = tmp_path / "out"
    with open_answers(path, 0) as file:
        file.write(LINES[0])
        file.flush()
        for other in (lambda: open_answers(path, 0), lambda: read_earlier(path, rows)):
            with pytest.raises(ValueError, match="is being written by another run"):
                other()
    assert path.read_bytes() == LINES[0]


def test_what_shrank_in_between_and_what_is_no_file(tmp_path, rows):
    with pytest.raises(ValueError, match="has become shorter"):
        open_answers(tmp_path / "out", 5)
    with pytest.raises(ValueError, match="/dev/null is not a regular file"):
        read_earlier(tmp_path.joinpath("/dev/null"), rows)
    with open_answers(tmp_path.joinpath("/dev/null"), 0), open_answers(tmp_path.joinpath("/dev/null"), 0) as second:
        second.write(b"several runs may")
