"""The predictor's files: rows of requests in, rows of answers out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataFileError(ValueError):
    """A data file that cannot be read, or a row that is no request."""


@dataclass(frozen=True)
class Row:
    """A request of a data file: its number, its text, and the reference answer if it has one."""

    id: int
    src: str
    tgt: str | None = None


def read_rows(path: str | Path) -> list[Row]:
    """Rows {"src": text, "tgt": text, optional} of a JSONL file, or of a .json file holding one list of them.

    Raises:
        DataFileError: no such file, not UTF-8, not JSON, or a row without src; names file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataFileError(f"{path}: {error.strerror or error}; --data_file needs a JSONL file") from error
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if path.suffix == ".json":
        values = _parse(text, str(path))
        if not isinstance(values, list):
            raise DataFileError(f"{path}: holds a JSON {type(values).__name__}, a .json data file needs a list of rows")
        numbered = [(f"{path}, element {i}", value) for i, value in enumerate(values)]
    else:
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        numbered = [(where, _parse(line, where)) for where, line in lines]
    if not numbered:
        raise DataFileError(f"{path}: no rows in it")
    return [_row(i, where, value) for i, (where, value) in enumerate(numbered)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataFileError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise DataFileError(f"{where}: JSON nested too deeply to be a request") from error


def _row(number: int, where: str, value: Any) -> Row:
    if not isinstance(value, dict) or not isinstance(value.get("src"), str):
        raise DataFileError(f'{where}: needs an object with a text "src", found {json.dumps(value)[:80]}')
    tgt = value.get("tgt")
    if tgt is not None and not isinstance(tgt, str):
        raise DataFileError(f'{where}: "tgt" is {json.dumps(tgt)[:80]}, needs a text')
    return Row(number, value["src"], tgt)
