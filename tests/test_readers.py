"""Whatever stands in a file: its records, or one line that says what is wrong and where."""

import csv
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import assert_refused, fields

from minift.data import Columns, read_rows, read_texts
from minift.errors import InputError
from minift.readers import check_one_set, files_in, folders_of_texts, opened, opened_records

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
        ("a.jsonl", b"\xef\xbb\xbf", ("empty file",)),
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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text;label\nx, y;0\n", ("x, y", "0")),
        ("text\tlabel\nx, y\t0\n", ("x, y", "0")),
        ("label|text\n0|x; y\n", ("x; y", "0")),
        ("text,label\nx; y,0\nz; w,1\n", ("x; y", "0")),
        ("text,label\nx;y,0\nz;w,1\n", ("x;y", "0")),
        ("text;label\nx,y;0\nz,w;1\n", ("x,y", "0")),
        ("x; y,0\nz; w,1\n", ("x; y", "0")),  # a space follows: prose
        ("x, y;0\nz, w;1\n", ("x, y", "0")),
        ("x;y,0\nz;w,0\n", ("x;y", "0")),  # one split has fewer labels than the other
        ("x,y;0\nz,w;0\n", ("x,y", "0")),
        ("a,5;good;x\nb,1;bad;x\nb,5;good;x\n", ("a,5", "x")),
        ("x;0\ny, z, w;1\nv;0\n", ("x", "0")),  # the number of fields is constant
        ("x|y,0\n", ("x|y", "0")),  # nothing tells: a comma is likelier
        ('"x;\ny";0\n"z";1\n', ("x;\ny", "0")),
        ('text;label\r\n"a ""b""; c";0\r\n', ('a "b"; c', "0")),
        ("\ufefftext;label\nx;0\n", ("x", "0")),
        ("sep=;\ntext;label\nx,y;0\n", ("x,y", "0")),
        ("\ufeffsep=;\r\nx,y;0\r\n", ("x,y", "0")),
        ('"sep=|"\nx,y|0\n', ("x,y", "0")),
        ("SEP=\t\nx,y\t0\n", ("x,y", "0")),
        ("sep=,\nx;y,0\nz;w,0\n", ("x;y", "0")),
        ("Text; label\nx; 0\n", ("x", "0")),  # names outweigh the spaces
    ],
)
def test_delimiters_are_found(write, content, expected):
    """Each case has a text that would be cut by the wrong one."""
    (row, *_) = read_rows(write("a.csv", content))
    assert (row.text, row.label) == expected


def test_names_tell_the_delimiter(write):
    """Both split every line in two; one gives names that are usual or asked for."""
    for header, columns in (
        ("text,b;label", Columns("text,b")),
        ("a,b;c", Columns("a,b", "", "c")),
    ):
        path = write("a.csv", header + "\n1,x;0\n1,y;0\n")
        assert fields(read_rows(path, columns)) == [("1,x", None, "0"), ("1,y", None, "0")]


def test_asked_names_tell_the_delimiter_of_a_broken_file(write):
    path = write("a.csv", "Kommentar;Klasse\nx, y;0\nz\n")
    columns = Columns(text="Kommentar", label="Klasse")
    assert_refused(read_rows, path, ":3:", "2 fields as on line 1, got 1", columns=columns)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("text;label\nx;0\ny;z;1\n", (":3:", "2 fields as on line 1, got 3", "separator")),
        ("sep=;\ntext;label\nx;0\ny\n", (":4:", "2 fields as on line 2, got 1")),
        ("sep=;\n", ("empty file",)),
        ('sep=;\nx;0\n"y;1\n', (":3:", 'a closing "', "line 3")),
        ('text;label\n"x "y";0\n', (":2:", "';' after a closing")),
        ('text\tlabel\n"x "y"\t0\n', (":2:", "a tab after a closing")),
        ("text;label\n" + "x;0\n" * 150 + "y\n", (":152:", "2 fields", "got 1")),
    ],
)
def test_mistakes_beside_other_delimiters(write, content, parts):
    """The number of a line counts `sep=` and what was read to find the delimiter."""
    assert_refused(read_rows, write("a.csv", content), *parts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.gz", "text,label\nx,0\n"),
        ("a.TSV.GZ", "x\t0\n"),
        ("a.jsonl.gz", '{"text": "x", "label": 0}\n'),
    ],
)
def test_gzip(write, name, content):
    path = write(name, gzip.compress(content.encode()))
    assert fields(read_rows(path)) == [("x", None, "0")]


