"""Files in, rows or one line of explanation out."""

import csv
import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data import (
    Columns,
    Row,
    fingerprint,
    read_rows,
    read_texts,
    stream_rows,
)
from minift.errors import InputError
from minift.splits import overlap, stratified_split, with_texts

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
        (Columns(label="stars"), "id,body,stars\n1,x,0\n", ("'body', 'stars']", "--text_column")),
        (Columns(), "text,label,label\nx,0,0\n", (":1:", "'label' twice", "rename")),
        (Columns(), "a,b,c,d\n", (":1:", "got 4 column(s)", "--text_column and --label_column")),
        (Columns(), "a\nb\n", ("got 1 column(s)", "check the commas")),
        (Columns(), "foo,bar\na,0\nb,1\nc,0\nd,1\ne,0\n",
         (":1: line 1 looks like a header ['foo', 'bar']: name its columns, as with --text",)),
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
    path = write("a.csv", f'id,"{header}",label\n1,x,0\n')
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
    assert_refused(read_texts, write("a.txt", "\ufeff"), "empty file")
    assert_refused(read_texts, write("a.txt", b"x\xff\n"), ":1:", "byte 0xff at column 2")
    assert_refused(read_texts, write("a.txt", "x\ry\rz\n"), "a CR alone")
    assert_refused(read_texts, write("a.csv", "text\nx\n \n y,z\n"), ":4:", "1 fields")


@pytest.mark.parametrize(
    ("column", "record", "expected"),
    [
        ("data.review.text", {"data": {"review": {"text": "x"}}}, "x"),
        ("messages.1.content", {"messages": [{"content": "w"}, {"content": "x"}]}, "x"),
        ("list.0", {"list": ["x", "y"]}, "x"),
        ("a.b", {"a.b": "x", "a": {"b": "w"}}, "x"),  # a key that is called so
        ("a.0", {"a": {"0": "x"}}, "x"),
        ("a.b.c", {"a": {"b": None}}, ""),  # of null every part is null
        ("a.b", {"a": {"b": " "}}, ""),
    ],
)
def test_a_path_through_json(write, column, record, expected):
    path = write("a.jsonl", json.dumps({**record, "label": 0}) + "\n")
    assert [row.text for row in read_rows(path, Columns(text=column))] == [expected]


def test_a_path_leads_to_labels_and_pairs_too(write):
    path = write("a.jsonl", '{"q": {"a": "x", "b": "y"}, "gold": [{"class": true}]}\n')
    columns = Columns("q.a", "q.b", "gold.0.class")
    assert fields(read_rows(path, columns)) == [("x", "y", "true")]


@pytest.mark.parametrize(
    ("column", "line", "parts"),
    [
        ("a.c", '{"a": {"b": "x"}}', (":1:", "a column 'a.c'", "did you mean 'a.b'?")),
        ("a.b.c", '{"a": {"b": "x"}}', (":1:", "a column 'a.b.c'")),
        ("a.1", '{"a": ["x"]}', (":1:", "a column 'a.1'")),
        ("a." + "9" * 5000, '{"a": ["x"]}', (":1:", "a column 'a.999")),
        ("a.-1", '{"a": ["x"]}', (":1:", "a column 'a.-1'")),
        ("a.b", '{"a": {"b": 1}}', (":1:", "a text in column 'a.b', got a number")),
        ("a.b", '{"a": {"b": "x"}}\n{"a": {}}', (":2:", "a text in column 'a.b', got nothing")),
        ("a.b", '{"a": {"b": "x"}}\n{"a": "b"}', (":2:", "a text in column 'a.b', got nothing")),
    ],
)
def test_paths_that_lead_nowhere(write, column, line, parts):
    assert_refused(read_texts, write("a.jsonl", line), *parts, columns=Columns(text=column))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"data": {"Review": "x"}, "label": 0}',
         ("'data.Review'", "set --text_column 'data.Review'")),
        ("a.jsonl", '{"messages": [{"content": "x"}], "label": 0}',
         ("set --text_column 'messages.0.content'",)),
        ("a.jsonl", '{"text": "x", "meta": {"label": 0}}', ("set --label_column 'meta.label'",)),
        ("a.csv", "review.text,label,id\nx,0,1\n", ("set --text_column 'review.text'",)),
    ],
)  # fmt: skip
def test_dotted_names_are_suggested(write, name, content, parts):
    """Taken by itself only what is called so at the top: deeper down there may be many."""
    columns = Columns(label="label") if name == "a.csv" else Columns()
    assert_refused(read_rows, write(name, content), ":1:", "a usual name", *parts, columns=columns)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,text2,label\n,y,0\nx, \u3000,1\nx,y,0\n"),
        ("a.csv", ",y,0\nx, ,1\nx,y,0\n"),
        ("a.tsv", "\ty\t0\nx\t\t1\nx\ty\t0\n"),
        ("a.jsonl", '{"text": null, "text2": "y", "label": 0}\n{"text": "x", "text2": "\\t", '
         '"label": 1}\n{"text": "x", "text2": "y", "label": 0}'),
    ],
)  # fmt: skip
def test_blank_texts_are_set_apart(write, name, content):
    """They are read as "", and what to do with them is the caller's decision."""
    rows = read_rows(write(name, content))
    assert fields(rows) == [("", "y", "0"), ("x", "", "1"), ("x", "y", "0")]
    assert with_texts(rows) == (rows[2:], rows[:2])


