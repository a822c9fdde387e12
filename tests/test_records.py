"""Rows with all their fields."""

import json

import pytest

from minift.errors import InputError
from minift.records import read_records


def test_tables_and_json_have_the_same_fields(tmp_path):
    """A header gives the names; JSON brings its own, of any kind."""
    (tmp_path / "a.csv").write_text('en,zh\n"a, b",你好\nbye,\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text("en\tzh\na, b\t你好\nbye\t\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"en": "a, b", "zh": "你好"}\n{"en": "bye", "zh": ""}\n')
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        records = read_records(tmp_path / name, ["en", "zh"])
        assert [tuple(r.fields) for r in records] == [("en", "zh")] * 2
        assert [tuple(r.fields.values()) for r in records] == [("a, b", "你好"), ("bye", "")]
        assert [r.line for r in records] == ([1, 2] if name == "a.jsonl" else [2, 3])
        assert records[0].file.endswith(name)


def test_numbers_are_columns_of_a_table_without_a_header(tmp_path):
    """Every row is a record then."""
    (tmp_path / "a.tsv").write_text("hello\t你好\nbye\t再见\n", encoding="utf-8")
    records = read_records(tmp_path / "a.tsv", ["1", "2"])
    assert [r.fields for r in records] == [{"1": "hello", "2": "你好"}, {"1": "bye", "2": "再见"}]


def test_a_folder_is_all_of_its_files(tmp_path):
    """In the order of their names, each record with its file."""
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"x": name}))
    assert [r.fields["x"] for r in read_records(tmp_path)] == ["a", "b"]


def test_what_cannot_be_read(tmp_path):
    """Nothing there, nothing in it, rows of other widths."""
    (tmp_path / "empty.csv").write_text("a,b\n")
    (tmp_path / "wide.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "none").mkdir()
    for name, part in (("empty.csv", "empty.csv"), ("wide.csv", "wide.csv:3"), ("none", "none")):
        with pytest.raises(InputError, match=part):
            read_records(tmp_path / name, ["a"])
