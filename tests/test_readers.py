"""Whatever stands in a file: its records, or one line that says what is wrong and where."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import assert_refused, fields

from minift.data import read_rows
from minift.errors import InputError

thorough = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", b"", ("expected rows, got an empty file",)),
        ("a.jsonl", b"\xef\xbb\xbf\n \r\n", ("empty file",)),
        ("a.tsv", b"\n \n\n", ("empty file",)),
        ("a.csv", b"text,label\n\n", ("empty file",)),
        ("a.csv", b"text,label\nx,0\ny,\n",
         (":3:", "a label in column 'label'", "empty", "remove the row")),
        ("a.csv", b'text,label\n"x\ny",0\nz\n',
         (":4:", "expected 2 fields as on line 1, got 1", "quote")),
        ("a.tsv", b"x\t0\ny\tz\t1\n",
         (":2:", "expected 2 fields as on line 1, got 3", "replace a tab")),
        ("a.csv", b'text,label\nx,0\n"y,1\nz,0\n',
         (":3:", 'a closing "', "end of the file", "line 3")),
        ("a.csv", b'"x\ny","z\n0\n', (":2:", "the quote that opens on line 2")),
        ("a.csv", b'"x', (":1:", "opens on line 1")),
        ("a.csv", b'x,0\n"y "z"\n,1\n',
         (":2:", 'a comma after a closing "', "row that starts on line 2", '""')),
        ("a.csv", b'"x,0\n' + b"y,0\n" * (5 << 19), (":1:", 'a closing "', "8 MiB more", "line 1")),
        ("a.csv", b"x,0\ry,1\r", (":1:", "a CR alone", "tr '")),
        ("a.tsv", b"x\t0\ry\t1\r", (":1:", "a CR alone", "tr '")),
        ("a.jsonl", b'{"text": "x"}\r{"text": "y"}', (":1:", "a CR alone")),
        ("a.csv", b"text,label\nx,0\nna\xc3\xafve \xe9t\xe9,1\n",
         (":3:", "byte 0xe9 at column 7", "iconv -f LATIN1 -t UTF-8 FILE > NEW")),
        ("a.csv", "text,label\nx,0\n".encode("utf-16"), ("iconv -f UTF-16 -t UTF-8 FILE > NEW",)),
        ("a.tsv", "x\t0\n".encode("utf-32"), ("iconv -f UTF-32 -t UTF-8",)),
        ("a.csv", "text,label\nx,0\n".encode("utf-16-le"), ("iconv -f UTF-16LE ",)),
        ("a.csv", "text,label\nx,0\n".encode("utf-16-be"), ("iconv -f UTF-16BE ",)),
        ("a.csv", "text,label\nx,0\n".encode("utf-32-le"), ("iconv -f UTF-32LE ",)),
        ("a.csv", "text,label\nx,0\n".encode("utf-32-be"), ("iconv -f UTF-32BE ",)),
        ("a.tsv", b"some text\t0\nb\0\t1\n", (":2:", "NUL", "remove them")),
        ("a.tsv", b"x\t0\n" + b"y" * (8 << 20) + b"z\t1\n",
         (":2:", "8 MiB", "is the file split into lines?")),
        ("a.txt", b"x\n",
         ("expected a name that ends in .csv .tsv .tab .jsonl .ndjson .json", "'.txt'")),
    ],
)  # fmt: skip
def test_broken_files(write, name, content, parts):
    limit = csv.field_size_limit()
    assert_refused(read_rows, write(name, content), *parts)
    assert csv.field_size_limit() == limit


def test_a_line_of_8_mib_is_read(write):
    path = write("a.tsv", b"x\t0\n" + b"y" * ((8 << 20) - 2) + b"\t1\n")
    assert [len(row.text) for row in read_rows(path)] == [1, (8 << 20) - 2]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("[", ("JSON lines", "a list", "jq")),
        ('[{"text": "x", "label": 0}]', ("JSON lines", "a list", "jq")),
        ('"x"', ("one object on each", "a string")),
        ('{"text": "x",', ("at column 14",)),
        ('{"label": 0}', ("a text in column 'text'", "nothing")),
        ('{"text": ["x"], "label": 0}', ("a text in column 'text'", "a list")),
        ('{"text": 3, "label": 0}', ("a text in column 'text'", "a number")),
        ('{"text": "x"}', ("a label in column 'label'", "nothing")),
        ('{"text": "x", "label": null}', ("a label", "nothing")),
        ('{"text": "x", "label": [1]}', ("a label", "a list")),
        ('{"text": "x", "label": {}}', ("a label", "an object")),
        ('{"text": "x", "label": NaN}', ("a label", "a number", "whole number")),
        ('{"text": "x", "label": 0.5}', ("a label", "a number", "whole number")),
        ('{"text": "x", "label": -Infinity}', ("a label", "a number")),
        ('{"text": "x", "label": ' + "1" * 5000 + "}", ("4300 digits",)),
        ('{"text": "\\ud800", "label": 0}', ("surrogates not allowed",)),
        ('{"text": "x", "label": "\\udc00"}', ("surrogates not allowed",)),
        ('{"text": ' + "[" * 100_000, ("recursion",)),
    ],
)
def test_broken_json(write, line, parts):
    path = write("a.jsonl", '{"text": "w", "label": 0}\n\n' + line + "\n")
    assert_refused(read_rows, path, ":3: expected", *parts)


def test_a_json_list_is_not_json_lines(write):
    assert_refused(read_rows, write("a.json", '[\n{"text": "x"}\n]'), ":1:", "JSON lines", "jq")


SOUP = st.lists(
    st.sampled_from(
        [*'x0,\t"[]{}:\\\r\n \ufeff\x85', "text", "label", '{"text":"x","label":', "\\u"]
    )
).map(lambda parts: "".join(parts).encode())


@thorough
@given(content=st.binary() | st.text().map(str.encode) | SOUP, labelled=st.booleans())
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_any_bytes_are_rows_or_one_line(tmp_path_factory, ending, content, labelled):
    path = tmp_path_factory.getbasetemp() / f"soup.{ending}"
    path.write_bytes(content)
    rows, message = [], "rows"
    try:
        rows = read_rows(path, labelled=labelled)
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert all(row.label or not labelled for row in rows)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")) | st.text(
    ',"\n x'
)
FILLED = TEXT.filter(str.strip)


@thorough
@given(rows=st.lists(st.tuples(FILLED, FILLED, FILLED), min_size=1))
def test_written_rows_are_read_back(tmp_path_factory, rows):
    names = ("text", "text2", "label")
    table = io.StringIO(newline="")
    csv.writer(table).writerows([names, *rows])
    objects = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    for ending, content in (("csv", table.getvalue()), ("jsonl", "\n".join(objects))):
        path = tmp_path_factory.getbasetemp() / f"round_trip.{ending}"
        path.write_bytes(content.encode())
        assert fields(read_rows(path)) == rows