def test_rows_without_a_pair_need_none():
    rows = [Row("x", None, "0", 1), Row(" \n", None, "0", 2)]
    assert with_texts(rows) == (rows[:1], rows[1:])


def test_overlap():
    """Case and white space make no difference, and each row of `other` counts."""
    texts = lambda *texts: [Row(text, None, "0", 1) for text in texts]  # noqa: E731
    train = texts("Good  film", "bad", "bad", "STRASSE")
    assert overlap(train, texts(" good\tFILM\u2028", "bad", "BAD", "stra\xdfe", "new")) == 4
    assert overlap(train, texts("goodfilm", "caf\xe9")) == 0
    assert overlap(train, []) == overlap([], train) == 0
    pairs = [Row("a", "b", "0", 1), Row("c", "d", "0", 1)]
    assert overlap(pairs, [Row("A", "B ", "1", 1), Row("a", "d", "0", 1)]) == 1
    assert overlap(texts("a"), pairs) == 0


@pytest.fixture
def folder(tmp_path):
    def folder(**files: str) -> Path:
        """A folder with files; "__" in a name stands for the dot, "_in_" for a folder's slash."""
        for name, content in files.items():
            path = tmp_path / "data" / name.replace("_in_", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode())
        return tmp_path / "data"

    return folder


def test_a_folder_of_tables_is_one_data_set(folder):
    """In the order of names, whatever the format; a row knows its file and line."""
    path = folder(
        b__jsonl='{"label": 2, "text": "c"}\n', a__csv="id;label;text\n7;0;a\n\n8;1;b\n",
        c__tsv="text\tlabel\td\nd\t3\t\n", README__csv="?", notes__txt="?", sub_in_a__csv="?",
    )  # fmt: skip
    assert read_rows(path) == [
        Row("a", None, "0", 2, f"{path}/a.csv", "7"),
        Row("b", None, "1", 4, f"{path}/a.csv", "8"),
        Row("c", None, "2", 1, f"{path}/b.jsonl"),
        Row("d", None, "3", 2, f"{path}/c.tsv"),
    ]
    assert read_texts(path) == read_rows(path)
    assert read_rows(path / "a.csv")[0].file is None


def test_files_without_headers_have_what_the_first_has(folder):
    """In the second alone the first column would be taken for the label."""
    path = folder(a__tsv="x\t0\ny\t0\n", b__tsv="z\t1\nz\t2\n")
    assert fields(read_rows(path)) == [("x", None, "0"), ("y", None, "0"), ("z", None, "1"),
                                       ("z", None, "2")]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        ("text,label\nx,0\n", "review,label\nx,0\n", ("a column 'text'", "'review'")),
        ("text,label\nx,0\n", "y,0\n", ("a column 'text'", "['y', '0']")),
        ("x,0\ny,0\n", "text,label\nx,0\n", ("columns [1, None, 2, 2]", "a.csv", "alike")),
        ("x,0\ny,0\n", "1,x,0\n", ("columns [1, None, 2, 2]", "[1, None, 2, 3]")),
        ("text,text2,label\nx,y,0\n", "text,label\nx,0\n", ("a column 'text2'",)),
        ("text,label\nx,0\n", "text,label\nx,0\ny,\n", (":3:", "a label", "empty")),
        ("text,label\nx,0\n", "", ("empty file",)),
        ("text,label\nx,0\n", "text,label\nx,\0\n", (":2:", "NUL")),
    ],
)
def test_a_file_that_does_not_fit_is_named(folder, first, second, parts):
    path = folder(a__csv=first, b__csv=second)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}/b.csv")
    for part in parts:
        assert part in str(caught.value)


