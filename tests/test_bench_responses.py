"""bench.responses: both contenders answer the same prompts, and beams of the same weights agree."""

import json
import sys

import bench_package  # noqa: F401
import pytest
from tiny import call, settings_kept

from bench import responses


def test_both_answer_alike(capsys, tmp_path, monkeypatch):
    """A model trained for a moment: the answers and so all metrics are transformers', in groups of
    prompts padded on the left."""
    pytest.importorskip("transformers")
    rows = [{"a": f"{w} cat {i}", "b": f"{w} dog {i % 3}"} for w in "a the one".split()
            for i in range(7)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.toml").write_text(
        'model_type = "gpt2"\nn_embd = 16\nn_layer = 2\nn_head = 2\nn_positions = 32\n'
        "vocab_size = 280\n"
    )
    with settings_kept():
        done = call(
            capsys, "train", "--task", "instruct", "--config_name", tmp_path / "small.toml",
            "--train", tmp_path / "pairs.jsonl", "--output", tmp_path / "model", "--quiet",
            "--prompt_template", "{a}\n", "--response_template", "{b}", "--lr", 1e-2,
            "--max_steps", 8, "--threads", 1,
        )  # fmt: skip
    assert done.status == 0, done.err
    words = ["--model", tmp_path / "model", "--data", tmp_path / "pairs.jsonl", "--num_beams", 2,
             "--max_new_tokens", 5, "--out", tmp_path / "rows.jsonl"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench.responses", *map(str, words)])
    responses.main()
    theirs, ours = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (theirs["contender"], ours["contender"]) == ("transformers", "minift")
    assert theirs["prompts"] == 21
    assert ours["same"] == 1
    assert ours["bleu"] == theirs["bleu"]