def test_gzip_of_plain_text(write):
    for name in ("a.txt.gz", "a.gz"):
        path = write(name, gzip.compress(b"x\n") + gzip.compress(b"y\n"))  # as `cat` joins them
        assert [row.text for row in read_texts(path)] == ["x", "y"]


def test_broken_gzip(write):
    """At whatever byte it is cut or damaged: one line."""
    whole = gzip.compress(b"text,label\n" + b"".join(b"word %d,0\n" % i for i in range(5000)))
    assert_refused(read_rows, write("a.csv.gz", b"text,label\nx,0\n"), "whole gzip", "Not a gzip")
    for size in (1, 5, 11, 100, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path = write("a.csv.gz", whole[:size])
        assert_refused(read_rows, path, "a whole gzip file", "compress it again")
    for at in (0, 20, len(whole) // 2, len(whole) - 5):
        path = write("a.csv.gz", whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        assert_refused(read_rows, path)
    assert_refused(read_rows, write("a.csv.gz", b""), "empty file")
    assert_refused(read_rows, write("a.txt.gz", whole), "a name that ends in", "'.txt'")


def test_a_disk_that_fails_is_one_line(write):
    def fail():
        with opened(write("a.csv", "x")):
            raise OSError(5, "Input/output error")

    with pytest.raises(InputError, match=r"a\.csv: expected a file, got Input/output error"):
        fail()


def test_reading_leaves_the_limit_of_csv(write):
    """Also where the caller stops early or a row is refused while the file is being read."""
    limit = csv.field_size_limit()
    path = write("a.csv", "text,label\nx,0\ny,\nz,0\n")
    with opened_records(path) as records:
        assert next(records) == (1, ["text", "label"])
    assert csv.field_size_limit() == limit
    try:
        read_rows(path)
    except InputError:  # its traceback holds what was being read
        assert csv.field_size_limit() == limit


def test_memory_is_that_of_the_rows(write):
    """No second copy of the file, and one string for all rows of a label."""
    texts = [f"text number {i:6} " + "and some words " * 10 for i in range(10_000)]
    path = write("a.csv", "text,label\n" + "".join(f"{text},a label\n" for text in texts))
    tracemalloc.start()
    try:
        rows = read_rows(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * path.stat().st_size + (3 << 20)  # buffers
    assert [row.text for row in rows] == texts
    assert all(row.label is rows[0].label for row in rows)


def test_files_of_a_folder(tmp_path):
    """By name; without folders, hidden files, licences, broken links and other endings."""
    for name in ("b.csv", "a.TSV", "c.csv.gz", ".d.csv", "README.csv", "LICENCE.csv", "e.xml",
                 "license.tsv", "~b.csv"):  # fmt: skip
        (tmp_path / name).touch()
    (tmp_path / "f.csv").mkdir()
    (tmp_path / "g.csv").symlink_to(tmp_path / "nothing")
    found = files_in(tmp_path, (".csv", ".tsv"))
    assert found == [str(tmp_path / name) for name in ("a.TSV", "b.csv", "c.csv.gz", "~b.csv")]


def test_folders_of_texts(tmp_path):
    """Those with .txt files in them; a name that cannot be a label is a mistake."""
    for name in ("pos/1.txt", "pos/README.txt", "neg/2.txt.gz", ".git/a.txt", "none/a.py", "3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [("neg", [str(tmp_path / "neg/2.txt.gz")]), ("pos", [str(tmp_path / "pos/1.txt")])]
    assert folders_of_texts(tmp_path) == expected
    for name in (b"a\nb", b"\xff", b" "):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        assert folders_of_texts(tmp_path) == expected
        with open(os.path.join(folder, b"a.txt"), "w"):
            assert_refused(folders_of_texts, tmp_path, "printable names", "rename the folder")
        os.unlink(os.path.join(folder, b"a.txt"))


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        ("train.csv test.csv", True),
        ("train-00000-of-00002.jsonl train-00001-of-00002.jsonl", False),
        ("Train_1.tsv validation.tsv", True),
        ("dev.csv test.csv", False),
        ("train.csv testimonials.csv", False),
        ("trains.csv test.csv", False),
    ],
)
def test_splits_are_not_read_as_one(tmp_path, names, refused):
    if refused:
        part = f"files of one data set, got {' and '.join(map(repr, names.split()))}"
        assert_refused(check_one_set, tmp_path, part, files=names.split())
    else:
        check_one_set(tmp_path, names.split())


SOUP = st.lists(
    st.sampled_from(
        [
            *'x0,;|\t"[]{}:\\\r\n \ufeff\x85',
            "text",
            "label",
            "sep=;\n",
            '{"text":"x","label":',
            "\\u",
        ]
    )
).map(lambda parts: "".join(parts).encode())
VALID = {
    "csv": b'text,label\r\n"a, ""b""\r\nc",0\r\nd,1\r\n',
    "tsv": "text\tlabel\nça va\t0\n\U0001f600\t1\n".encode(),
    "jsonl": b'{"a": {"text": "x"}, "label": 0}\n{"a": {"text": "\\u00e9"}, "label": 1}\n',
    "txt": "ein Satz\nnoch einer\x85\n".encode(),
}


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """A good file with some places cut, doubled or overwritten."""
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
        middle = draw(st.just(b"") | st.just(2 * whole[start:stop]) | st.binary(max_size=4) | SOUP)
        whole = whole[:start] + middle + whole[stop:]
    return whole


def contents(ending: str) -> st.SearchStrategy[bytes]:
    return st.binary() | st.text().map(str.encode) | SOUP | mutated(VALID[ending])


def assert_rows_or_one_line(read, path, **options) -> None:
    labelled, limit = options.get("labelled", False), csv.field_size_limit()
    rows, message = [], None
    try:
        rows = read(path, **options)
    except InputError as error:
        message = str(error)
    assert bool(rows) != bool(message)
    assert message is None or (len(message.splitlines()) == 1 and str(path) in message)
    assert all(isinstance(row.text, str) and (row.label or not labelled) for row in rows)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("ending", [*VALID])
def test_any_bytes_are_rows_or_one_line(tmp_path, ending):
    """Whatever stands in a file, and whichever columns are asked for."""
    path, asked = tmp_path / f"soup.{ending}", st.sampled_from([None, "text", "a.text", "1", "0"])

    @thorough
    @given(contents(ending), st.booleans(), st.builds(Columns, text=asked, label=asked))
    def check(content, labelled, columns):
        path.write_bytes(content)
        if ending == "txt":
            assert_rows_or_one_line(read_texts, path)
        else:
            assert_rows_or_one_line(read_rows, path, labelled=labelled, columns=columns)

    check()


@pytest.mark.parametrize("ending", [*VALID])
def test_any_gzip_is_rows_or_one_line(tmp_path, ending):
    """Damage before and after the compression."""
    path, whole = tmp_path / f"soup.{ending}.gz", gzip.compress(VALID[ending], mtime=0)

    @thorough
    @given(contents(ending).map(gzip.compress) | mutated(whole) | st.binary())
    def check(content):
        path.write_bytes(content)
        assert_rows_or_one_line(read_texts, path)

    check()


def test_any_folder_is_rows_or_one_line(tmp_path):
    """Files that agree, disagree, are empty or broken, beside folders of texts."""
    names = st.sampled_from(["a.csv", "b.csv", "c.tsv", "d.jsonl", "e.txt", "p/1.txt", "q/2.txt"])
    counter = iter(range(10**6))

    @thorough
    @given(st.dictionaries(names, st.sampled_from([*VALID]).flatmap(contents)), st.booleans())
    def check(files, labelled):
        folder = tmp_path / str(next(counter))
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        folder.mkdir(exist_ok=True)
        assert_rows_or_one_line(read_rows, folder, labelled=labelled)
        assert_rows_or_one_line(read_texts, folder)

    check()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")) | st.text(
    ',;|"\n x'
)
FILLED = TEXT.filter(str.strip)


@thorough
@given(
    rows=st.lists(st.tuples(FILLED, FILLED, FILLED), min_size=1),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
    told=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_written_tables_are_read_back(tmp_path_factory, rows, delimiter, end, told, quoting):
    """With any delimiter and line end, found by itself or told by `sep=`."""
    table = io.StringIO(newline="")
    table.write(f"sep={delimiter}{end}" if told else "")
    written = csv.writer(table, delimiter=delimiter, lineterminator=end, quoting=quoting)
    written.writerows([("text", "text2", "label"), *rows])
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    path.write_bytes(table.getvalue().encode())
    assert fields(read_rows(path)) == stripped(rows)


@thorough
@given(rows=st.lists(st.tuples(FILLED, FILLED, FILLED), min_size=1), escaped=st.booleans())
def test_written_objects_are_read_back(tmp_path_factory, rows, escaped):
    """Flat and nested, with escapes and without."""
    flat = [dict(zip(("text", "text2", "label"), row, strict=True)) for row in rows]
    deep = [{"a": [{"b": row[0]}], "c.d": row[1], "label": row[2]} for row in rows]
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    for objects, columns in ((flat, Columns()), (deep, Columns("a.0.b", "c.d"))):
        lines = [json.dumps(content, ensure_ascii=escaped) for content in objects]
        path.write_bytes("\n".join(lines).encode())
        assert fields(read_rows(path, columns)) == stripped(rows)


def stripped(rows: list[tuple]) -> list[tuple]:
    """Labels are read without the blanks around them."""
    return [(*row[:-1], row[-1].strip()) for row in rows]


STRANGE = {
    "a megabyte": "long " * 200_000 + "x",
    "right to left": "שלום עולם \u202bقلم\u202c",
    "combining": "cafe\u0301 \u0928\u093f\u0926\u0940",
    "emoji": "\U0001f469\u200d\U0001f4bb\U0001f44d\U0001f3fd",
    "other line ends": "a\x85b\u2028c\u2029d\x0be\x0cf\x1cg",
    "spaces": "\u3000 a \xa0",
    "a mark of order inside": "a\ufeffb",
}


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_texts_pass_through_unchanged(tmp_path, text):
    """In every format, as text, pair and label: nothing is normalised, cut or split."""
    line = "\t".join([text] * 3)
    object_line = json.dumps({"text": text, "text2": text, "label": text}, ensure_ascii=False)
    for name, content in {
        "a.csv": "text,text2,label\n" + line.replace("\t", ","),
        "b.tsv": "text\ttext2\tlabel\n" + line,
        "c.jsonl": object_line,
        "d.csv.gz": "text;text2;label\n" + line.replace("\t", ";"),
    }.items():
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        assert fields(read_rows(tmp_path / name)) == [(text, text, text.strip())]
    assert fields(read_rows(tmp_path)) == [(text, text, text.strip())] * 4
    path = tmp_path / "a.txt"
    path.write_bytes(f"{text}\n{text}".encode())
    assert [row.text for row in read_texts(path)] == [text, text]
