"""minift.describe: what `minift inspect` says is what loading and training do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import call, tiny_config, tiny_model

from minift import InputError
from minift.bert import BertClassifier
from minift.config import TrainConfig
from minift.describe import describe
from minift.saving import save
from minift.scratch import make_tokenizer, random_model
from minift.train import TrainState
from minift.weights import load_model, save_model


def test_groups_carry_the_precision_of_the_file(tmp_path):
    """Weights are trained in fp32 whatever is stored; what is stored is said, group by group."""
    folder = tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.half() if "layer.1." in n else t.clone() for n, t in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not n.startswith("classifier.")}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    text = describe(str(folder), TrainConfig())
    rows = dict(line.split()[::2] for line in text.splitlines() if len(line.split()) == 3)
    assert rows["layers:0"] == "float32"
    assert rows["layers:1"] == "float16"
    assert rows["head"] == "new"
    assert "stored as float16, float32" in text


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        ({}, 25762),
        ({"freeze": "embeddings,layers:0"}, None),
        ({"method": "bitfit"}, None),
        ({"lr_rules": "layers:0-1=1e-6,*=1e-5"}, 25762),
    ],
)
def test_it_says_what_would_train(tmp_path, rules, trained):
    """The last line counts the parameters that the same flags of `train` would change."""
    folder = tiny_model(tmp_path / "m")
    text = describe(str(folder), TrainConfig(**rules))
    model, _ = load_model(folder, labels=("a", "b"))
    TrainState.new(model, TrainConfig(**rules))
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained in (None, wanted)
    assert text.splitlines()[-1].split()[1] == f"{wanted:,}"


def test_rules_that_fit_nothing_are_one_line(tmp_path):
    folder = tiny_model(tmp_path / "m")
    with pytest.raises(InputError, match="layers:7"):
        describe(str(folder), TrainConfig(freeze="layers:7"))


def test_a_configuration_file_is_described_too(tmp_path):
    """Before a model of random weights is made: how large would it be?"""
    path = tmp_path / "c.json"
    path.write_text(json.dumps(tiny_config()))
    text = describe(str(path), TrainConfig())
    assert "bert, 2 layers, width 32" in text
    assert "the weights would be random" in text
    assert text.splitlines()[-1].split()[1] == "25,762"


def gpt2_folder(folder: Path, head: str, **changes) -> Path:
    """A random GPT-2 of two layers with a vocabulary of its own."""
    raw = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=300)
    path = folder / "gpt2.json"
    path.write_text(json.dumps(raw | changes))
    tokenizer, config = make_tokenizer(path, None, ["one text"], False, 0, head)
    save(random_model(config, ("a", "b", "c"), 0), tokenizer, folder / "m")
    return folder / "m"


def test_a_gpt2_is_described_as_what_it_is(tmp_path):
    """A language model has no labels and nothing new; a classifier its own; asked for as another,
    what would be new is said."""
    folder = gpt2_folder(tmp_path, "lm")
    text = describe(str(folder), TrainConfig())
    assert "gpt2, 2 layers, width 32, 2 heads of 16, MLP 128 (gelu_tanh), at most 64" in text
    assert "  predicts   tokens, each from those before it\n" in text
    assert "specials   bos <|endoftext|>, eos <|endoftext|>" in text
    assert "new" not in text
    model, _ = load_model(folder, head="lm")
    groups = [line.split()[0] for line in text.split("stored as\n")[1].splitlines()][:4]
    assert groups == ["embeddings", "layers:0", "layers:1", "norm"]
    assert text.splitlines()[-1].split()[1] == f"{sum(p.numel() for p in model.parameters()):,}"
    text = describe(str(folder), TrainConfig(), head="classifier")
    assert "none: not a classifier yet, shown as if for 2" in text
    assert "head.weight" in text
    (tmp_path / "m" / "model.safetensors").unlink()
    text = describe(str(gpt2_folder(tmp_path, "classifier")), TrainConfig(head_lr=1e-3))
    assert "  labels     3: a, b, c" in text
    text = describe(str(tmp_path / "gpt2.json"), TrainConfig())
    assert text.splitlines()[-1].split()[1] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_a_model_of_masked_words_is_described_too(tmp_path):
    """Its head is loaded with it, and what it was trained for is said."""
    folder = tiny_model(tmp_path / "m")
    model, _ = load_model(folder, head="lm")
    model.config = replace(model.config, task="mlm")
    save_model(model, folder)
    text = describe(str(folder), TrainConfig(lr_rules="head=1e-3,*=1e-5"))
    assert "  predicts   masked tokens (trained for mlm)\n" in text
    assert "new" not in text
    wanted = sum(p.numel() for p in model.parameters())
    assert text.splitlines()[-1].split()[1] == f"{wanted:,}"
    assert "not a classifier yet" in describe(str(folder), TrainConfig(), head="classifier")


@pytest.mark.parametrize(
    ("task", "labels", "settings", "line"),
    [
        ("regression", ("score",), {}, "  predicts   a number: score\n"),
        ("classification", ("a", "b"), {}, "  labels     2: a, b\n"),
        (
            "multilabel",
            ("a", "b"),
            {"threshold": 0.25},
            "  labels     2: a, b; any number of them, threshold 0.25\n",
        ),
    ],
)
def test_what_a_classifier_answers_is_said(task, labels, settings, line, tmp_path):
    """A number, a label, or several: their heads look alike."""
    model, _ = load_model(tiny_model(tmp_path / "m"), labels)
    config = replace(model.config, task=task, settings=settings)
    save_model(BertClassifier(config), tmp_path / "m")
    assert line in describe(str(tmp_path / "m"), TrainConfig())


def test_the_command_takes_the_flags_of_train(capsys, tmp_path):
    folder = tiny_model(tmp_path / "m")
    result = call(capsys, "inspect", folder, "--freeze", "embeddings,layers:0-1", "--head-lr", 1e-3)
    assert result.status == 0
    assert "frozen" in result.out
    assert "0.001" in result.out
    state = torch.get_rng_state()
    call(capsys, "inspect", folder)
    assert torch.equal(state, torch.get_rng_state())
