"""kernels/add_norm.py: the definition against F.layer_norm, and TORCH.add_norm against it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_accurate

from minift.kernels.add_norm import add_norm_ref
from minift.kernels.dropout import dropout_keep
from minift.ops import TORCH, Draw, Norm

EPS, FP32 = 1e-5, torch.float32
SHAPES = [(1, 1), (1, 8), (5, 33), (64, 128)]  # C = 1: variance 0, only eps stands
with_bias = pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
shapes = pytest.mark.parametrize(("T", "C"), SHAPES)


def make(T, C, dtype=torch.float64):
    """x, residual in dtype; weight, norm bias, bias; gradients of y and s."""
    torch.manual_seed(0)
    x, r, dy, ds = torch.randn(4, T, C, dtype=torch.float64, device=DEVICE).to(dtype)
    w, nb, b = torch.randn(3, C, dtype=torch.float64, device=DEVICE)
    return [x, r + 3, w + 1, nb, b], (dy, ds)  # + 3: a mean that must be taken off


def run(fn, inputs, upstream, biased, eps=EPS, **options):
    """y, s and the gradient of every input."""
    x, r, w, nb, b = leaves = [i.detach().requires_grad_() for i in inputs]
    results = fn(x, r, Norm(w, nb, eps), b if biased else None, **options)
    upstream = [g.to(y.dtype) for g, y in zip(upstream, results, strict=True)]
    torch.autograd.backward(results, upstream)
    return [*(y.detach() for y in results), *(leaf.grad for leaf in leaves[: 4 + biased])]


def drawn(T, C, p):
    draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    dropout = TORCH.draw_dropout(draw, torch.arange(T, device=DEVICE), C + 3, 3, 2).at(1, p)
    return dropout, dropout_keep(dropout, C)[:, 0]


@shapes
@with_bias
def test_ref_is_layer_norm_of_the_sum(T, C, biased):
    inputs, _ = make(T, C)
    x, r, w, nb, b = inputs
    y, s = add_norm_ref(x, r, Norm(w, nb, EPS), b if biased else None)
    assert torch.equal(s, r + (x + b if biased else x))
    torch.testing.assert_close(y, F.layer_norm(s, (C,), w, nb, EPS))
    plain, _ = add_norm_ref(x, r, Norm(w, None, EPS), b if biased else None)
    torch.testing.assert_close(plain, F.layer_norm(s, (C,), w, None, EPS))


@shapes
@with_bias
def test_ref_is_rms_norm_of_the_sum(T, C, biased):
    (x, r, w, _, b), _ = make(T, C)
    y, s = add_norm_ref(x, r, Norm(w, None, EPS, rms=True), b if biased else None)
    assert torch.equal(s, r + (x + b if biased else x))
    torch.testing.assert_close(y, F.rms_norm(s, (C,), w, EPS))


@pytest.mark.parametrize("fn", [add_norm_ref, TORCH.add_norm], ids=["definition", "torch"])
def test_the_second_result_is_the_next_residual(fn):
    """The sum before the norm, or what comes out of it; without a residual the sum is x."""
    (x, r, w, nb, b), _ = make(3, 8)
    norm = Norm(w, nb, EPS)
    y, s = fn(x, r, norm, b)
    again, stream = fn(x, r, norm, b, post=True)
    assert torch.equal(again, y)
    assert torch.equal(stream, y)
    for bias in (None, b):
        y, s = fn(x, None, norm, bias)
        assert torch.equal(s, x if bias is None else x + b)
        torch.testing.assert_close(y, F.layer_norm(s, (8,), w, nb, EPS))


def test_ref_drops_x_and_bias_but_not_the_residual():
    inputs, _ = make(4, 6)
    x, r, w, nb, b = inputs
    keep = torch.rand(4, 6, device=DEVICE) < 0.5
    _, s = add_norm_ref(x, r, Norm(w, nb, EPS), b, keep, 0.2)
    torch.testing.assert_close(s, torch.where(keep, r + (x + b) / 0.8, r))


@shapes
@with_bias
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_fp64_equals_the_definition(T, C, biased, p):
    """Both results and every gradient, with different gradients into y and s."""
    inputs, upstream = make(T, C)
    dropout, keep = drawn(T, C, p) if p else (None, None)
    actual = run(TORCH.add_norm, inputs, upstream, biased, dropout=dropout)
    exact = run(add_norm_ref, inputs, upstream, biased, keep=keep, p=p)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_norms_without_bias_and_sums_without_residual(dtype, p, rms, post):
    """As the newer models have them: both results and every gradient."""
    inputs, upstream = make(5, 33, dtype)
    dropout, keep = drawn(5, 33, p) if p else (None, None)

    def gradients(fn, dtype, wide, **drops):
        x, w, b = (inputs[i].to(d).requires_grad_() for i, d in ((0, dtype), (2, wide), (4, wide)))
        results = fn(x, None, Norm(w, None, EPS, rms), b, post=post, **drops)
        sent = [g.to(dtype) for g in upstream]
        return [*results, *torch.autograd.grad(results, (x, w, b), sent)]

    actual = gradients(TORCH.add_norm, dtype, torch.promote_types(dtype, FP32), dropout=dropout)
    same_dtype, exact = (
        gradients(add_norm_ref, d, d, keep=keep, p=p) for d in (dtype, torch.float64)
    )
    for a, same, e in zip(actual, same_dtype, exact, strict=True):
        assert_as_accurate(a.to(dtype), same, e, scale=e.abs().max().item())


def check_accuracy(T, C, biased, dtype, p):
    """Activations in dtype, parameters in fp32 as the models hold them."""
    inputs, upstream = make(T, C, dtype)
    inputs[2:] = [i.to(dtype).float() for i in inputs[2:]]  # fp32 masters that bf16 can hold
    dropout, keep = drawn(T, C, p) if p else (None, None)
    actual = run(TORCH.add_norm, inputs, upstream, biased, dropout=dropout)
    assert [a.dtype for a in actual] == [dtype] * 4 + [torch.float32] * (2 + biased)
    same_dtype, exact = (
        run(add_norm_ref, [i.to(d) for i in inputs], upstream, biased, keep=keep, p=p)
        for d in (dtype, torch.float64)
    )
    # Torch adds s * rstd and -mean * rstd: with one column rstd is 316 and these are the terms.
    s = exact[1]
    rstd = 1 / (s.var(-1, correction=0) + EPS).sqrt()
    term = (s.abs().amax(-1) * rstd).max().item()
    for a, same, e in zip(actual, same_dtype, exact, strict=True):
        assert_as_accurate(a.to(dtype), same, e, max(term, e.abs().max().item()))


@shapes
@with_bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_is_as_accurate_as_the_definition(T, C, biased, dtype, p):
    """Both results and every gradient, in the dtypes of the models."""
    check_accuracy(T, C, biased, dtype, p)


@pytest.mark.parametrize("T", [1024, 4096])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_many_rows_are_not_added_up_in_bf16(T, p):
    """Torch's own LayerNorm fails: the gradients of its parameters are 4 % and 10 % off."""
    check_accuracy(T, 96, True, torch.bfloat16, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_wanted_gradients_are_made(dtype):
    """Each input alone has the gradient that it has among the others: layers freeze in part."""
    inputs, upstream = make(64, 32, dtype)
    inputs[2:] = [i.float() for i in inputs[2:]]
    dropout, _ = drawn(64, 32, 0.3)
    expected = run(TORCH.add_norm, inputs, upstream, True, dropout=dropout)[2:]
    for i, wanted in enumerate(expected):
        x, r, w, nb, b = leaves = [v.detach().requires_grad_(i == j) for j, v in enumerate(inputs)]
        results = TORCH.add_norm(x, r, Norm(w, nb, EPS), b, dropout)
        pairs = [(y, g) for y, g in zip(results, upstream, strict=True) if y.requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        assert torch.equal(leaves[i].grad, wanted)
        assert all(leaf.grad is None for j, leaf in enumerate(leaves) if j != i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_any_strides(dtype, p):
    """Transposed inputs and upstream gradients; and one number for all, as `sum` sends."""
    inputs, upstream = make(24, 16, dtype)
    inputs[2:] = [i.float() for i in inputs[2:]]
    one = torch.ones((), dtype=dtype, device=DEVICE).expand(24, 16)
    dropout = drawn(24, 16, p)[0] if p else None
    turned = [i.T.contiguous().T for i in inputs[:2]] + inputs[2:]
    for dy, ds in (upstream, (one, one)):
        expected = run(
            TORCH.add_norm, inputs, (dy.contiguous(), ds.contiguous()), True, dropout=dropout
        )
        dy, ds = (dy, ds) if dy is one else (g.T.contiguous().T for g in (dy, ds))
        actual = run(TORCH.add_norm, turned, (dy, ds), True, dropout=dropout)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_eps_is_added_to_the_variance():
    """A row of equal values: 0 over sqrt(eps). With eps far above the variance, it decides."""
    inputs, upstream = make(5, 16)
    for eps in (1e-12, 1e-5, 10.0):
        actual = run(TORCH.add_norm, inputs, upstream, True, eps)
        exact = run(add_norm_ref, inputs, upstream, True, eps)
        for a, e in zip(actual, exact, strict=True):
            torch.testing.assert_close(a, e)
    x = torch.full((2, 8), 3.0, device=DEVICE)
    weight, bias = torch.ones(8, device=DEVICE), torch.arange(8.0, device=DEVICE)
    y, _ = TORCH.add_norm(x, x, Norm(weight, bias, EPS))
    assert torch.equal(y, bias.expand(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scales_without_bias(dtype):
    """The mean of kept elements is over 1 - p in s and in dx: roundings go either way."""
    torch.manual_seed(0)
    x, ds = (torch.rand(2, 500, 64, device=DEVICE) + 0.1).to(dtype)
    dropout, keep = drawn(500, 64, 0.1)
    x.requires_grad_()
    norm = Norm(*torch.ones(2, 64, device=DEVICE), EPS)
    _, s = TORCH.add_norm(x, torch.zeros_like(x), norm, None, dropout)
    s.backward(ds)
    for scaled, plain in ((s, x), (x.grad, ds)):
        ratio = (scaled.double() / plain.double())[keep].mean().item()
        assert ratio * 0.9 == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_elements_have_no_gradient(dtype):
    """dx is 0 exactly where x + bias was dropped; the residual's is not."""
    inputs, upstream = make(64, 32, dtype)
    inputs[2:] = [i.float() for i in inputs[2:]]
    dropout, keep = drawn(64, 32, 0.4)
    _, s, dx, dr, *_ = run(TORCH.add_norm, inputs, upstream, True, dropout=dropout)
    assert torch.equal(s[~keep], inputs[1][~keep])
    assert torch.equal(dx != 0, keep & (dr != 0))
    assert (dr != 0).float().mean() > 0.95


def test_statistics_do_not_lose_a_large_mean():
    """Mean 1000, deviation 1 in fp32: a one-pass variance would be wrong in the third digit."""
    torch.manual_seed(0)
    x = torch.randn(4, 256, device=DEVICE) + 1000
    zero, norm = torch.zeros_like(x), Norm(*torch.eye(2, 256, device=DEVICE).add(1), EPS)
    y, _ = TORCH.add_norm(x, zero, norm)
    wide = Norm(norm.weight.double(), norm.bias.double(), EPS)
    exact, _ = add_norm_ref(x.double(), zero.double(), wide)
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [((2, 3, 4), (2, 3, 4), (3, 4)), ((2, 4), (3, 4), (4,)), ((2, 4), (2, 4), (1,))],
    ids=["three axes", "residual", "weight"],
)
def test_wrong_shapes_are_named(x, residual, weight):
    message = rf"expected x and residual \(T, C\), weight and biases \(C,\), got x \({x[0]}, "
    norm = Norm(torch.ones(weight), torch.ones(weight), EPS)
    with pytest.raises(ValueError, match=message):
        TORCH.add_norm(torch.zeros(x), torch.zeros(residual), norm)


def test_an_rms_norm_has_no_bias():
    norm = Norm(torch.ones(4), torch.ones(4), EPS, rms=True)
    with pytest.raises(ValueError, match="expected an RMSNorm without bias"):
        TORCH.add_norm(torch.zeros(2, 4), None, norm)
