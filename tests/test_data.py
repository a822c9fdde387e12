"""Files in, rows or one line of explanation out."""

import hashlib
from pathlib import Path

import pytest

from minift.data import Columns, Row, fingerprint, read_rows, read_texts, stratified_split
from minift.errors import InputError

DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data is not at {DATA}")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def fields(rows: list[Row]) -> list[tuple]:
    return [(row.text, row.pair, row.label) for row in rows]


def assert_refused(read, path, *parts: str, **options) -> None:
    """`read` raises one line that begins with the file and holds `parts`."""
    with pytest.raises(InputError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\nx,0\n"y, z",1\n'),
        ("a.CSV", '\ufefftext,label\r\nx,0\r\n"y, z",1'),
        ("a.csv", '\n label ,TEXT\n0,x\n \n1,"y, z"\n\n'),
        ("a.csv", 'id,question,Label_Text,label\n7,x,no,0\n8,"y, z",yes,1\n'),
        ("a.csv", 'x,0\n"y, z",1\n'),
        ("a.tsv", "x\t0\r\ny, z\t1\r\n"),
        ("a.tab", "0\tx\n1\ty, z\n0\tw\n"),  # fewest values: the label
        ("a.tsv", "sentiment\tsentence\n0\tx\n1\ty, z\n"),
        ("a.jsonl", '{"text": "x", "label": "0"}\r\n\n{"label": 1, "text": "y, z"}\n'),
        ("a.ndjson", '\ufeff{"Review": "x", "class": 0}\n{"Review": "y, z", "class": 1.0}\n'),
        ("a.json", '{"text": "x", "label": 0, "score": null}\n{"text": "y, z", "label": "1"}'),
    ],
)
def test_formats(write, name, content):
    assert fields(read_rows(write(name, content)))[:2] == [("x", None, "0"), ("y, z", None, "1")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", "sentence1\tsentence2\tlabel\nx\ty\t0\n", ("x", "y", "0")),
        ("a.csv", "hypothesis,premise,label\ny,x,0\n", ("x", "y", "0")),
        ("a.tsv", "x\t0\ty\nw\t0\tz\n", ("x", "y", "0")),  # fewest values: the label
        ("a.tsv", "x\ty\t0\n", ("x", "y", "0")),  # a tie: the last is the label
        ("a.jsonl", '{"text": "x", "text2": "y", "label": true}\n', ("x", "y", "true")),
        ("a.jsonl", '{"text": "x", "label": false, "score": [1]}\n', ("x", None, "false")),
        ("a.tsv", '"x\t"0"\n', ('"x', None, '"0"')),  # no quoting
        ("a.tsv", "x\x85y\u2028z\x0b\t0\n", ("x\x85y\u2028z\x0b", None, "0")),
        ("a.csv", 'x,"a ""b""\nc"\n', ("x", None, 'a "b"\nc')),
        ("a.jsonl", '{"text": "x", "label": "\\"b\\"\\nc"}', ("x", None, '"b"\nc')),
        ("a.jsonl", '{"text": "\\ud83d\\ude00", "label": 0}', ("\U0001f600", None, "0")),
    ],
)
def test_what_stands_where(write, name, content, expected):
    assert fields(read_rows(write(name, content)))[0] == expected


@pytest.mark.parametrize(
    ("columns", "content", "expected"),
    [
        (Columns(text="b", label="c"), "a,b,c\n1,x,y\n", [("x", None, "y")]),
        (Columns("b", "a", "c"), "a,b,c\n1,x,y\n", [("x", "1", "y")]),
        (Columns(label="a"), "a,text\n1,x\n", [("x", None, "1")]),
        (Columns(pair=""), "text,answer,label\nx,y,1\n", [("x", None, "1")]),
        (Columns(text="2", label="3"), "1,x,y\n", [("x", None, "y")]),
        (Columns(text="2", label="1"), "label,text\n1,x\n", [("x", None, "1")]),
        (Columns("4", "2", "1"), "0,b,c,d\n", [("d", "b", "0")]),
        (Columns(label="1"), "a,b\nc,b\n", [("b", None, "a"), ("b", None, "c")]),
        (Columns("1", label="2"), "so?,question\ny,no\n", [("so?", None, "question"),
         ("y", None, "no")]),
    ],
)  # fmt: skip
def test_chosen_columns(write, columns, content, expected):
    assert fields(read_rows(write("a.csv", content), columns)) == expected


