"""LoRA's product, by hand, against the plain formula that autograd differentiates."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

from minift.layers import Linear, linear
from minift.lora import LoRA, Part
from minift.ops import TORCH, Draw

T, IN, OUT, R = 7, 6, 12, 2
PARTS = {
    "whole": (Part(0, 12),),
    "q,v": (Part(0, 4), Part(8, 12)),
    "v": (Part(8, 12),),
    "k": (Part(4, 8),),
    "q,k,v": (Part(0, 4), Part(4, 8), Part(8, 12)),
    "uneven": (Part(1, 3), Part(3, 12)),
}
parts_of = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


def layer_of(parts, scale=1.7, bias=True, dtype=torch.float64, seed=0) -> Linear:
    """A product with a LoRA, all numbers random."""
    generator = torch.Generator().manual_seed(seed)
    layer = Linear(IN, OUT, bias)
    layer.lora = LoRA(IN, parts, R, scale)
    layer.to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(layer: Linear, x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """x W^T + b, and s * (dropped A_i^T) B_i^T in the columns of each part."""
    y, lora = F.linear(x, layer.weight, layer.bias), layer.lora
    added = torch.zeros_like(y)
    for i, ((begin, end), b) in enumerate(zip(lora.parts, lora.b, strict=True)):
        a = lora.a.weight[i * lora.r : (i + 1) * lora.r]
        pads = begin, y.shape[1] - end
        added = added + F.pad(lora.scale * F.linear(F.linear(dropped, a), b.weight), pads)
    return y + added


def run(function, layer: Linear, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and the gradient of the input and of each parameter that has one."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


def dropping(x: torch.Tensor, layer: Linear, p: float = 0.4):
    """A step's dropout, and what it leaves of x at the LoRA's place."""
    layer.lora.p, layer.lora.site = p, 3
    draw = Draw(torch.tensor(1), torch.tensor(2))
    dropout = TORCH.draw_dropout(draw, torch.arange(len(x)) << 32, IN, 5, 1)
    return dropout, lambda x: TORCH.drop(x, dropout.at(3, p))


@parts_of
@pytest.mark.parametrize("trained", [True, False], ids=["weight trained", "weight frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("drops", [False, True], ids=["all stay", "some drop"])
def test_outputs_and_every_gradient_are_the_formulas(parts, trained, bias, drops):
    layer, x, dy = layer_of(parts, bias=bias), random(T, IN), random(T, OUT, seed=2)
    layer.weight.requires_grad_(trained)
    dropout, drop = dropping(x, layer) if drops else (None, lambda x: x)
    if drops:
        assert 0 < (drop(x) == 0).double().mean() < 1
    found = run(lambda x: linear(x, layer, TORCH, dropout), layer, x, dy)
    wanted = run(lambda x: plain(layer, x, drop(x)), layer, x, dy)
    assert found.keys() == wanted.keys()
    assert ("weight" in found) is trained
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12, msg=name)


@parts_of
@pytest.mark.parametrize("drops", [False, True])
def test_without_gradients_it_says_the_same(parts, drops):
    layer, x = layer_of(parts), random(T, IN)
    dropout, _ = dropping(x, layer) if drops else (None, None)
    wanted = linear(x, layer, TORCH, dropout)
    with torch.no_grad():
        found = linear(x, layer, TORCH, dropout)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert not found.requires_grad


def test_rows_of_a_batch_drop_as_they_do_among_all():
    """The last layer multiplies few rows: theirs are the masks of those rows."""
    layer, x, rows = layer_of(PARTS["whole"]), random(T, IN), torch.tensor([1, 4])
    dropout, _ = dropping(x, layer)
    wanted = linear(x, layer, TORCH, dropout)[rows]
    torch.testing.assert_close(linear(x[rows], layer, TORCH, dropout, rows), wanted)


@pytest.mark.parametrize("frozen", ["a", "b.0", "b.1", "x"])
def test_what_is_frozen_has_no_gradient_and_changes_no_other(frozen):
    layer, x, dy = layer_of(PARTS["q,v"]), random(T, IN), random(T, OUT, seed=2)
    wanted = run(lambda x: linear(x, layer), layer, x, dy)
    if frozen == "x":  # nothing below is trained
        layer.zero_grad(set_to_none=True)
        linear(x, layer).backward(dy)
        found = {name: p.grad for name, p in layer.named_parameters()}
        assert x.grad is None
    else:
        layer.lora.get_parameter(frozen + ".weight").requires_grad_(False)
        found = run(lambda x: linear(x, layer), layer, x, dy)
        assert f"lora.{frozen}.weight" not in found
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@parts_of
def test_16_bits_are_no_further_from_the_truth_than_torchs(parts):
    """bf16 operands, as on a GPU: masters are fp32, what is multiplied is rounded once."""
    layer = layer_of(parts, dtype=torch.float32)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.bfloat16())
    x, dy = (random(T, n, seed=n).bfloat16() for n in (IN, OUT))
    found = run(lambda x: linear(x, layer), layer, x, dy)
    same = layer_of(parts, dtype=torch.float32).bfloat16()
    torchs = run(lambda x: plain(same, x, x), same, x, dy)
    exact_layer = layer_of(parts, dtype=torch.float32).bfloat16().double()
    exact = run(lambda x: plain(exact_layer, x, x), exact_layer, x.double(), dy.double())
    assert found["y"].dtype == torch.bfloat16
    assert found["lora.a.weight"].dtype == torch.float32  # of the master
    for name in exact:
        scale = exact[name].abs().max().item()
        assert_as_accurate(found[name].bfloat16(), torchs[name], exact[name], scale)


def test_it_differentiates_once():
    """Its gradient is a number, not a function."""
    layer, x = layer_of(PARTS["whole"]), random(T, IN).requires_grad_()
    y = linear(x, layer)
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@parts_of
def test_delta_is_what_it_adds_to_the_weight(parts):
    """Columns of no part have 0; a weight of more rows than the last part ends at has the rest."""
    layer, x = layer_of(parts, bias=False), random(T, IN)
    delta = layer.lora.delta()
    assert delta.dtype == torch.float64
    assert delta.shape == (parts[-1].end, IN)
    weight = layer.weight.detach().clone()
    weight[: len(delta)] += delta
    torch.testing.assert_close(F.linear(x, weight), linear(x, layer), rtol=1e-12, atol=1e-12)


def test_it_begins_as_nothing_and_with_the_seed():
    lora = LoRA(IN, PARTS["q,v"], R, 1.0)
    drawn = []
    for seed in (0, 1, 0):
        lora.reset(torch.Generator().manual_seed(seed))
        assert lora.a.weight.abs().max() <= IN**-0.5
        assert all(not b.weight.any() for b in lora.b)
        drawn.append(lora.a.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
