"""bench/: both trainers are given the same rows, however the data comes."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from minift.data import Row, read_rows

ROOT = Path(__file__).parent.parent


def module(name: str) -> ModuleType:
    """A file of bench/, without this repository on the path, where `kernels` would be found."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


finetune, peer_trainer = module("finetune"), module("peer_trainer")

ODD = [("a\nb \u2028\u0085 c", "yes"), (' "quoted", 10% \\n', "no"), ("\t\u96fb\u5f71\r\n", "yes")]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"sentence": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_trainers_read_the_same_rows_with_every_character(tmp_path):
    """Labels are numbered in minift's order, which is also the order of its own head."""
    train = write(tmp_path / "train.jsonl", ODD)
    (tmp_path / "common").mkdir()
    finetune.write_data(train, train, None, tmp_path / "common")
    for name in ("train", "dev"):
        ours = read_rows(tmp_path / "common" / f"{name}.jsonl")
        theirs = peer_trainer.read_jsonl(tmp_path / "common" / f"{name}.jsonl")
        assert [row.text for row in ours] == [text for text, _ in ODD]
        assert [row["text"] for row in theirs] == [text for text, _ in ODD]
        assert [row.label for row in ours] == ["1", "0", "1"]
        assert [row["label"] for row in theirs] == [1, 0, 1]


def test_pairs_stay_pairs(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("premise,hypothesis,label\na,b,x\nc,d,y\n")
    finetune.write_data(file, file, None, tmp_path)
    assert [row.pair for row in read_rows(tmp_path / "train.jsonl")] == ["b", "d"]
    assert [row["text_pair"] for row in peer_trainer.read_jsonl(tmp_path / "dev.jsonl")] == [
        *("b", "d"),
    ]


def rows(labels: str) -> list[Row]:
    return [Row(str(i), None, label, i + 1) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "limit", "chosen"),
    [
        ("abcabc", None, "012345"),
        ("abcabc", 3, "012"),  # the first ones, where these have every label
        ("aaabbbcc", 3, "036"),  # a sorted file
        ("aaabbbcc", 5, "01346"),
        ("aaaaab", 4, "0125"),
    ],
)
def test_a_part_of_the_rows_has_every_label(labels, limit, chosen):
    assert "".join(row.text for row in finetune.choose(rows(labels), limit)) == chosen


@pytest.mark.parametrize(
    ("validation", "limit", "message"),
    [
        ([("x", "maybe")], None, "labels that train.jsonl lacks: ['maybe']"),
        (ODD, 1, "expected --rows 2 or more, one for each label, got 1"),
    ],
)
def test_data_that_cannot_be_compared_on_is_refused(tmp_path, validation, limit, message):
    train = write(tmp_path / "train.jsonl", ODD)
    other = write(tmp_path / "other.jsonl", validation)
    with pytest.raises(SystemExit) as caught:
        finetune.write_data(train, other, limit, tmp_path)
    assert message in str(caught.value)


def test_files_are_found_in_the_folder_or_given(tmp_path):
    """dev before test; --train and --validation before --data."""
    for name in ("train.csv", "test.csv", "dev.tsv", "other.jsonl"):
        (tmp_path / name).touch()

    def found(**given):
        args = argparse.Namespace(**dict(data=None, train=None, validation=None) | given)
        return [path.name for path in finetune.find_files(args)]

    assert found(data=tmp_path) == ["train.csv", "dev.tsv"]
    assert found(data=tmp_path, validation=tmp_path / "other.jsonl") == ["train.csv", "other.jsonl"]
    (tmp_path / "dev.tsv").unlink()
    assert found(data=tmp_path) == ["train.csv", "test.csv"]
    with pytest.raises(SystemExit, match="expected --data DIR"):
        found(train=tmp_path / "train.csv")