def test_columns_asked_by_number_must_be_the_same_everywhere(folder):
    path = folder(a__csv="text,label\nx,0\n", b__csv="label,text\n0,x\n")
    assert fields(read_rows(path)) == [("x", None, "0")] * 2
    columns = Columns(text="1", label="2")
    assert_refused(read_rows, path, "b.csv: expected columns ['text', None", columns=columns)


def test_a_folder_for_each_label(folder):
    """The text is the whole file; `unsup` is a label like any other."""
    path = folder(
        pos_in_1_9__txt="good\r\r\nfilm\n", neg_in_2_1__txt="bad", neg_in_10_1__txt="\ufeffpoor",
        unsup_in_0_0__txt="\n", urls__txt="?", neg_in_README__txt="?", pos_in_a__feat="?",
    )  # fmt: skip
    assert read_rows(path) == [
        Row("poor", None, "neg", 1, f"{path}/neg/10_1.txt"),
        Row("bad", None, "neg", 1, f"{path}/neg/2_1.txt"),
        Row("good\r\r\nfilm\n", None, "pos", 1, f"{path}/pos/1_9.txt"),
        Row("", None, "unsup", 1, f"{path}/unsup/0_0.txt"),
    ]
    assert read_texts(path) == read_rows(path)
    (path / "pos/1_9.txt").write_bytes(b"a\nb\xff")
    assert_refused(read_rows, path, "pos/1_9.txt:2:", "byte 0xff at column 2")


def test_plain_texts_of_a_folder_are_to_predict(folder):
    path = folder(b__txt="y\r\n", a__txt="\nx\n")
    assert read_texts(path) == [Row("x", None, None, 2, f"{path}/a.txt"),
                                Row("y", None, None, 1, f"{path}/b.txt")]  # fmt: skip
    assert_refused(read_rows, path, "expected files .csv", "a folder of .txt for each label")


def test_a_folder_with_nothing_to_read(folder):
    path = folder(train_in_pos_in_1__txt="x", a__xml="x")
    for read in (read_rows, read_texts):
        assert_refused(read, path, "got neither", "name a file or another folder")
    assert [row.label for row in read_rows(path / "train")] == ["pos"]


def test_fingerprint_of_a_folder(folder):
    """It changes with a name and with a content, and with nothing else."""
    path = folder(a__csv="x", b_in_c__txt="y", README="z")
    print_of = fingerprint(path)
    assert len(print_of) == 64
    (path / "README").write_text("other")
    assert fingerprint(f"{path}/") == print_of
    (path / "b/c.txt").write_text("z")
    assert fingerprint(path) != print_of
    (path / "b/c.txt").write_text("y")
    assert fingerprint(path) == print_of
    (path / "b").rename(path / "d")
    assert fingerprint(path) != print_of


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
    hotel = read_rows(DATA / "chnsenticorp_htl/ChnSentiCorp_htl_all.csv")
    assert len(hotel) == 7766
    assert [row.line for row in with_texts(hotel)[1]] == [6376]
    pairs = read_rows(DATA / "stsb/train.tsv", Columns(label="score"))
    assert len(pairs) == 3749
    assert all(row.text and row.pair for row in pairs)
    assert overlap(sst2, read_rows(DATA / "sst2/dev.tsv")) == 0
    assert_refused(read_rows, DATA / "banking77", "'test.csv' and 'train.csv'")


# ---------------------------------------------------------------- what people's files are like


