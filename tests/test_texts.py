"""minift/tasks/texts.py: which rows of a file are used, and what is said of the others."""

from pathlib import Path

import pytest
from tiny import tiny_model

from minift.config import RunConfig
from minift.data import Row
from minift.errors import InputError
from minift.saving import load
from minift.tasks.classification import Classification
from minift.tasks.multilabel import MultiLabel
from minift.tasks.task import File
from minift.tasks.texts import MOST_NAMED, declared


def result(said):
    """What a generator of notices returns."""
    try:
        while True:
            next(said)
    except StopIteration as done:
        return done.value


def file_of(path: Path, **flags) -> File:
    return File(RunConfig(**flags), "train", str(path))


def test_rows_without_a_text_or_with_other_labels_are_dropped(tmp_path):
    """Also block by block; and those that are left are the same."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,a\n  ,a\nbad,x\nfine,b\nfine,\n")
    file, other = (file_of(path, labels="b,a") for _ in range(2))
    rows = result(Classification.read_file(file))
    assert [row.text for row in rows] == ["good", "fine"]
    assert file.dropped == [
        (f"{path}:6", "without a label in column 'label'"),
        (f"{path}:3", "no text"),
        (f"{path}:4", "label 'x' is not among the known ones"),
    ]
    assert [row for block in Classification.blocks(other) for row in block] == rows
    assert other.dropped == file.dropped


def test_to_predict_no_row_is_dropped(tmp_path):
    """And labels need not be there, or be labels."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,\n ,x\n")
    file = file_of(path)
    (block,) = MultiLabel.blocks(file, labelled=False)
    assert [(row.text, row.line) for row in block] == [("good", 2), ("", 3)]
    assert not file.dropped


def test_labels_that_the_head_lacks_are_dropped_when_examples_are_made(tmp_path):
    """A few are named; of many different ones the line says no more than that they are."""
    _, tokenizer = load(tiny_model(tmp_path), ("a", "b"))
    rows = [Row("good", None, label, i) for i, label in enumerate("abxay", 2)]
    file, task = file_of("dev.csv"), Classification(("a", "b"))
    assert [e.target for e in result(task.encode_file(file, rows, tokenizer))] == [0, 1, 0]
    why = "label {!r} is not among the known ones"
    assert file.dropped == [("dev.csv:4", why.format("x")), ("dev.csv:6", why.format("y"))]
    many = [Row("good", None, f"label {i}", i) for i in range(MOST_NAMED + 1)]
    result(task.encode_file(file, many, tokenizer))
    assert file.dropped[2:] == [
        (f"dev.csv:{i}", "a label that is not among the known ones") for i in range(MOST_NAMED + 1)
    ]


def test_declared_labels_keep_their_order(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("z\n\n a, b \n1\n")
    assert declared(str(path)) == ("z", "a, b", "1")
    assert declared("z, a ,1") == ("z", "a", "1")


@pytest.mark.parametrize(("text", "got"), [("a,b,a", "'a' twice"), (" , ", "none")])
def test_declared_labels_are_different(text, got):
    with pytest.raises(InputError, match=f"expected different labels in --labels .*, got {got}"):
        declared(text)


def test_a_file_of_labels_that_is_not_there_is_no_label(tmp_path):
    with pytest.raises(InputError, match=r"labels.txt: expected a file of one label a line"):
        declared(str(tmp_path / "labels.txt"))


def test_one_declared_label_is_too_few_to_choose_from():
    with pytest.raises(InputError, match=r"expected two labels or more in --labels, got 'a'"):
        Classification.labels_of([], RunConfig(labels="a"))
    assert MultiLabel.labels_of([], RunConfig(labels="a")) == ("a",)
