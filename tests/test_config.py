"""TrainConfig and RunConfig: what they refuse, and the texts of their flags. What a model's
config.json may say is in test_weights.py and test_bert.py."""

import math
from dataclasses import fields

import pytest

from minift.config import RunConfig, TrainConfig, flag
from minift.errors import InputError

# name, the least and the most that are allowed, one below, one above
RANGES = [
    ("learning_rate", 0.0, 1e3, -1e-9, 1001.0),
    ("num_train_epochs", 0.1, 1e6, -0.1, 1e7),
    ("max_steps", 0, 10**12, -1, 10**12 + 1),
    ("per_device_train_batch_size", 1, 10**6, 0, 10**6 + 1),
    ("gradient_accumulation_steps", 1, 10**6, 0, 10**6 + 1),
    ("warmup_steps", 0.0, 1e12, -0.5, 2e12),
    ("weight_decay", 0.0, 1e3, -0.01, 1001.0),
    ("momentum", 0.0, 0.999999, -0.1, 1.0),
    ("adam_beta1", 0.0, 0.999999, -0.1, 1.0),  # at 1 the bias correction divides by 0
    ("adam_beta2", 0.0, 0.9999999, -0.1, 1.0),
    ("adam_epsilon", 0.0, 1.0, -1e-9, 1.1),
    ("max_grad_norm", 0.0, 1e9, -1.0, 1e10),
    ("label_smoothing_factor", 0.0, 1.0, -0.1, 1.1),
    ("seed", 0, 2**63 - 1, -1, 2**63 + 2**20),  # the dropout holds it as int64
    ("layer_lr_decay", 0.0, 1.0, -0.1, 1.1),
    ("head_lr", 0.0, 1e3, -1e-3, 1001.0),
    ("lora_r", 1, 10**6, 0, 10**6 + 1),
    ("lora_alpha", 1e-6, 1e6, 0.0, 1e7),
    ("lora_dropout", 0.0, 0.99, -0.1, 1.0),
    ("num_virtual_tokens", 1, 10**6, 0, 10**6 + 1),
    ("prefix_hidden_size", 0, 10**6, -1, 10**6 + 1),
]
COUNTS = (
    *("max_seq_length", "eval_steps", "save_steps", "save_total_limit"),
    *("early_stopping_patience", "threads", "doc_stride"),
)
LEAST_ONE = "max_answer_length", "seeds"
BOTH = pytest.mark.parametrize("config", [TrainConfig, RunConfig])


@pytest.mark.parametrize(("name", "low", "high", "below", "above"), RANGES)
def test_ends_of_a_range_are_inside_and_what_is_beyond_is_named(name, low, high, below, above):
    for value in (low, high):
        assert getattr(TrainConfig(**{name: value}), name) == value
    for value in (below, above):
        with pytest.raises(InputError, match=f"^expected {name} between .* and .*, got {value}$"):
            TrainConfig(**{name: value})


def test_every_number_of_a_training_has_a_range():
    """A new field must not be forgotten."""
    assert {name for name, *_ in RANGES} == {
        f.name for f in fields(TrainConfig) if f.type in (int, float)
    }


@pytest.mark.parametrize("name", [name for name, low, *_ in RANGES if isinstance(low, float)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_in_no_range(name, value):
    with pytest.raises(InputError, match=f"expected {name} between"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig) if f.metadata["choices"]])
def test_a_choice_that_is_none_is_refused_from_python_too(name):
    """The command line has its own check; a program has only this one."""
    with pytest.raises(InputError, match=f"^expected {name} .* or .*, got 'no'$"):
        TrainConfig(**{name: "no"})


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_split_keeps_and_leaves_something(value):
    with pytest.raises(InputError, match=r"^expected validation_split in \(0, 1\), got"):
        RunConfig(validation_split=value)


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_a_run_is_not_negative(name):
    assert getattr(RunConfig(**{name: 0}), name) == 0
    with pytest.raises(InputError, match=f"^expected {name} >= 0, got -1$"):
        RunConfig(**{name: -1})


@pytest.mark.parametrize("name", LEAST_ONE)
def test_a_count_of_a_run_is_one_or_more(name):
    with pytest.raises(InputError, match=f"^expected {name} >= 1, got 0$"):
        RunConfig(**{name: 0})


@pytest.mark.parametrize("name", ["max_dropped", "threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_share_of_a_run_is_below_one(name, value):
    with pytest.raises(InputError, match=rf"^expected {name} in \[0, 1\), got"):
        RunConfig(**{name: value})


def test_every_count_of_a_run_is_checked():
    assert {*COUNTS, *LEAST_ONE} == {f.name for f in fields(RunConfig) if f.type is int}


@BOTH
def test_every_field_is_a_flag_that_can_be_explained(config):
    """The command line makes a flag of each from its type, its default and this text."""
    for f in fields(config):
        assert f.metadata["help"]
        assert f.type in (str, int, float, bool)
        assert type(f.default) is f.type
        choices = f.metadata["choices"]
        assert not choices or f.default in choices


def test_no_two_flags_have_the_same_name():
    """Names of both configurations stand side by side on a command line and in a TOML file."""
    names = [n for c in (TrainConfig, RunConfig) for f in fields(c) for n in (f.name, *aliases(f))]
    assert len(names) == len(set(names))


def aliases(field):
    return field.metadata["aliases"]


def test_a_flag_carries_what_argparse_needs():
    field = flag("a", "help me", "b", "c", choices=("a", "d"))
    assert field.default == "a"
    assert dict(field.metadata) == {
        "help": "help me",
        "aliases": ("b", "c"),
        "choices": ("a", "d"),
    }


@BOTH
def test_a_configuration_cannot_be_changed_unchecked(config):
    with pytest.raises(AttributeError):
        config().seed = -1
