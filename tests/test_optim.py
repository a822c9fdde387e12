"""The schedule against transformers' at every step, the optimizer's groups against the table."""

import math

import pytest
import torch
import transformers
from tiny import tiny_config

from minift.bert import BertClassifier
from minift.config import ModelConfig, TrainConfig
from minift.layers import init_weights
from minift.methods import apply_rules, rules_of
from minift.ops import TORCH
from minift.optim import kept, make_optimizer, schedule

TOTALS = [(1, 0), (7, 0), (7, 1), (7, 3), (7, 7), (100, 10), (100, 99)]  # steps, of warm-up


def factors(total: int, **flags) -> list[float]:
    config = TrainConfig(**flags)
    return [schedule(step, total, config) for step in range(total)]


def peer(kind: str, total: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made = transformers.get_scheduler(kind, optimizer, warmup, total)
    return [made.lr_lambdas[0](step) for step in range(total)]


@pytest.mark.parametrize(("total", "warmup"), TOTALS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")],
)
def test_schedule_is_that_of_transformers_at_every_step(ours, theirs, total, warmup):
    mine = factors(total, lr_scheduler_type=ours, warmup_steps=float(warmup))
    assert mine == pytest.approx(peer(theirs, total, warmup), rel=1e-12, abs=1e-15)


def test_warm_up_starts_at_zero_and_reaches_the_peak():
    assert factors(6, warmup_steps=2.0) == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("total", [1, 8, 30, 101])
def test_warm_up_below_one_is_a_share_rounded_up(share, total):
    steps = math.ceil(share * total)
    for kind in ("linear", "cosine", "constant"):
        flags = {"lr_scheduler_type": kind}
        assert factors(total, warmup_steps=share, **flags) == factors(
            total, warmup_steps=float(steps), **flags
        )


def test_one_step_of_warm_up_is_no_share():
    """1.0 is one step, not all of them."""
    assert factors(4, warmup_steps=1.0) == pytest.approx([0.0, 1.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_factor_is_never_negative(kind):
    """Beyond the end too: a library user may go on."""
    config = TrainConfig(lr_scheduler_type=kind, warmup_steps=3.0)
    assert all(0 <= schedule(step, 10, config) <= 1 for step in range(20))
    assert schedule(10, 10, config) == pytest.approx(0, abs=1e-15)


def make(**flags):
    config = TrainConfig(**flags)
    model = BertClassifier(
        ModelConfig.from_hf(tiny_config(id2label={"0": "a", "1": "b", "2": "c"}))
    )
    init_weights(model, 0.02, seed=0)
    groups = apply_rules(model, rules_of(config, 2), config.weight_decay)
    return model, groups, make_optimizer(model, groups, config, TORCH)


def test_the_optimizer_has_the_trained_rows_of_the_table():
    flags = dict(freeze="embeddings", head_lr=1e-3, learning_rate=2e-5, weight_decay=0.1)
    model, groups, optimizer = make(**flags)
    names = {id(p): name for name, p in model.named_parameters()}
    rows = [
        (
            tuple(names[id(p)] for p in g["params"]),
            *(g[k] for k in ("lr", "peak_lr", "weight_decay")),
        )
        for g in optimizer.param_groups
    ]
    assert rows == [
        (g.names, g.learning_rate, g.learning_rate, g.weight_decay)
        for g in groups
        if g.learning_rate
    ]
    seen = [name for row in rows for name in row[0]]
    assert sorted(seen) == sorted(n for n in names.values() if "embeddings" not in n)
    assert {row[1:] for row in rows} == {
        *((1e-3, 1e-3, 0.1), (1e-3, 1e-3, 0.0), (2e-5, 2e-5, 0.1), (2e-5, 2e-5, 0.0)),
    }


@pytest.mark.parametrize("optim", ["adamw", "adam"])
def test_moments_and_epsilon_are_as_configured(optim):
    flags = dict(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    _, _, optimizer = make(optim=optim, **flags)
    assert all(g["betas"] == (0.8, 0.95) for g in optimizer.param_groups)
    assert all(g["eps"] == 1e-6 for g in optimizer.param_groups)


def test_a_matrix_decays_and_a_norm_does_not():
    """Without gradients AdamW's step is w * (1 - lr * decay), and nothing for a norm."""
    model, _, optimizer = make(learning_rate=0.5, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({}, torch.optim.AdamW),
        ({"optim": "adamw"}, torch.optim.AdamW),
        ({"optim": "adam"}, torch.optim.Adam),
        ({"optim": "sgd"}, torch.optim.SGD),
    ],
)
def test_each_name_makes_its_optimizer_over_the_same_table(flags, kind):
    """AdamW is a kind of Adam to torch, so the type is compared, not the family."""
    _, groups, optimizer = make(freeze="embeddings", learning_rate=1e-3, **flags)
    assert type(optimizer) is kind
    rows = [(g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert rows == [(g.learning_rate, g.weight_decay) for g in groups if g.learning_rate]


def test_sgd_has_the_momentum_of_the_flag():
    assert {g["momentum"] for g in make(optim="sgd")[2].param_groups} == {0.9}
    assert {g["momentum"] for g in make(optim="sgd", momentum=0.5)[2].param_groups} == {0.5}


@pytest.mark.parametrize(
    "flags", [{}, {"optim": "adam"}, {"optim": "sgd"}, {"optim": "sgd", "momentum": 0.0}]
)
def test_kept_is_what_a_step_leaves_in_the_state(flags):
    model, _, optimizer = make(**flags)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = [set(optimizer.state.get(p, ())) for p in model.parameters()]
    assert found == [kept(optimizer)] * len(found)