def test_one_usual_name_and_one_column_left(write):
    """`Review text;Category`, as a person writes it: a header, and nothing to ask."""
    path = write("a.csv", "Review text;Category\nfine, really;good\nawful;bad\n")
    assert fields(read_rows(path)) == [("fine, really", None, "good"), ("awful", None, "bad")]
    path = write("a.jsonl", '{"Review text": "fine", "label": "good"}\n')
    assert fields(read_rows(path)) == [("fine", None, "good")]
    path = write("b.csv", "when,Review text,Category\n1,fine,good\n2,awful,bad\n")
    with pytest.raises(InputError, match="expected a usual name for the text column"):
        read_rows(path)


def test_a_name_that_recurs_below_is_no_header(write):
    """ "category" is a label's usual name, and may be a label."""
    path = write("a.csv", "one text,category\nanother,category\na third,class\n")
    assert len(read_rows(path)) == 3


def test_numbers_and_dates_are_no_texts(write):
    """Without a header, an id beside a text does not make a pair."""
    rows = "".join(f"{i},2024-01-{i},text number {i},{'ab'[i % 2]}\n" for i in range(10, 30))
    three = "".join(line.split(",", 1)[1] + "\n" for line in rows.splitlines())
    for content in (three, three.replace("2024-01-", "")):
        found = read_rows(write("a.csv", content))
        assert found[0].text == "text number 10"
        assert found[0].pair is None
        assert found[0].label == "a"
    pairs = "".join(f"text {i},other {i},{i % 2}\n" for i in range(20))
    assert read_rows(write("b.csv", pairs))[0].pair == "other 0"


def test_labels_have_no_blanks_around_them(write):
    """ "spam " and "spam" are one label."""
    path = write("a.csv", "text,label\na,spam\nb,spam \nc, ham\n")
    assert [row.label for row in read_rows(path)] == ["spam", "spam", "ham"]


def test_a_nested_text_is_named_down_to_its_leaf(write):
    """The hint can be copied and works."""
    line = '{"id": 1, "data": {"review": {"text": "fine", "stars": 5}}, "label": "a"}\n'
    path = write("a.jsonl", line)
    with pytest.raises(InputError, match=r"set --text_column 'data\.review\.text'$"):
        read_rows(path)
    assert read_rows(path, Columns(text="data.review.text"))[0].text == "fine"


def test_what_looks_like_a_header_is_shown_as_flags(write):
    """Neither name is usual: the line says what to type, and of no label where none is needed."""
    path = write("a.csv", "Satz,Art\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(9)))
    with pytest.raises(InputError, match=r"--text_column 'Satz' --label_column 'Art'$"):
        read_rows(path)
    with pytest.raises(InputError, match=r"as with --text_column 'Satz'$"):
        read_texts(path)


# ---------------------------------------------------------------- streams, drops, ids


def number(value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("a number") from None


def test_unusable_rows_are_dropped(write):
    """Each is told of, in the same words for the same mistake; else the first is an error."""
    path = write(
        "a.jsonl",
        '{"text": "x", "label": 0}\n{"text": 5, "label": 0}\n'
        '{"text": "y"}\n{"text": "z", "label": " "}\n{"text": "w", "label": 1}\n',
    )
    told = []
    rows = read_rows(path, drop=lambda *row: told.append(row))
    assert fields(rows) == [("x", None, "0"), ("w", None, "1")]
    label = "without a label in column 'label'"
    assert told == [(f"{path}:2", "without a text in column 'text'"), (f"{path}:3", label),
                    (f"{path}:4", label)]  # fmt: skip
    assert_refused(read_rows, path, ":2:", "a text in column 'text', got a number")
    broken = write("b.csv", "text,label\nx,0\ny\n")
    assert_refused(read_rows, broken, ":3:", "1", drop=lambda *_: None)


def test_a_file_of_dropped_rows_is_not_empty(write):
    told = []
    assert read_rows(write("a.csv", "text,label\nx,\n"), drop=lambda *row: told.append(row)) == []
    assert len(told) == 1


@settings(max_examples=40)
@given(
    table=st.lists(st.lists(st.sampled_from(["", "a b", "word", "7", "0", "x,y"]), min_size=3,
                            max_size=3), min_size=1, max_size=12),
    name=st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.csv.gz"]),
    header=st.booleans(),
    labelled=st.booleans(),
)  # fmt: skip
def test_streamed_rows_are_those_that_are_read(tmp_path_factory, table, name, header, labelled):
    """Row for row, with what is dropped, or the same error."""
    path = tmp_path_factory.mktemp("stream") / name
    keys = ["id", "text", "label"]
    if name == "a.jsonl":
        lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in table]
    else:
        sign = "\t" if name == "a.tsv" else ","
        shown = '"{}"'.format if sign == "," else str
        lines = [sign.join(map(shown, row)) for row in [keys] * header + table]
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)

    def result(read):
        told = []
        try:
            return list(read(path, labelled=labelled, drop=lambda *r: told.append(r))), told
        except InputError as error:
            return str(error)

    assert result(stream_rows) == result(read_rows)


