"""bench/adapters.py and bench/methods.py: the same rows for both, and commands that a user could
type."""

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import bench_package
import pytest

from bench import adapters, methods
from bench.workloads import MODELS
from minift.cli import make_parser, normalise


def test_rows_are_a_function_of_the_model():
    """Both trainers make them anew, in processes of their own."""
    for name in ("MiniLM-L6", "tiny", "GPT-2 355M"):
        rows = adapters.make_rows(name, 12)
        assert rows == adapters.make_rows(name, 12)
        room = MODELS[name].get("max_position_embeddings", 1024) - adapters.VIRTUAL
        assert all(0 < len(ids) < room for ids in rows)
        assert max(map(max, rows)) < MODELS[name]["vocab_size"]


def test_a_turn_of_the_peer_is_every_row_once():
    """Grouped by length, with labels where tokens are; padding is no token and no label."""
    for name in ("tiny", "GPT-2 355M"):
        rows = adapters.make_rows(name, 12)
        settings = {"model": name, "rows": 12, "batch": 4, "best": True}
        turn = list(islice(adapters.peft_batches(settings), 3))
        assert sum(tokens for _, tokens in turn) == sum(map(len, rows))
        found = []
        for inputs, tokens in turn:
            mask = inputs["attention_mask"].bool()
            assert mask.sum() == tokens
            found += [ids[own].tolist() for ids, own in zip(inputs["input_ids"], mask, strict=True)]
            if name != "tiny":
                assert (inputs["labels"][~mask] == -100).all()
                assert (inputs["labels"][mask] == inputs["input_ids"][mask]).all()
        assert sorted(found) == sorted(rows)


@pytest.mark.parametrize("name", list(methods.METHODS))
@pytest.mark.parametrize("data", list(methods.SCORES))
def test_every_method_is_a_command_of_minift(name, data, tmp_path):
    args = argparse.Namespace(model="M", dtype="bf16", threads=1, learning_rate=None)
    command = methods.train_command(args, name, data, 2, tmp_path)
    assert command[1:4] == ["-m", "minift", "train"]
    parser, _ = make_parser()
    parsed, left = parser.parse_known_args(normalise(command[3:]))
    assert left == []
    assert parsed.learning_rate == methods.METHODS[name][1][data]
    assert parsed.seed == 2
    assert parsed.num_train_epochs == methods.EPOCHS[data]


@pytest.mark.slow  # four processes that import torch, two of them transformers
def test_adapters_are_timed_beside_peft(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench.adapters", "--models", "tiny", "--batch", "4"]
    command += ["--methods", "lora", "prefix", "--steps", "2", "--turns", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=bench_package.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [(r["trainer"], r["method"]) for r in rows] == [
        ("minift", "lora"), ("peft", "lora"), ("minift", "prefix"),
    ]  # fmt: skip
    assert rows[0]["trained_parameters"] == rows[1]["trained_parameters"]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["tiny lora"]["time to peft"] > 0
    assert summary["tiny prefix"] == {}
