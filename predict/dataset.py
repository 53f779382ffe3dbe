"""The predictor's rows of requests: one file in memory, each row understood when it is wanted."""

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


class DataFile:
    """Rows {"src": text, "tgt": text, optional} of a JSONL file, or of a .json file holding one list of them.

    Rows are numbered from 0; empty lines are no rows. The file is read once, so it may be a pipe, and whatever happens
    to it afterwards changes nothing; a line of JSONL is decoded and parsed by :meth:`row`.

    Raises:
        DataFileError: no such file, a .json file that is no list, or no row in it is a request; names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            data = self.path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        except OSError as error:
            raise DataFileError(f"{path}: {error.strerror or error}; --data_file needs a JSONL file") from error
        self._elements: list[Any] | None = None
        self._lines: list[tuple[int, bytes]] = []
        if self.path.suffix == ".json":
            self._elements = _list(data, str(path))
        else:
            self._lines = [(i, line) for i, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
        self._refuse_if_none_is_a_request()

    def __len__(self) -> int:
        return len(self._lines if self._elements is None else self._elements)

    def row(self, i: int) -> Row:
        """Row number i, 0 to len - 1.

        Raises:
            DataFileError: it is not UTF-8, not JSON, or no object with a text "src"; names line or element.
        """
        if self._elements is not None:
            return _row(i, f"element {i}", self._elements[i])
        number, line = self._lines[i]
        return _row(i, f"line {number}", _parse(line, f"line {number}"))

    def _refuse_if_none_is_a_request(self) -> None:
        """Another kind of file is found out here, not by a thousand bad rows after the model was loaded."""
        if not len(self):
            raise DataFileError(f"{self.path}: no rows in it")
        first_error = None
        for i in range(len(self)):
            try:
                self.row(i)
                return
            except DataFileError as error:
                first_error = first_error or error
        raise DataFileError(f"{self.path}: none of its rows is a request; {first_error}")


def _list(data: bytes, where: str) -> list[Any]:
    value = _parse(data, where)
    if not isinstance(value, list):
        raise DataFileError(f"{where}: holds a JSON {type(value).__name__}, a .json data file needs a list of rows")
    return value


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise DataFileError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise DataFileError(f"{where}: not JSON ({error.msg} at {place} {error.colno})") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataFileError(f"{where}: a number too long to be read") from error
    except RecursionError as error:
        raise DataFileError(f"{where}: JSON nested too deeply to be a request") from error


def _row(number: int, where: str, value: Any) -> Row:
    if not isinstance(value, dict) or not isinstance(value.get("src"), str):
        raise DataFileError(f'{where}: needs an object with a text "src", found {json.dumps(value)[:80]}')
    src, tgt = value["src"], value.get("tgt")
    if tgt is not None and not isinstance(tgt, str):
        raise DataFileError(f'{where}: "tgt" is {json.dumps(tgt)[:80]}, needs a text')
    try:
        src.encode()
    except UnicodeEncodeError as error:
        raise DataFileError(f'{where}: "src" holds half a character ({src[error.start]!a} alone)') from error
    return Row(number, src, tgt)
