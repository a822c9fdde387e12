"""kernels/cross_entropy.py: the definition against torch's loss, the tables against it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_accurate

from minift.kernels.cross_entropy import cross_entropy_ref
from minift.ops import IGNORE_INDEX, TORCH, TargetReport

losses = pytest.mark.parametrize(
    "loss", [cross_entropy_ref, TORCH.cross_entropy], ids=["ref", "torch"]
)
weights = pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
smoothing = pytest.mark.parametrize("e", [0.0, 0.1, 1.0])
ignoring = pytest.mark.parametrize("ignored", ["none", "some", "all"])


def make(N=9, V=7, weighted=False, ignored="none", dtype=torch.float64):
    """logits, target, class weights (one of them 0)."""
    torch.manual_seed(0)
    logits = (torch.randn(N, V, dtype=torch.float64, device=DEVICE) * 4).to(dtype)
    target = torch.randint(V, (N,), device=DEVICE)
    target[{"none": slice(0, 0), "some": slice(1, None, 3), "all": slice(None)}[ignored]] = (
        IGNORE_INDEX
    )
    weight = torch.rand(V, dtype=torch.float64, device=DEVICE) + 0.5
    weight[V // 2] = 0
    return (
        logits,
        target,
        weight.to(torch.promote_types(dtype, torch.float32)) if weighted else None,
    )


def run(fn, logits, *args):
    """Loss and logit gradient of `fn`, with a non-uniform upstream gradient."""
    logits = logits.detach().requires_grad_()
    loss = fn(logits, *args)
    upstream = torch.linspace(-1, 2, len(loss), dtype=loss.dtype, device=loss.device)
    loss.backward(upstream)
    return loss.detach(), logits.grad


def torch_loss(logits, target, weight, e, reduction="none"):
    return F.cross_entropy(
        logits, target, weight, ignore_index=-100, label_smoothing=e, reduction=reduction
    )


@losses
@weights
@smoothing
@ignoring
def test_every_row_is_torchs(loss, weighted, e, ignored):
    """The whole grid of options, loss and gradient."""
    inputs = *make(weighted=weighted, ignored=ignored), e
    for a, expected in zip(run(loss, *inputs), run(torch_loss, *inputs), strict=True):
        torch.testing.assert_close(a, expected, rtol=1e-11, atol=1e-12)


@losses
@weights
@smoothing
@pytest.mark.parametrize("ignored", ["none", "some"])
def test_sum_over_weights_is_torchs_mean(loss, weighted, e, ignored):
    """What a caller divides by: the weights of the targets that count."""
    logits, target, weight = make(weighted=weighted, ignored=ignored)
    counts = target != IGNORE_INDEX
    total = weight[target[counts]].sum() if weighted else counts.sum()
    mean = torch_loss(logits, target, weight, e, "mean")
    torch.testing.assert_close(loss(logits, target, weight, e).sum() / total, mean)


@weights
@ignoring
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "V", "e"),
    [(1, 2, 0.0), (1, 2, 0.1), (5, 127, 0.0), (5, 127, 0.1), (5, 127, 1.0), (3, 5000, 0.0)],
)
def test_is_as_accurate_as_the_definition(N, V, e, weighted, ignored, dtype):
    """From two labels to a vocabulary."""
    logits, target, weight = make(N, V, weighted, ignored, dtype)
    actual = run(TORCH.cross_entropy, logits, target, weight, e)
    same_dtype = run(cross_entropy_ref, logits, target, weight, e)
    wide = weight.double() if weighted else None
    exact = run(cross_entropy_ref, logits.double(), target, wide, e)
    for a, s, x in zip(actual, same_dtype, exact, strict=True):
        assert a.dtype == s.dtype
        assert_as_accurate(a, s, x, scale=max(1.0, x.abs().max().item()))


@weights
@pytest.mark.parametrize("e", [0.1, 1.0])
def test_smoothing_over_a_vocabulary_is_right_to_five_digits(weighted, e):
    """No better: torch's backward adds V terms of e / V to 1 - e, each rounded as if it were 1.
    The definition's does not, so twice its error is out of reach."""
    logits, target, weight = make(4, 5000, weighted, dtype=torch.float32)
    actual = run(TORCH.cross_entropy, logits, target, weight, e)
    exact = run(
        cross_entropy_ref, logits.double(), target, weight.double() if weighted else None, e
    )
    for a, x in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), x, rtol=1e-5, atol=2e-5)


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_fp32_whatever_the_logits(loss, dtype):
    """And computed in fp32: the loss of the bf16 logits widened, to the bit. Gradients come back
    in the dtype of the logits."""
    logits, target, weight = make(weighted=True, dtype=dtype)
    actual, grad = run(loss, logits, target, weight, 0.1)
    assert actual.dtype == torch.float32
    assert grad.dtype == dtype
    assert torch.equal(actual, run(loss, logits.float(), target, weight, 0.1)[0])


@losses
@weights
@smoothing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_have_loss_and_gradient_exactly_0(loss, weighted, e, dtype):
    """All of them ignored included: no 0 / 0, since nothing is divided."""
    for ignored in ("some", "all"):
        logits, target, weight = make(weighted=weighted, ignored=ignored, dtype=dtype)
        rows = target == IGNORE_INDEX
        for result in run(loss, logits, target, weight, e):
            assert torch.equal(result[rows], torch.zeros_like(result[rows]))
            assert (result[~rows] != 0).any() == (ignored == "some")


@losses
def test_huge_logits_do_not_overflow(loss):
    logits = torch.tensor([[1e4, -1e4, 0.0]], device=DEVICE)
    value, grad = run(loss, logits, torch.tensor([0], device=DEVICE))
    assert value.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))


@losses
def test_gradient_of_a_row_sums_to_0_without_weights(loss):
    """Softmax and target both sum to 1."""
    _, grad = run(loss, *make(ignored="some"), 0.1)
    torch.testing.assert_close(grad.sum(-1), grad.new_zeros(len(grad)))


@losses
def test_no_rows_give_no_losses(loss):
    logits = torch.zeros(0, 3, device=DEVICE)
    assert loss(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (0,)


@pytest.mark.parametrize("target", [-1, 3])
@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assert ends the process")
def test_target_out_of_range_stops(target):
    """A label that does not exist must not train another."""
    with pytest.raises(ValueError, match=rf"row 1: expected a class .* got {target}"):
        TORCH.cross_entropy(torch.zeros(2, 3), torch.tensor([0, target]))


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        ((2, 9), torch.zeros(3).long(), r"expected logits .* got \(2, 9\) and \(3,\)"),
        ((9,), torch.tensor(0), r"got \(9,\) and \(\)"),
        ((2, 9), torch.zeros(2, 9), r"got \(2, 9\) and \(2, 9\)"),
        ((2, 9), torch.zeros(2).int(), r"expected an int64 target, got torch.int32: call .long"),
    ],
    ids=["rows", "one axis", "probabilities", "int32"],
)
def test_what_does_not_fit_is_named(logits, target, message):
    with pytest.raises(ValueError, match=message):
        TORCH.cross_entropy(torch.zeros(logits), target)


def test_report_counts_targets():
    """Over all calls, without those that are ignored."""
    report = TargetReport.on(DEVICE)
    logits, target, _ = make(ignored="some")
    for _ in range(2):
        TORCH.cross_entropy(logits, target, report=report)
    assert report.counted == 2 * (target != IGNORE_INDEX).sum()
    report.check()
