"""bench.evaluation compares like with like."""

import json

import bench_package  # noqa: F401
import numpy as np
import pytest
from tiny import rows, tiny_model

from bench import evaluation
from bench.evaluation import Ours, Peer, ratios_of, read_set, take_turns
from minift import Row


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_both_ways_give_the_same_logits(tmp_path, paired):
    """Of the same weights and rows, in the order of the rows, encoded before or in the time."""
    folder, scratch = tiny_model(tmp_path / "model"), tmp_path / "peer"
    scratch.mkdir()
    made = [Row(text, text[::-1][:9] if paired else None) for text, _ in rows(11)]
    ours = Ours(str(folder), made)
    peer = Peer(ours, str(scratch))
    expected = ours.run("fp32", False)
    assert np.abs(expected - expected[0]).max() > 1e-3  # rows differ
    assert np.array_equal(expected, ours.run("fp32", True))
    for encoded, size, in_order in ((False, 4, True), (True, 64, True), (True, 3, False)):
        found = peer.run("fp32", encoded, size, in_order)
        assert np.abs(found - expected).max() < 1e-5


def test_squad_is_read_as_pairs(tmp_path):
    paragraph = {"context": "c", "qas": [{"question": "q1"}, {"question": "q2"}]}
    (tmp_path / "squad_subset").mkdir()
    found = {"data": [{"paragraphs": [paragraph]}]}
    (tmp_path / "squad_subset" / "dev.json").write_text(json.dumps(found))
    assert [(r.text, r.pair) for r in read_set("squad", tmp_path, 9)] == [("q1", "c"), ("q2", "c")]
    assert len(read_set("squad", tmp_path, 1)) == 1


def test_a_limit_takes_rows_from_all_over_a_set(tmp_path):
    (tmp_path / "sst2").mkdir()
    for name, begin in (("dev", 0), ("test", 6)):
        lines = "".join(f"text {begin + i}\t0\n" for i in range(6))
        (tmp_path / "sst2" / f"{name}.tsv").write_text("sentence\tlabel\n" + lines)
    texts = [row.text for row in read_set("sst2", tmp_path, 4)]
    assert texts == [f"text {i}" for i in (0, 3, 6, 9)]
    assert len(read_set("sst2", tmp_path, 99)) == 12


def test_all_take_turns_and_medians_count(monkeypatch):
    """In turn, the first turn not counted; the Trainer at its best is the fastest sorted one."""
    called, seconds = [], iter(range(99))

    def timed(run):
        run()
        return np.zeros(1), {"wall_s": next(seconds), "cpu_s": 1.0}

    monkeypatch.setattr(evaluation, "timed", timed)
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    logits, medians = take_turns(runs, 3)
    assert called == [*"abc"] * 4
    assert logits.keys() == medians.keys() == {*"abc"}
    assert medians["b"] == {"wall_s": 7, "cpu_s": 1.0}  # of 4, 7, 10
    medians = {"minift": {"s": 2.0}, "Trainer as it comes": {"s": 9.0}}
    medians |= {f"Trainer, sorted, batches of {n}": {"s": s} for n, s in ((8, 7.0), (32, 5.0))}
    assert ratios_of(medians, "s") == (4.5, 2.5)
