"""README.md is true: its commands exist, its program runs, its numbers are of enough runs."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accuracy import DEVICE
from tiny import settings_kept, tiny_model, write_rows

import minift
from minift.adapter_files import note_base
from minift.adapters import Adapter, adapt
from minift.cli import make_parser, normalise, searched
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


PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SWITCH, OUTER_LOOP, PROGRAM, LOOK, EMBEDDED, ATTENTION = PYTHON


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


class Trial:
    """What Optuna gives to an objective."""

    number = 3

    def __init__(self):
        self.reported = []

    def suggest_float(self, name, low, high, log):
        return 1e-3

    def report(self, value, step):
        self.reported.append((step, value))

    def should_prune(self):
        return len(self.reported) == 2


class TrialPruned(Exception):
    """As Optuna's."""


def test_a_search_of_others_calls_fine_tune(tmp_path, monkeypatch):
    """As it stands: values are reported after each epoch, and a trial that is stopped leaves."""
    tiny_model(tmp_path / "MODEL_DIR")
    write_rows(tmp_path / "train.csv", 40)
    monkeypatch.chdir(tmp_path)
    names = {"minift": minift, "optuna": SimpleNamespace(TrialPruned=TrialPruned)}
    exec(OUTER_LOOP, names)
    trial = Trial()
    with settings_kept(), pytest.raises(TrialPruned):
        names["objective"](trial)
    assert [step for step, _ in trial.reported] == [2, 4]
    assert all(0 <= value <= 1 for _, value in trial.reported)


def test_adapters_are_switched(tmp_path, monkeypatch):
    """As it stands; the labels of the second are its own."""
    base = tiny_model(tmp_path / "MODEL_DIR")
    for name, labels in (("sentiment", ("a", "b")), ("topics", ("x", "y", "z"))):
        model, tokenizer = minift.load(base, labels=labels)
        adapt(model, Adapter("lora", ("q", "v"), r=2))
        note_base(model, str(base))
        minift.save(model, tokenizer, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {"minift": minift}
    exec(SWITCH, names)
    assert names["model"].config.labels == ("x", "y", "z")


def test_the_search_is_one(tmp_path):
    """What README shows as search.toml is read, and has as many trials as it says."""
    (block,) = (b for b in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if "[search]" in b)
    settings = tomllib.loads(block)
    assert set(settings["search"]) == {"method", "trials", "learning_rate", "batch_size"}
    path = tmp_path / "search.toml"
    path.write_text(block)
    args, _ = make_parser()[0].parse_known_args(["search", "--config", str(path)])
    space, run, _ = searched(args)
    assert (space.method, space.trials) == ("random", 20)
    assert run.validation_file == "dev.csv"


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


def region(name: str) -> str:
    """What `bench.report` writes; tests/test_report.py holds it to the results, to the digit."""
    return README.split(f"<!-- report: {name} -->\n")[1].split("<!-- end -->")[0]


def test_every_launch_was_compiled_and_is_within_its_budget():
    """With each version of triton; README shows those of one."""
    for path in (ROOT / "bench/results").glob("codegen-*.jsonl"):
        assert all(json.loads(line)["ok"] for line in path.read_text().splitlines())
    assert len(re.findall(r"^\| `\w+\.\w+_kernel ", region("codegen"), re.MULTILINE)) >= 6


def test_numbers_are_those_of_enough_runs():
    """A median or a mean is of three seeds at least."""
    assert len(re.findall(r"^\| \S+ \| `", region("methods"), re.MULTILINE)) >= 4
    words = (region("methods") + region("finetune")).replace("\n", " ")
    numbers = re.findall(r"(?:of|,) (\w+) seeds", words)
    assert len(numbers) == 3
    assert not {"one", "two"} & set(numbers)


def test_the_modules_of_the_map_exist():
    block = README.split("## Map")[1].split("Letters:")[0]
    for name in re.findall(r"[\w/]+\.py", block):
        assert (ROOT / "minift" / name).exists() or (ROOT / name).exists(), name
    for path in (ROOT / "minift").glob("[a-z]*.py"):
        assert path.name in block, path


def test_the_configuration_from_nothing_is_one():
    """What README shows as small.json makes a model."""
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    config = ModelConfig.from_hf(json.loads(block))
    assert (config.n_layer, config.dim, config.max_len) == (2, 128, 256)
