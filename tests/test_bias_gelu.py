"""kernels/bias_gelu.py: the definition against F.gelu, and TORCH.bias_gelu against it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_accurate

from minift.kernels.bias_gelu import KINDS, bias_gelu_ref
from minift.ops import TORCH

with_bias = pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
kinds = pytest.mark.parametrize("kind", KINDS)


def make(dtype=torch.float64, T=37, width=21):
    """x over all of the curve, bias, upstream gradient."""
    torch.manual_seed(0)
    x = torch.linspace(-9, 9, T * width, dtype=torch.float64, device=DEVICE).view(T, width)
    bias = torch.randn(width, dtype=torch.float64, device=DEVICE)
    dy = torch.randn(T, width, dtype=torch.float64, device=DEVICE)
    return x.to(dtype), bias.to(dtype), dy.to(dtype)


def run(fn, x, bias, dy, kind):
    """y, dx and, when there is a bias, dbias."""
    leaves = [i.detach().requires_grad_() for i in (x, bias) if i is not None]
    y = fn(leaves[0], leaves[1] if bias is not None else None, kind)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("kind", "approximate"), [("gelu_erf", "none"), ("gelu_tanh", "tanh")])
def test_ref_is_gelu_of_the_sum(kind, approximate):
    x, bias, dy = make()
    for b in (None, bias):
        actual = run(bias_gelu_ref, x, b, dy, kind)
        z = x if b is None else x + b
        expected = run(lambda z, _, __: F.gelu(z, approximate=approximate), z, None, dy, kind)
        torch.testing.assert_close(actual[:2], expected)
        if b is not None:
            torch.testing.assert_close(actual[2], expected[1].sum(0))


@kinds
@with_bias
def test_fp64_equals_the_definition(kind, biased):
    x, bias, dy = make()
    bias = bias if biased else None
    actual = run(TORCH.bias_gelu, x, bias, dy, kind)
    torch.testing.assert_close(actual, run(bias_gelu_ref, x, bias, dy, kind), rtol=1e-9, atol=1e-12)


@kinds
@with_bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_the_definition(kind, biased, dtype):
    """Activations in dtype, the bias in fp32 as the models hold it."""
    x, bias, dy = make(dtype)
    bias = bias if biased else None
    master = bias.float() if biased else None
    actual = run(TORCH.bias_gelu, x, master, dy, kind)
    assert actual[0].dtype == actual[1].dtype == dtype
    same_dtype = run(bias_gelu_ref, x, bias, dy, kind)
    wide = [None if i is None else i.double() for i in (x, bias, dy)]
    exact = run(bias_gelu_ref, *wide, kind)
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert_as_accurate(a.to(dtype), s, e, max(1.0, e.abs().max().item()))


def test_the_two_kinds_differ():
    """By 5e-4 at most: a swapped kind passes any coarse tolerance."""
    x, _, _ = make()
    gap = (TORCH.bias_gelu(x, None, "gelu_erf") - TORCH.bias_gelu(x, None, "gelu_tanh")).abs()
    assert 1e-4 < gap.max() < 1e-3


def test_far_ends_are_the_line_and_zero():
    """No NaN from inf * 0 in the value or the gradient of the tails."""
    x = torch.tensor([[-1e4, -50.0, 50.0, 1e4]], device=DEVICE)
    for kind in KINDS:
        y, dx = run(TORCH.bias_gelu, x, None, torch.ones_like(x), kind)
        torch.testing.assert_close(y, x.clamp(min=0))
        torch.testing.assert_close(dx, (x > 0).float())


@pytest.mark.parametrize(
    ("bias", "kind", "message"),
    [
        (None, "relu", "expected kind gelu_erf or gelu_tanh, got 'relu'"),
        (torch.zeros(1), "gelu_erf", r"expected bias \(4,\), got \(1,\)"),
        (torch.zeros(3, 4), "gelu_tanh", r"expected bias \(4,\), got \(3, 4\)"),
    ],
    ids=["kind", "bias that would broadcast", "bias of two axes"],
)
def test_what_does_not_fit_is_named(bias, kind, message):
    with pytest.raises(ValueError, match=message):
        TORCH.bias_gelu(torch.zeros(3, 4), bias, kind)
