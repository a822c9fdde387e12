"""README.md is true: its commands exist, its program runs, its numbers are in bench/results/."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from accuracy import DEVICE
from tiny import settings_kept, tiny_model, write_rows

from minift.cli import make_parser, normalise
from minift.config import ModelConfig

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


PROGRAM, LOOK, EMBEDDED, ATTENTION = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_program_runs(tmp_path, monkeypatch, capsys):
    """As it stands, in a folder with a model and a file of these names."""
    tiny_model(tmp_path / "MODEL_DIR")
    write_rows(tmp_path / "train.csv", 40)
    monkeypatch.chdir(tmp_path)
    names = {}
    with settings_kept():
        exec(PROGRAM, names)
        assert capsys.readouterr().out.startswith("1 0.")
        exec(LOOK, names)
    assert capsys.readouterr().out.startswith("[CLS] looks most at ")
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_kernels_train_a_model_of_another_library():
    """As it stands, given a model and batches."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).to(DEVICE)
    before = model.transformer.wte.weight.clone()
    ids = torch.randint(37, (2, 8), device=DEVICE)
    names = {"model": model, "batches": [(ids, ids.clone())] * 2}
    exec(EMBEDDED, names)
    assert names["loss"].isfinite()
    assert not torch.equal(model.transformer.wte.weight, before)


def test_attention_takes_a_projection_as_it_lies():
    names = {"qkv": torch.randn(106, 36, 64, device=DEVICE)}
    exec(ATTENTION, names)
    assert names["out"].shape == (106, 12, 64)
    assert names["out"].isfinite().all()


def test_the_kernels_are_those_that_were_compiled():
    lines = (ROOT / "bench/results/codegen-triton-3.6.0.jsonl").read_text().splitlines()
    rows = {(row["kernel"], row["arch"]): row for row in map(json.loads, lines)}
    shown = re.findall(r"^\| `(\w+\.\w+_kernel [^`]*)` \| (.*) \|$", README, re.MULTILINE)
    assert len(shown) >= 6
    for name, cells in shown:
        row = rows[name, "sm_90"]
        numbers = [row[k] for k in ("registers", "spill_bytes", "shared_bytes", "wide_accesses")]
        assert cells == " | ".join(f"{n:,}" for n in numbers)
    for path in (ROOT / "bench/results").glob("codegen-*.jsonl"):
        assert all(json.loads(line)["ok"] for line in path.read_text().splitlines())


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


def test_the_methods_are_the_means_of_the_results():
    lines = (ROOT / "bench/results/methods.jsonl").read_text().strip().split("\n")
    rows = [row for row in map(json.loads, lines) if (row["data"], row["rows"]) == ("sst2", None)]
    names = {row["method"] for row in rows}
    assert len(names) >= 4
    for name in names:
        runs = [row for row in rows if row["method"] == name]
        assert len({row["seed"] for row in runs}) == len(runs) == 3

        def mean(key, runs=runs):
            return statistics.mean(row[key] for row in runs)

        cells = (
            *(f"{runs[0]['trained_parameters']:,}", f"{mean('eval_accuracy'):.4f}"),
            *(f"{mean('seconds_per_step') * 1000:.0f} ms", f"{mean('peak_rss_mib'):,.0f} MiB"),
        )
        assert f"| {name} | `{runs[0]['flags'] or '(none)'}` | {' | '.join(cells)} |" in README


def test_the_intents_are_those_of_the_results():
    lines = (ROOT / "bench/results/accuracy.jsonl").read_text().strip().split("\n")
    rows = [row for row in map(json.loads, lines) if row["data"] == "banking77"]
    for name, is_ours in (("minift", True), ("transformers", False)):
        runs = [row for row in rows if (row["trainer"] == "minift") == is_ours]
        assert [row["seed"] for row in runs] == [0, 1]
        shown = " and ".join(f"{row['eval_accuracy']:.4f}" for row in runs)
        assert f"{name} {shown}" in README.replace("\n", " ")


def test_the_configuration_from_nothing_is_one():
    """What README shows as small.json makes a model."""
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    config = ModelConfig.from_hf(json.loads(block))
    assert (config.n_layer, config.dim, config.max_len) == (2, 128, 256)
