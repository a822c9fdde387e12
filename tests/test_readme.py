"""README.md is true: its commands exist, its program runs, its numbers are in bench/results/."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from tiny import settings_kept, tiny_model, write_rows

from minift.cli import make_parser, normalise

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (minift .*?)(?:  +#.*)?$", README, re.MULTILINE)


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = normalise([word for word in shlex.split(command)[1:] if word != "..."])
    args, left = make_parser()[0].parse_known_args(words)
    assert not left
    assert args.command == words[0]


def test_the_program_runs(tmp_path, monkeypatch, capsys):
    """As it stands, in a folder with a model and a file of these names."""
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tiny_model(tmp_path / "MODEL_DIR")
    write_rows(tmp_path / "train.csv", 40)
    monkeypatch.chdir(tmp_path)
    with settings_kept():
        exec(program, {})
    assert capsys.readouterr().out.startswith("1 0.")
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_table_is_the_median_of_the_results():
    lines = (ROOT / "bench/results/finetune.jsonl").read_text().strip().split("\n")
    rows = [row for row in map(json.loads, lines) if row["rows"] == 2000]
    for name, order, trainer in (
        ("minift, bf16", "random", "minift"),
        ("transformers at its best", "grouped", "transformers 5.23.0"),
        ("transformers as it comes", "random", "transformers 5.23.0"),
    ):
        runs = [row for row in rows if (row["order"], row["trainer"]) == (order, trainer)]
        rate = statistics.median(row["tokens_per_second"] for row in runs)
        memory = statistics.median(row["peak_rss_mib"] for row in runs)
        assert f"| {name} | {rate:,.0f} | {memory:,.0f} MiB |" in README


def test_the_modules_of_the_map_exist():
    block = README.split("## Map")[1].split("Letters:")[0]
    for name in re.findall(r"[\w/]+\.py", block):
        assert (ROOT / "minift" / name).exists() or (ROOT / name).exists(), name
    for path in (ROOT / "minift").glob("[a-z]*.py"):
        assert path.name in block, path
