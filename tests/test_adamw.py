"""kernels/adamw.py: the definition against torch's optimizer, and TORCH.adamw against it."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate

from minift.kernels.adamw import adamw_ref
from minift.ops import TORCH

STEPS = 20
OPTIONS = {
    "as BERT is tuned": {"lr": 1e-2, "weight_decay": 0.01},
    "no decay": {"lr": 1e-2, "weight_decay": 0.0},
    "strong decay": {"lr": 0.1, "weight_decay": 0.9},
    "other betas": {"lr": 1e-2, "betas": (0.5, 0.7), "weight_decay": 0.1},
    "eps as large as the gradient": {"lr": 1e-2, "eps": 0.5, "weight_decay": 0.0},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(dtype, shape=(7, 5)):
    """A parameter and its gradients: some are 0, some tiny, some large."""
    torch.manual_seed(0)
    w, *gradients = torch.randn(1 + STEPS, *shape, dtype=torch.float64, device=DEVICE)
    sizes = 10.0 ** torch.arange(-3, shape[0] - 3, dtype=torch.float64, device=DEVICE)
    gradients = [g * sizes[:, None] * (k % 5 != 3) for k, g in enumerate(gradients)]
    return w.to(dtype), [g.to(dtype) for g in gradients]


def by_definition(w, gradients, **options):
    """w after each step."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for k, g in enumerate(gradients, 1):
        w, m, v = adamw_ref(w, g, m, v, k, **options)
        yield w


def by_optimizer(make_optimizer, w, gradients):
    """w after each step."""
    parameter = w.clone().requires_grad_()
    optimizer = make_optimizer(parameter)
    for g in gradients:
        parameter.grad = g.clone()
        optimizer.step()
        yield parameter.detach().clone()


@options
def test_ref_is_torchs_adamw(options):
    """20 steps in fp64, equal after each."""
    w, gradients = make(torch.float64)
    by_torch = by_optimizer(lambda p: torch.optim.AdamW([p], **options), w, gradients)
    for a, e in zip(by_definition(w, gradients, **options), by_torch, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


@options
def test_table_is_as_accurate_as_the_definition(options):
    """20 steps in fp32, as parameters are held."""
    w, gradients = make(torch.float32)
    betas, eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    group = {"lr": options["lr"], "weight_decay": options["weight_decay"]}
    actual = by_optimizer(
        lambda p: TORCH.adamw([{"params": [p], **group}], betas, eps), w, gradients
    )
    same_dtype = by_definition(w, gradients, **options)
    wide = w.double(), [g.double() for g in gradients]
    exact = by_definition(*wide, **options)
    scale = w.abs().max().item() + STEPS * options["lr"]
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert_as_accurate(a, s, e, scale)


def test_first_step_moves_by_the_learning_rate():
    """m and v are corrected for their start at 0: |step| = lr whatever the gradient's size."""
    w, gradients = make(torch.float64)
    moved, _, _ = adamw_ref(w, gradients[0], w * 0, w * 0, 1, lr=0.01, eps=0.0)
    torch.testing.assert_close(moved, w - 0.01 * gradients[0].sign())


def test_each_group_has_its_own_rate_and_decay():
    """And an entry that is not the optimizer's, such as `peak_lr`, stays in the group."""
    torch.manual_seed(0)
    start, grad = torch.randn(2, 3, 4, device=DEVICE)
    rows = [(1e-2, 0.0), (1e-3, 0.5)]
    parameters = [start.clone().requires_grad_() for _ in rows]
    groups = [
        {"params": [p], "lr": lr, "weight_decay": decay, "peak_lr": lr}
        for p, (lr, decay) in zip(parameters, rows, strict=True)
    ]
    optimizer = TORCH.adamw(groups, betas=(0.9, 0.999), eps=1e-8)
    for p in parameters:
        p.grad = grad.clone()
    optimizer.step()
    for p, group, (lr, decay) in zip(parameters, optimizer.param_groups, rows, strict=True):
        expected, _, _ = adamw_ref(start, grad, start * 0, start * 0, 1, lr=lr, weight_decay=decay)
        torch.testing.assert_close(p.detach(), expected)
        assert group["peak_lr"] == lr


def test_definition_changes_nothing_in_place():
    """Nor does the table write to a gradient."""
    w, gradients = make(torch.float32)
    inputs = [w, gradients[0], gradients[1], gradients[2].abs()]
    before = [x.clone() for x in inputs]
    adamw_ref(*inputs, 3, lr=0.1, weight_decay=0.1)
    assert all(map(torch.equal, inputs, before))
    p = w.clone().requires_grad_()
    p.grad = gradients[0].clone()
    TORCH.adamw([{"params": [p], "lr": 0.1}], (0.9, 0.999), 1e-8).step()
    assert torch.equal(p.grad, gradients[0])
    assert not torch.equal(p, w)