@pytest.mark.parametrize(
    ("columns", "content", "parts"),
    [
        (Columns(text="txt"), "text,label\nx,0\n",
         (":1:", "a column 'txt'", "['text', 'label']", "did you mean 'text'?")),
        (Columns(label="zzz"), "text,label\nx,0\n", (":1:", "['text', 'label']", "--label_column")),
        (Columns(label="3"), "text,label\nx,0\n",
         ("a column '3'", "--label_column to a number from 1 to 2")),
        (Columns(label="0"), "x,0\n", ("--label_column to a number from 1 to 2",)),
        (Columns(label="9" * 5000), "x,0\n", ("from 1 to 2",)),
        (Columns("a", label="a"), "a,b\nx,0\n",
         ("expected different columns, got 'a' twice", "--label_column")),
        (Columns(), "text,stars\nx,0\n",
         (":1:", "label column", "['text', 'stars']", "--label_column")),
        (Columns(label="stars"), "body,stars\nx,0\n", ("['body', 'stars']", "--text_column")),
        (Columns(), "text,label,label\nx,0,0\n", (":1:", "'label' twice", "rename")),
        (Columns(), "a,b,c,d\n", (":1:", "got 4 column(s)", "--text_column and --label_column")),
        (Columns(), "a\nb\n", ("got 1 column(s)", "check the commas")),
        (Columns(), "foo,bar\na,0\nb,1\nc,0\nd,1\ne,0\n",
         (":1: line 1 looks like a header ['foo', 'bar']: name its columns with --text_column",)),
        (Columns("1", label="2"), "\nfoo,bar\n" + "a,0\n" * 4, (":2: line 2 looks like a header",)),
    ],
)  # fmt: skip
def test_column_mistakes(write, columns, content, parts):
    assert_refused(read_rows, write("a.csv", content), *parts, columns=columns)


def test_few_rows_are_not_taken_for_a_header(write):
    assert len(read_rows(write("a.csv", "foo,bar\na,0\nb,0\nc,0\n"))) == 4
    assert len(read_rows(write("a.csv", "p,x\na,0\nb,0\nc,1\nd,1\n"))) == 5


def test_json_columns_are_keys(write):
    path = write("a.jsonl", '{"2": "x", "1": "y"}\n')
    assert fields(read_rows(path, Columns(text="2", label="1"))) == [("x", None, "y")]
    assert_refused(read_rows, path, "a column '3'", "['2', '1']", columns=Columns(text="3"))
    assert_refused(read_rows, path, ":1:", "text column", "--text_column")


@pytest.mark.parametrize("read", [read_rows, read_texts, fingerprint])
def test_files_that_cannot_be_opened(read, tmp_path, monkeypatch):
    assert_refused(read, tmp_path / "a.csv", "No such file or directory")
    for name in ("a\0\n.csv", "\ud800.csv"):
        with pytest.raises(InputError, match="an impossible name") as caught:
            read(name)
        assert len(str(caught.value).splitlines()) == 1

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)  # root may read everything
    assert_refused(read, tmp_path / "a.csv", "Permission denied", "can be read")


def test_foreign_text_is_cut_and_escaped(write):
    header = "a\n\u2028" + "b" * 1000
    path = write("a.csv", f'"{header}",label\nx,0\n')
    assert_refused(
        read_rows, path, "--text_column", "\\n", "\\u2028", columns=Columns(label="label")
    )
    with pytest.raises(InputError) as caught:
        read_rows(path, Columns(text="c" * 1000))
    assert len(str(caught.value)) < len(str(path)) + 500


