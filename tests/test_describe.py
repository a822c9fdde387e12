"""minift.describe: what `minift inspect` says is what loading and training do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import call, tiny_config, tiny_model

from minift import InputError
from minift.config import TrainConfig
from minift.describe import describe
from minift.train import TrainState
from minift.weights import load_model


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


def test_the_command_takes_the_flags_of_train(capsys, tmp_path):
    folder = tiny_model(tmp_path / "m")
    result = call(capsys, "inspect", folder, "--freeze", "embeddings,layers:0-1", "--head-lr", 1e-3)
    assert result.status == 0
    assert "frozen" in result.out
    assert "0.001" in result.out
    state = torch.get_rng_state()
    call(capsys, "inspect", folder)
    assert torch.equal(state, torch.get_rng_state())
