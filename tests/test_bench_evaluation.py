"""bench.evaluation compares like with like."""

import json

import bench_package  # noqa: F401
import numpy as np
import pytest
from tiny import rows, tiny_model

from bench.evaluation import Ours, Peer, read_set
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
    for encoded, size in ((False, 4), (True, 64)):
        assert np.abs(peer.run("fp32", encoded, size) - expected).max() < 1e-5


def test_squad_is_read_as_pairs(tmp_path):
    paragraph = {"context": "c", "qas": [{"question": "q1"}, {"question": "q2"}]}
    (tmp_path / "squad_subset").mkdir()
    found = {"data": [{"paragraphs": [paragraph]}]}
    (tmp_path / "squad_subset" / "dev.json").write_text(json.dumps(found))
    assert [(r.text, r.pair) for r in read_set("squad", tmp_path, 9)] == [("q1", "c"), ("q2", "c")]
    assert len(read_set("squad", tmp_path, 1)) == 1
