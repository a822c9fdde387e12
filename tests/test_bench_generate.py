"""bench/generate.py: both make the same tokens, and each case has a row of each."""

import json
import sys

import bench_package  # noqa: F401
import pytest

from bench import generate


def test_a_case_is_timed_and_written_down(monkeypatch, tmp_path, capsys):
    """Two lines, with what the machine is; the same tokens; the last line printed is the ratio."""
    out = tmp_path / "rows.jsonl"
    flags = "--size tiny --batch 2 --dtype fp32 --blocks 1 --new 4 --device cpu --out".split()
    monkeypatch.setattr(sys, "argv", ["generate", *flags, str(out)])
    generate.main()
    theirs, ours = [json.loads(line) for line in out.read_text().splitlines()]
    assert (theirs["contender"], ours["contender"]) == ("transformers", "minift")
    assert (theirs["ratio"], theirs["same"], ours["same"]) == (1, 1, 1)
    assert ours["ratio"] == pytest.approx(theirs["ms"] / ours["ms"])
    for row in (theirs, ours):
        assert (row["bench"], row["batch"], row["new"], row["dtype"]) == ("generate", 2, 4, "fp32")
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["tokens_per_s"] == pytest.approx(8e3 / row["ms"])
        assert {"utc", "commit", "cpu", "torch"} <= row.keys()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"fp32 2": ours["ratio"]}
