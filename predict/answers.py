"""The predictor's answers to the rows of a data file: a line of JSON each, and what an earlier run left of them."""

import fcntl
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from predict.completion import Completion
from predict.dataset import DataFile, DataFileError

# Of the lines that Answer.line makes, cut anywhere.
_BEGINNING = re.compile(rb'\{("(i(d("(:( (\d.*)?)?)?)?)?)?)?', re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What became of a row: a completion, or the error that kept it from one.

    Attributes:
        id: the row's number.
        src: its text; None if the row has none that could be read.
    """

    id: int
    src: str | None
    completion: Completion | None = None
    error: str | None = None

    def line(self) -> bytes:
        """{"id", "src", "output", "output_token_ids", "finish_reason"} or {"id", "src", "error"}, a line of JSONL."""
        record: dict = {"id": self.id}
        if self.src is not None:
            record["src"] = self.src
        if self.completion is None:
            record["error"] = self.error
        else:
            record["output"] = self.completion.text
            record["output_token_ids"] = self.completion.token_ids
            record["finish_reason"] = self.completion.finish_reason
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left in its output file.

    Attributes:
        ids: rows that have their line, those with an error included.
        bad: how many of them are errors.
        size: bytes of the whole lines; a last line that was torn by a kill comes after them.
        torn: whether there is such a line.
    """

    ids: frozenset[int] = frozenset()
    bad: int = 0
    size: int = 0
    torn: bool = False


def read_earlier(path: Path, rows: DataFile) -> Earlier:
    """What is left to be resumed: nothing if there is no file. Only reads it.

    Raises:
        ValueError: another run is writing the file, or it is not what a run on these rows wrote; names the line.
    """
    if not path.exists():
        return Earlier()
    if not path.is_file():
        raise ValueError(f"--output_file {path} is not a regular file, which --resume needs; leave --resume out")
    ids: set[int] = set()
    bad = size = 0
    with open(path, "rb") as file:
        _lock(file, path, fcntl.LOCK_SH)
        for number, line in enumerate(file, start=1):
            where = f"--output_file {path}, line {number}"
            if not line.endswith(b"\n"):
                if not _BEGINNING.fullmatch(line):
                    raise _not_ours(where, "is no beginning of an answer", rows)
                return Earlier(frozenset(ids), bad, size, torn=True)
            record = _record(line, where, rows)
            if record["id"] in ids:
                raise ValueError(f"{where}: a second line with the id {record['id']}; delete one of them to --resume")
            ids.add(record["id"])
            bad += "error" in record
            size += len(line)
    return Earlier(frozenset(ids), bad, size)


def open_answers(path: Path, size: int) -> BinaryIO:
    """The output file, open for this run alone, after the ``size`` bytes of it that are kept.

    Raises:
        ValueError: another run is writing it, or it has become shorter.
    """
    file = open(path, "ab")  # noqa: SIM115  the caller closes it
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # others hold no content, and runs may share them
            _lock(file, path, fcntl.LOCK_EX)
            if file.tell() < size:
                raise ValueError(f"--output_file {path} has become shorter since it was read; start again")
            file.truncate(size)
    except BaseException:
        file.close()
        raise
    return file


def _lock(file: BinaryIO, path: Path, kind: int) -> None:
    """Holds the file until it is closed; Linux lets go of it when the process dies."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--output_file {path} is being written by another run; wait for its end, or give another file"
        ) from error


def _record(line: bytes, where: str, rows: DataFile) -> dict:
    """The answer in a whole line, if it is one to these rows."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise _not_ours(where, "is not JSON", rows) from None
    row_id = record.get("id") if isinstance(record, dict) else None
    if type(row_id) is not int or not ("output" in record or "error" in record):
        raise _not_ours(where, "is no answer", rows)
    if not 0 <= row_id < len(rows):
        raise _not_ours(where, f"has the id {row_id}, the data file has rows 0 to {len(rows) - 1}", rows)
    try:
        src = rows.row(row_id).src
    except DataFileError:
        src = None
    if record.get("src") != src:
        raise _not_ours(where, f'has another "src" than row {row_id} of the data file', rows)
    return record


def _not_ours(where: str, what: str, rows: DataFile) -> ValueError:
    return ValueError(
        f"{where} {what}; --resume needs what an earlier run on {rows.path} wrote: give the files of one run"
    )