def test_a_stream_decides_columns_by_the_head(write):
    """The keys of 100 objects; 1,000 rows where there is no header."""
    lines = ['{"text": "x", "label": 0}'] * 100 + ['{"text": "y", "label": 0, "text2": "z"}']
    path = write("a.jsonl", "\n".join(lines))
    assert list(stream_rows(path))[-1].pair is None
    with pytest.raises(InputError, match="got nothing"):  # of which a pair is asked in each row
        read_rows(path)
    path = write("a.tsv", "same\t0\n" * 1 + "".join(f"same\t{i % 2}\n" for i in range(1500)))
    assert next(stream_rows(path)) == read_rows(path)[0]


def test_a_stream_takes_no_more_than_it_gives(tmp_path):
    """Memory does not grow with the file: of 20 MB of rows 4 MB at most are there at once."""
    path = tmp_path / "a.tsv"
    with path.open("w") as file:
        file.write("text\tlabel\n")
        file.writelines(f"{'x' * 2000} {i}\t{i}\n" for i in range(10_000))
    tracemalloc.start()
    rows = sum(1 for _ in stream_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 10_000
    assert peak < 4 << 20


def test_two_streams_side_by_side(write):
    """A field of 200,000 characters is read whichever ended first; the limit stays the caller's."""
    limit = csv.field_size_limit()
    a = write("a.csv", "text,label\nx,0\n")
    b = write("b.csv", f"text,label\nx,0\n{'y' * 200_000},1\n")
    first, second = stream_rows(a), stream_rows(b)
    next(first), next(second)
    assert csv.field_size_limit() == limit
    assert list(first) == []
    assert len(next(second).text) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("a.csv", "ID,text,label\n7,x,0\n,y,1\n", Columns(), ["7", None]),
        ("a.csv", "id,text,label\n7,x,0\n", Columns(id=""), [None]),
        ("a.csv", "id,text,label,key\n7,x,0,k\n", Columns(id="key"), ["k"]),
        ("a.csv", "id,label\nx,0\n", Columns(), [None]),  # it is the text
        ("a.csv", "k,x,0\nl,y,1\n", Columns("2", id="1", label="3"), ["k", "l"]),
        ("a.jsonl", '{"idx": 3, "text": "x", "label": 0}', Columns(), ["3"]),
        ("a.jsonl", '{"idx": {"a": 1}, "text": "x", "label": 0}', Columns(), ['{"a": 1}']),
    ],
)
def test_ids(write, name, content, columns, expected):
    """A column that is called so, where it is nothing else."""
    path = write(name, content)
    assert [row.id for row in read_rows(path, columns)] == expected
    assert_refused(read_rows, path, "a column 'zzz'", columns=Columns(id="zzz"))


def test_a_column_that_cannot_be_read_is_no_label(write):
    """Numbers are wanted: the text has fewer values, and is none."""
    rows = "".join(f"text {i % 2}\t{i / 7}\n" for i in range(8))
    assert read_rows(write("a.tsv", rows))[0].label == "text 0"
    found = read_rows(write("a.tsv", rows), parse=number)
    assert found[1] == Row("text 1", None, 1 / 7, 2)
    with pytest.raises(InputError, match=r"looks like a header \['a', 'b'\]"):
        read_rows(write("b.tsv", "a\tb\n" + rows), parse=number)
