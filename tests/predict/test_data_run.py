"""The engine is fed as it has room: rows are taken late, bad ones in their place, each answered once."""

import json

import pytest

from predict.data_run import ROWS_PER_SEQ, answer_rows
from predict.dataset import DataFile
from predict.engine.engine import Engine
from predict.engine.request import SamplingParams
from tests.predict.paged_runner import PagedRunner

MAX_NUM_SEQS = 3
NUM_ROWS = 50


def encode(src: str) -> list[int]:
    if src == "refused":
        raise ValueError("refused")
    return [int(token) for token in src.split()]


@pytest.fixture
def rows(tmp_path):
    """Prompts of 1 to 7 tokens; rows 10 to 29 are bad in three ways."""
    bad = ["oops", '{"src": "refused"}', '{"src": "-1"}']
    lines = [json.dumps({"src": " ".join(str(4 + (i + k) % 40) for k in range(1 + i % 7))}) for i in range(NUM_ROWS)]
    lines[10:30] = [bad[i % 3] for i in range(20)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    return DataFile(tmp_path / "r.jsonl")


def engine() -> Engine:
    return Engine(PagedRunner(), (3,), 100, max_num_seqs=MAX_NUM_SEQS)


# Rows of other lengths end out of order: drawn with one seed, some meet the end-of-sequence token early.
PARAMS = SamplingParams(max_tokens=20, temperature=3.0)


@pytest.mark.parametrize("in_order", [True, False])
def test_every_row_is_answered_once_in_order_or_as_it_is_done(rows, in_order):
    found = [
        a for step in answer_rows(engine(), rows, range(NUM_ROWS), encode, PARAMS, in_order=in_order) for a in step
    ]
    ids = [answer.id for answer in found]
    assert sorted(ids) == list(range(NUM_ROWS))
    assert (ids == sorted(ids)) == in_order
    for answer in found:
        assert (answer.error is None) == (answer.completion is not None) == (not 10 <= answer.id < 30)
    errors = [answer.error for answer in sorted(found, key=lambda answer: answer.id) if answer.error][:3]
    assert errors[0].startswith("line 11: not JSON")
    assert errors[1:] == ["refused", "the prompt holds token -1, needs ids from 0 to 49"]


def test_rows_are_taken_as_there_is_room(rows):
    taken: list[int] = []
    ids = (taken.append(i) or i for i in range(NUM_ROWS))
    used, answered = engine(), 0
    for step in answer_rows(used, rows, ids, encode, PARAMS, in_order=False):
        answered += len(step)
        assert len(taken) - answered <= ROWS_PER_SEQ * MAX_NUM_SEQS
        stats = used.stats()
        # As long as there are rows, as many run as may.
        assert stats.running + stats.waiting >= MAX_NUM_SEQS or 10 <= taken[-1] < 40 or len(taken) == NUM_ROWS
    assert answered == len(taken) == NUM_ROWS


def test_only_the_rows_asked_for_are_read(rows, monkeypatch):
    read = []
    row = rows.row
    monkeypatch.setattr(rows, "row", lambda i: read.append(i) or row(i))
    found = [a.id for step in answer_rows(engine(), rows, [40, 3], encode, PARAMS) for a in step]
    assert found == read == [40, 3]