def test_lines_are_those_where_rows_start(write):
    path = write("a.csv", '\ntext,label\n"a\n\nb",0\n\n"c\nd",1\ne,0\n')
    assert [row.line for row in read_rows(path)] == [3, 7, 9]
    path = write("a.jsonl", '\n{"text": "a", "label": 0}\n\n{"text": "b", "label": 1}\n')
    assert [row.line for row in read_rows(path)] == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "x\r\n\ny\tz\u2028\n", [("x", None, None, 1), ("y\tz\u2028", None, None, 3)]),
        ("a", '\ufeff"x",0\n', [('"x",0', None, None, 1)]),
        ("a.csv", 'text\n"x\ny"\n', [("x\ny", None, None, 2)]),
        ("a.csv", "x\n", [("x", None, None, 1)]),
        ("a.csv", "text,label\nx,0\ny,\n", [("x", None, "0", 2), ("y", None, None, 3)]),
        ("a.tsv", "x\t0\ny\t0\n", [("x", None, "0", 1), ("y", None, "0", 2)]),
        ("a.tsv", "x\tquestion\ny\tquestion\n", [("x", None, "question", 1),
         ("y", None, "question", 2)]),
        ("a.tsv", "score\tsentence1\tsentence2\n1\tx\ty\n", [("x", "y", None, 2)]),
        ("a.jsonl", '{"text": "x"}\n{"text": "y", "label": 1}', [("x", None, None, 1),
         ("y", None, "1", 2)]),
        ("a.jsonl", '{"text": "x", "label": NaN}', [("x", None, None, 1)]),
    ],
)  # fmt: skip
def test_texts_to_predict(write, name, content, expected):
    assert read_texts(write(name, content)) == [Row(*row) for row in expected]


def test_texts_to_predict_refuse_what_is_broken(write):
    assert_refused(read_texts, write("a.txt", "\n \n"), "empty file")
    assert_refused(read_texts, write("a.txt", b"x\xff\n"), ":1:", "byte 0xff at column 2")
    assert_refused(read_texts, write("a.txt", "x\ry\rz\n"), "a CR alone")
    assert_refused(read_texts, write("a.csv", "text\nx\n \n y,z\n"), ":4:", "1 fields")


def test_split_keeps_shares_and_order():
    labels = "a" * 50 + "b" * 15 + "c" * 2 + "d"
    rows = [Row(str(i), None, label, i) for i, label in enumerate(labels[::-1])]
    train, validation = stratified_split(rows, 0.1, seed=3)
    assert sorted(train + validation, key=lambda row: row.line) == rows
    for part in (train, validation):
        assert part == sorted(part, key=lambda row: row.line)
    held_out = "".join(row.label for row in validation)
    assert {label: held_out.count(label) for label in "abcd"} == {"a": 5, "b": 2, "c": 1, "d": 0}
    assert stratified_split(rows, 0.1, seed=3) == (train, validation)
    assert stratified_split(rows, 0.1, seed=4) != (train, validation)
    assert stratified_split(rows, 0, seed=3) == (rows, [])
    most, _ = stratified_split(rows, 0.999, seed=3)
    assert sorted(row.label for row in most) == ["a", "b", "c", "d"]
    assert stratified_split([], 0.5, seed=3) == ([], [])


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_split_refuses_fractions_outside(fraction):
    with pytest.raises(InputError, match=r"expected at least 0 and below 1, got .*: use 0\.1"):
        stratified_split([], fraction, seed=0)


def test_fingerprint_is_sha256(write):
    assert fingerprint(write("a.bin", b"\0\xff" * 9)) == hashlib.sha256(b"\0\xff" * 9).hexdigest()


@needs_data
def test_real_files():
    sst2 = read_rows(DATA / "sst2/train.tsv")
    assert len(sst2) == 6920
    assert {row.label for row in sst2} == {"0", "1"}
    banking = read_rows(DATA / "banking77/train.csv")
    assert len(banking) == 10003
    assert len({row.label for row in banking}) == 77
    hotel = DATA / "chnsenticorp_htl/ChnSentiCorp_htl_all.csv"
    assert_refused(read_rows, hotel, ":6376:", "a text in column 'review'", "empty")
