"""Data files: what is read, and the sentence that refuses what cannot be."""

import json

import pytest

from predict.dataset import DataFile, DataFileError, Row


def read_rows(path) -> list[Row]:
    rows = DataFile(path)
    return [rows.row(i) for i in range(len(rows))]


def test_jsonl_and_a_json_list_hold_the_same_rows(tmp_path):
    rows = [{"src": "one", "tgt": "1"}, {"src": "two", "other": 2}, {"src": ""}]
    expected = [Row(0, "one", "1"), Row(1, "two"), Row(2, "")]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    assert read_rows(tmp_path / "rows.jsonl") == expected
    assert read_rows(tmp_path / "rows.json") == expected


def test_only_a_newline_ends_a_row(tmp_path):
    """U+2028, form feed and others end a line for str.splitlines, but may stand in a JSON string."""
    text = "a\u2028b\u0085c\x7f"
    (tmp_path / "rows.jsonl").write_bytes((json.dumps({"src": text}, ensure_ascii=False) + "\r\n").encode())
    assert read_rows(tmp_path / "rows.jsonl") == [Row(0, text)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"src": "a"}')
    assert read_rows(tmp_path / "rows.jsonl") == [Row(0, "a")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "r.jsonl",
            b"\x00\xff",
            "none of its rows is a request; line 1: not UTF-8 text (invalid start byte at byte 1)",
        ),
        ("r.json", b"[\xff]", "not UTF-8 text (invalid start byte at byte 1)"),
        ("r.jsonl", b"", "no rows in it"),
        ("r.jsonl", b"\n \n", "no rows in it"),
        ("r.json", b"[]", "no rows in it"),
        ("r.json", b'{"src": "a"}', "holds a JSON dict, a .json data file needs a list of rows"),
        ("r.json", b'[\n{"src": "a"}, oops]', "not JSON (Expecting value at line 2, column 15)"),
        ("r.jsonl", b'"src": "a"}\n{oops', "none of its rows is a request; line 1: not JSON (Extra data at column 6)"),
        ("r.jsonl", b'\n{"tgt": "a"}', 'line 2: needs an object with a text "src", found {"tgt": "a"}'),
        ("r.jsonl", b'{"src": 1}', 'needs an object with a text "src", found {"src": 1}'),
        ("r.jsonl", b'"src"', 'needs an object with a text "src", found "src"'),
        ("r.json", b'[{"tgt": "a"}, 2]', "none of its rows is a request; element 0: needs an object"),
        ("r.jsonl", b"[" * 100_000, "line 1: JSON nested too deeply"),
    ],
)
def test_what_is_no_data_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError) as caught:
        read_rows(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataFileError, match=r"absent\.jsonl: No such file or directory; --data_file needs a JSONL"):
        read_rows(tmp_path / "absent.jsonl")


def test_a_row_that_is_no_request_says_why_and_leaves_the_others_alone(tmp_path):
    bad = {
        b"{oops": "line 3: not JSON (Expecting property name",
        b'{"src": "\xff"}': "line 3: not UTF-8 text (invalid start byte at byte 9)",
        b'{"src": "b", "tgt": 2}': 'line 3: "tgt" is 2, needs a text',
        b'{"src": "b\\ud800"}': "line 3: \"src\" holds half a character ('\\ud800' alone)",
        b'{"src": ' + b"1" * 5000 + b"}": "line 3: a number too long to be read",
        b"[" * 100_000: "line 3: JSON nested too deeply to be a request",
    }
    for line, message in bad.items():
        (tmp_path / "r.jsonl").write_bytes(b'{"src": "a"}\n\n' + line + b'\n{"src": "c"}')
        rows = DataFile(tmp_path / "r.jsonl")
        assert (len(rows), rows.row(0), rows.row(2)) == (3, Row(0, "a"), Row(2, "c"))
        with pytest.raises(DataFileError) as caught:
            rows.row(1)
        assert str(caught.value).startswith(message)


def test_what_happens_to_the_file_later_changes_nothing(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"src": "a"}\n{"src": "b"}')
    rows = DataFile(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("")
    assert rows.row(1) == Row(1, "b")
