"""bench/trainers.py: both trainers are given the same rows, however the data comes."""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import bench_package
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import peer_trainer, trainers
from bench.ceilings import measure_matmuls
from minift.data import Row, read_rows

ROOT = bench_package.ROOT

ODD = [("a\nb \u2028\u0085 c", "yes"), (' "quoted", 10% \\n', "no"), ("\t\u96fb\u5f71\r\n", "yes")]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"sentence": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_trainers_read_the_same_rows_with_every_character(tmp_path):
    """Labels are numbered in minift's order, which is also the order of its own head."""
    train = write(tmp_path / "train.jsonl", ODD)
    (tmp_path / "common").mkdir()
    trainers.write_data(train, train, None, tmp_path / "common")
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
    trainers.write_data(file, file, None, tmp_path)
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
    assert "".join(row.text for row in trainers.choose(rows(labels), limit)) == chosen


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
        trainers.write_data(train, other, limit, tmp_path)
    assert message in str(caught.value)


def test_files_are_found_in_the_folder_or_given(tmp_path):
    """dev before test; --train and --validation before --data."""
    for name in ("train.csv", "test.csv", "dev.tsv", "other.jsonl"):
        (tmp_path / name).touch()

    def found(**given):
        args = argparse.Namespace(**dict(data=None, train=None, validation=None) | given)
        return [path.name for path in trainers.find_files(args)]

    assert found(data=tmp_path) == ["train.csv", "dev.tsv"]
    assert found(data=tmp_path, validation=tmp_path / "other.jsonl") == ["train.csv", "other.jsonl"]
    (tmp_path / "dev.tsv").unlink()
    assert found(data=tmp_path) == ["train.csv", "test.csv"]
    with pytest.raises(SystemExit, match="expected --data DIR"):
        found(train=tmp_path / "train.csv")


def test_made_sentences_have_the_label_of_the_more_frequent_words(tmp_path, monkeypatch):
    """And both labels, about as often; the same files for the same seed."""
    monkeypatch.setattr(trainers, "SENTENCES", {"train": 400, "dev": 20})
    trainers.make_sentences(tmp_path)
    first = (tmp_path / "dev.jsonl").read_bytes()
    rows = read_rows(tmp_path / "train.jsonl")
    assert len(rows) == 400
    for row in rows:
        words = row.text.split()
        counts = {label: sum(w in kind for w in words) for label, kind in trainers.KINDS.items()}
        assert counts[row.label] > counts["10"[int(row.label)]]
    share = Counter(row.label for row in rows)["1"] / len(rows)
    assert 0.4 < share < 0.6
    trainers.make_sentences(tmp_path)
    assert (tmp_path / "dev.jsonl").read_bytes() == first


class Matmuls(TorchDispatchMode):
    """Counts matrix products by their shape."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            a, b = args
            assert a.dtype == torch.bfloat16
            self.seen[a.shape[0], b.shape[1], a.shape[1]] += 1
        return func(*args, **(kwargs or {}))


def test_the_matmuls_of_a_step_are_all_timed():
    """As often as they are counted, in each round and once to warm up."""
    with Matmuls() as found:
        ms = measure_matmuls([(3, 8, 4, 16), (1, 2, 6, 4)], torch.device("cpu"), rounds=2)
    assert ms > 0
    assert found.seen == {(8, 4, 16): 9, (2, 6, 4): 3}


def test_the_summary_is_made_of_medians_pair_by_pair():
    """A machine twice as slow in one turn changes no ratio."""

    def runs(*rates):
        return [{"tokens_per_second": r, "peak_rss_mib": 10.0, "eval_accuracy": 0.8} for r in rates]

    rows = {"minift": runs(200.0, 100.0, 220.0), "best peer": runs(100.0, 50.0, 100.0)}
    rows |= {"default peer": runs(50.0, 25.0, 50.0), trainers.FLOOR: runs(400.0, 200.0, 400.0)}
    summary = trainers.summarise(rows)
    assert summary["minift_tokens_per_second"] == 200.0
    assert summary["ratio_to_best_peer"] == 2.0
    assert summary["ratio_to_default_peer"] == 4.0
    assert summary["of_matmuls_alone"] == 0.5
    assert summary["matmuls_alone_tokens_per_second"] == 400.0
    assert summary["default_peer_peak_rss_mib"] == 10.0


def test_a_busy_machine_is_told(monkeypatch):
    """What others computed counts, what our children did does not; then no summary is trusted."""
    stat = Path("/proc/stat")
    spin = [sys.executable, "-c", "sum(range(20_000_000))"]
    with trainers.Neighbours() as ours:
        subprocess.run(spin, check=True)
    made = iter([(10.0, 1.0, 0.0), (10.0 + 3 * os.cpu_count(), 1.0 + os.cpu_count(), 4.0)])
    with monkeypatch.context() as patch:
        patch.setattr(trainers.Neighbours, "seconds", lambda self: next(made))
        with trainers.Neighbours() as others:
            pass
    assert others.share == 0.5
    assert stat.exists()
    assert 0.0 <= ours.share <= 1.0
    run = {"tokens_per_second": 1.0, "peak_rss_mib": 1.0, "eval_accuracy": 1.0}
    for share, trusted in ((0.05, True), (0.5, False), (None, True)):
        rows = {"minift": [run, run | {"others_cpu": share}]}
        assert trainers.summarise(rows)["trusted"] is trusted


def test_tokens_of_a_step_are_those_of_the_run():
    """Two epochs over 100 rows of 23 tokens: 23 * 32 in a step."""
    run = {"tokens_per_second": 460.0, "train_runtime": 10.0}
    assert trainers.tokens_per_step(run, 100, 2.0) == 23 * 32
