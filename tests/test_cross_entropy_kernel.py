"""kernels/cross_entropy.py: the kernels against the definition, on every kind of row."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Guarded, empty_is_poisoned, guarded
from launches import compilations, launches_are_declared, recorded

from minift.kernels import cross_entropy as module
from minift.kernels.cross_entropy import (
    IGNORE_INDEX,
    _cut,
    cross_entropy,
    cross_entropy_,
    cross_entropy_ref,
)
from minift.ops import TRITON, TargetReport

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# Around 16 bytes, around each tile and each change of tile; odd and even.
COLUMNS = [1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 255, 256, 257, 512, 513, 2055, 4999, 8193, 12300]
WIDTHS = list(itertools.product(COLUMNS, DTYPES[:2]))
WIDTHS += [(7, torch.float16), (520, torch.float16)]  # it differs from bf16 in the casts only
ROWS = 3


def make(V, dtype, stride=None, offset=0, ignored=(1,), rows=ROWS):
    """Logits, the first of them `offset` elements past 16 bytes, in memory full of NaN; targets."""
    torch.manual_seed(V)
    logits = (torch.randn(rows, V) * 4).to(DEVICE, dtype)
    target = torch.randint(V, (rows,), device=DEVICE)
    target[list(ignored)] = IGNORE_INDEX
    return guarded(logits, offset, (stride or V) - V).tensor, target


def upstream(rows=ROWS):
    return torch.linspace(-1, 2, rows, device=DEVICE)


def with_autograd(loss, logits, *args, **options):
    """Loss and gradient of `loss`, with an upstream gradient that differs from row to row."""
    leaf = logits.detach().requires_grad_()
    losses = loss(leaf, *args, **options)
    (grad,) = torch.autograd.grad(losses, leaf, upstream(len(losses)).to(losses.dtype))
    return losses.detach(), grad


def out_of_place(logits, *args, **options):
    """The same, from cross_entropy: it writes its gradient and nothing between the rows."""
    with empty_is_poisoned():
        losses, grad = with_autograd(cross_entropy, logits, *args, **options)
    Guarded(grad, grad.new_zeros(0).set_(grad.untyped_storage())).assert_untouched()
    assert grad.data_ptr() % 16 == logits.data_ptr() % 16  # its rows are cut as those of logits
    return losses, grad


def in_place(logits, *args, **options):
    """The same, from cross_entropy_, on a copy with the same strides and alignment."""
    past = logits.data_ptr() % 16 // logits.element_size()
    slack = logits.stride(0) - logits.shape[1] if len(logits) > 1 else 0
    copy = guarded(logits, past, slack)
    scale = upstream(len(logits))
    with empty_is_poisoned():
        losses = cross_entropy_(copy.tensor, *args, row_scale=scale, **options)
    copy.assert_untouched()
    return losses, copy.tensor


def both(logits, *args, **options):
    yield out_of_place(logits, *args, **options)
    yield in_place(logits, *args, **options)


def check(logits, target, weight=None, e=0.0):
    """Both entries, against the definition in the same dtype and in fp64."""
    wide = None if weight is None else weight.double()
    same_dtype = with_autograd(cross_entropy_ref, logits, target, weight, e)
    exact = with_autograd(cross_entropy_ref, logits.double(), target, wide, e)
    for actual in both(logits, target, weight, e):
        for a, s, x in zip(actual, same_dtype, exact, strict=True):
            assert a.dtype == s.dtype
            assert_as_accurate(a, s, x, scale=max(1.0, x.abs().max().item()))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("e", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("V", "dtype"), [(3, torch.float32), (700, torch.bfloat16), (8201, torch.float32)]
)
def test_the_whole_grid_of_options(V, dtype, e, weighted):
    """torch's semantics, which the definition is held to in test_cross_entropy.py."""
    logits, target = make(V, dtype)
    weight = torch.rand(V, device=DEVICE) + 0.5 if weighted else None
    if weighted:
        weight[V // 2] = 0
    check(logits, target, weight, e)


@triton.jit
def cut_kernel(x_ptr, cut_ptr, columns_ptr, V, UNIT: tl.constexpr):
    """head and body; how often each column is at an edge."""
    head, units, edge, at_edge = _cut(x_ptr, V, UNIT)
    tl.store(cut_ptr, head)
    tl.store(cut_ptr + 1, units * UNIT)
    tl.atomic_add(columns_ptr + edge, 1, mask=at_edge)


@dtypes
def test_bodies_start_and_end_on_boundaries(dtype):
    """As promised to the compiler, which a GPU holds us to; every other column is at one edge."""
    memory = torch.zeros(64, dtype=dtype, device=DEVICE)
    unit = 16 // memory.element_size()
    for past, V in itertools.product(range(unit), [1, unit - 1, unit, unit + 1, 3 * unit + 1]):
        cut, at_edge = torch.zeros(2, 64, dtype=torch.int32, device=DEVICE)
        cut_kernel[(1,)](memory[past:], cut, at_edge, V, UNIT=unit)
        head, body = cut[:2].tolist()
        assert (past + head) % unit == 0 or head == V
        assert head < unit
        assert V - head - body < unit
        expected = [int(v < head or head + body <= v < V) for v in range(64)]
        assert at_edge.tolist() == expected


@pytest.mark.parametrize(("V", "dtype"), WIDTHS)
def test_every_width(V, dtype):
    check(*make(V, dtype, ignored=(), rows=2))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_every_alignment(dtype, rows):
    """Rows that start anywhere between two 16-byte boundaries; what lies around them, NaN, is
    neither read nor written."""
    check(*make(300, dtype, 301, rows=rows))
    check(*make(300, dtype, 304, offset=3, rows=2))


@pytest.mark.parametrize("stride", [0, 1, 3])
def test_targets_and_scales_of_any_stride(stride):
    """Of one target for all rows, of every third: no copies are made."""
    logits, target = make(33, torch.float32, ignored=())
    targets, scales = target.repeat_interleave(3), upstream().repeat_interleave(3)
    strided, scale = (x[1:].as_strided((ROWS,), (stride,)) for x in (targets, scales))
    dense, dense_scale = strided.clone(), scale.clone()
    leaf = logits.detach().requires_grad_()
    expected = cross_entropy_ref(leaf, dense)
    (expected_grad,) = torch.autograd.grad(expected, leaf, dense_scale)
    loss = cross_entropy(leaf, strided)
    (grad,) = torch.autograd.grad(loss, leaf, scale)
    loss_ = cross_entropy_(grad_ := logits.clone(), strided, row_scale=scale)
    for a, e in ((loss, expected), (loss_, expected), (grad, expected_grad), (grad_, grad)):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_of_any_dtype_and_stride(dtype):
    """They are brought to fp32, side by side."""
    logits, target = make(7, torch.float32)
    weight = (torch.rand(14, device=DEVICE) + 0.5).to(dtype)[::2]
    check(logits, target, weight.float(), 0.1)
    expected = in_place(logits, target, weight.float().clone(), 0.1)
    for actual in both(logits, target, weight, 0.1):
        torch.testing.assert_close(actual, expected)


@given(st.integers(1, 300), st.sampled_from(DTYPES), st.lists(st.booleans(), min_size=4))
@settings(max_examples=4)
def test_what_is_ignored_may_as_well_not_be_there(V, dtype, counts):
    """Other rows are the same to the bit without it, at the same alignment."""
    rows, counts = 4, torch.tensor(counts[:4], device=DEVICE)
    logits, target = make(V, dtype, (V + 7) // 8 * 8, ignored=(), rows=rows)
    some = target.where(counts, IGNORE_INDEX)
    scale = upstream(rows)
    copies = guarded(logits, slack=logits.stride(0) - V).tensor
    fewer = guarded(logits[counts], slack=logits.stride(0) - V).tensor
    loss = cross_entropy_(copies, some, row_scale=scale)
    loss_of_fewer = cross_entropy_(fewer, target[counts], row_scale=scale[counts])
    assert torch.equal(loss[counts], loss_of_fewer)
    assert torch.equal(copies[counts], fewer)
    assert not loss[~counts].any()
    assert not copies[~counts].any()


@given(st.integers(1, 600), st.sampled_from([0.0, 0.3]), st.sampled_from([-2.0, 0.0, 0.25, 2.0]))
@settings(max_examples=5)
def test_the_gradient_is_linear_in_the_scale(V, e, factor):
    """To the bit by powers of two; the loss does not know the scale. No scale is 1."""
    logits, target = make(V, torch.float32, ignored=(), rows=2)
    one, other = logits.clone(), logits.clone()
    scale = None if factor > 1 else torch.tensor(1.0, device=DEVICE)
    loss = cross_entropy_(one, target, None, e, row_scale=scale)
    again = cross_entropy_(other, target, None, e, row_scale=torch.tensor(factor, device=DEVICE))
    assert torch.equal(loss, again)
    assert torch.equal(other, factor * one)


@given(st.integers(2, 600), st.integers(0, 99))
@settings(max_examples=4)
def test_classes_have_no_order(V, seed):
    """Columns, weights and targets in another order: equal losses, the gradient in that order."""
    logits, target = make(V, torch.float32, rows=2)
    weight = torch.rand(V, device=DEVICE) + 0.5
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    moved = torch.where(target == IGNORE_INDEX, target, order.argsort()[target.clamp(0)])
    loss, grad = in_place(logits, target, weight, 0.1)
    loss_, grad_ = in_place(logits[:, order].contiguous(), moved, weight[order].contiguous(), 0.1)
    torch.testing.assert_close(loss_, loss)
    torch.testing.assert_close(grad_, grad[:, order], rtol=1e-5, atol=1e-7)


def samples():
    """torch's own inputs for its cross-entropy, as (N, V) rows."""
    pytest.importorskip("expecttest")  # torch's module of tests imports it
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    seen = set()
    for sample in op.sample_inputs(DEVICE, torch.float32, requires_grad=False):
        target, options = sample.args[0], dict(sample.kwargs)
        options.pop("reduction", None)
        if target.is_floating_point():
            continue  # class probabilities: not an option here
        if (case := f"{sample.input.shape} {options}") in seen:
            continue  # again, with another reduction
        seen.add(case)
        logits = sample.input if sample.input.ndim > 1 else sample.input[None]
        rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
        yield rows, target.reshape(-1), options


def test_torchs_own_sample_inputs():
    """Every one with class indices: weights, smoothing, ignored indices, all as torch has them."""
    count = 0
    for logits, target, options in samples():
        expected = with_autograd(
            lambda x, t, **o: F.cross_entropy(x, t, reduction="none", **o),
            logits,
            target,
            **options,
        )
        for actual in both(logits, target, **options):
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)
        count += 1
    assert count == 8


@given(
    V=st.integers(1, 600),
    rows=st.integers(1, 2),
    size=st.sampled_from([1e-3, 1.0, 60.0]),
    shift=st.sampled_from([0.0, -1e4, 3e4]),
)
@settings(max_examples=6)
def test_a_shift_of_all_logits_changes_nothing(V, rows, size, shift):
    """Softmax does not know it; and the gradient of a row sums to 0."""
    torch.manual_seed(V)
    logits = torch.randint(-64, 64, (rows, V), device=DEVICE) * (size / 64)
    target = torch.randint(V, (rows,), device=DEVICE)
    loss, grad = with_autograd(cross_entropy, logits, target)
    shifted = (logits.double() + shift).float()
    expected, _ = with_autograd(cross_entropy_ref, shifted.double(), target)
    torch.testing.assert_close(
        cross_entropy(shifted, target).double(), expected, atol=1e-5, rtol=1e-6
    )
    torch.testing.assert_close(grad.sum(-1), torch.zeros_like(loss), atol=1e-5, rtol=0)


def test_a_row_alone_equals_itself_in_any_batch():
    """To the bit."""
    logits, target = make(304, torch.bfloat16)
    scale = upstream()
    all_rows = cross_entropy_(copies := logits.clone(), target, row_scale=scale)
    for i in range(ROWS):
        row = slice(i, i + 1)
        one = cross_entropy_(copy := logits[row].clone(), target[row], row_scale=scale[row])
        assert torch.equal(one, all_rows[row])
        assert torch.equal(copy, copies[row])


# ---------------------------------------------------------------- hard rows


@pytest.mark.parametrize(("start", "dtype"), list(zip([0, 5, 0], DTYPES, strict=True)))
def test_whole_blocks_of_minus_infinity(start, dtype):
    """Masked classes, from the first tile on, have probability 0 and no NaN."""
    logits, target = make(500, dtype, ignored=())
    logits[:, start : start + 300] = -torch.inf
    target[:] = torch.tensor([400, 499, 310])
    check(logits, target)
    _, grad = with_autograd(cross_entropy, logits, target)
    assert (grad[:, start : start + 300] == 0).all()


@dtypes
def test_the_lowest_float_has_no_probability(dtype):
    """What is often written where a class is masked: first, last, and all of a lane's."""
    V = 700
    logits, target, *_ = make(V, dtype, ignored=())
    logits[:, 9:500] = torch.finfo(dtype).min
    logits[:, 0] = logits[:, -1] = torch.finfo(dtype).min
    target[:] = torch.tensor([5, 600, 698, 1])[: len(target)]
    check(logits, target)


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0]], device=DEVICE)
    for loss, grad in both(logits, torch.tensor([0], device=DEVICE)):
        assert loss.item() == pytest.approx(0.0, abs=1e-8)
        assert not grad.any()


def test_an_ignored_row_is_not_read():
    """NaN logits in it leave no trace: loss 0, gradient 0. Nor does its scale."""
    logits, target = make(300, torch.float32)
    logits[1] = torch.nan
    for loss, grad in both(logits, target):
        assert loss[1] == 0
        assert (grad[1] == 0).all()
        assert not loss.isnan().any()
        assert not grad.isnan().any()
    scale = torch.full((ROWS,), torch.nan, device=DEVICE)
    loss = cross_entropy_(logits, target, row_scale=scale)
    assert not loss.isnan().any()
    assert logits.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("ignore", [-1, 0, 5, 10**12])
def test_any_integer_may_be_the_ignored_one(ignore):
    """A class, too."""
    logits, target = make(7, torch.float32, ignored=(), rows=5)
    target[::2] = ignore
    expected = with_autograd(cross_entropy_ref, logits, target, ignore_index=ignore)
    for actual in both(logits, target, ignore_index=ignore):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("bad", [-1, 7, 2**40 + 3])
def test_target_out_of_range_is_nan_and_named(bad):
    """It reads nothing; the other rows are what they are without it."""
    logits, target = make(7, torch.float32)
    clean = list(both(logits, target))
    target[1] = bad
    report = TargetReport.on(DEVICE)
    for (loss, grad), (clean_loss, clean_grad) in zip(
        both(logits, target, report=report), clean, strict=True
    ):
        assert loss[1].isnan()
        assert grad[1].isnan().all()
        for row in (0, 2):
            assert loss[row] == clean_loss[row]
            assert torch.equal(grad[row], clean_grad[row])
    assert report.counted == 2 * 2
    shown = (bad + 2**31) % 2**32 - 2**31  # its low half
    with pytest.raises(ValueError, match=f"row 1: expected a class .* got {shown}$"):
        report.check()


def test_the_last_of_bad_targets_is_named():
    """Over all calls; one in the first row too, whose low half is 0."""
    logits, target = make(7, torch.float32)
    for bad, row in ({0: 2**32}, 0), ({0: 9, 2: 2**31}, 2):
        report = TargetReport.on(DEVICE)
        for targets in (bad, {0: bad[0]}):
            given_target = target.clone()
            for at, value in targets.items():
                given_target[at] = value
            cross_entropy_(logits.clone(), given_target, report=report)
        with pytest.raises(
            ValueError, match=f"row {row}: .* got {(bad[row] + 2**31) % 2**32 - 2**31}$"
        ):
            report.check()


@pytest.mark.parametrize("ignored", [(), (1,), range(ROWS)], ids=["none", "some", "all"])
def test_report_counts_what_counts(ignored):
    """Without an error when there is none; all ignored is 0 and no NaN."""
    logits, target = make(7, torch.float32, ignored=ignored)
    report = TargetReport.on(DEVICE)
    for loss, grad in both(logits, target, report=report):
        assert not loss.isnan().any()
        assert not grad.isnan().any()
    assert report.counted == 2 * (ROWS - len(ignored))
    report.check()


def test_no_rows():
    logits = torch.zeros(0, 5, device=DEVICE)
    for loss, grad in both(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE)):
        assert loss.shape == (0,)
        assert grad.shape == (0, 5)


def test_rows_beyond_two_thousand_million_elements():
    """Offsets are 64 bits wide: the third row starts at 2**31 + 4 elements."""
    stride = 2**30 + 2
    flat = torch.empty(2 * stride + 8, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, untouched
    logits = flat.as_strided((3, 6), (stride, 1))
    logits.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    target = torch.tensor([0, 3, 5], device=DEVICE)
    expected = with_autograd(cross_entropy_ref, logits.clone(), target)
    for a, e in zip(with_autograd(cross_entropy, logits, target), expected, strict=True):
        torch.testing.assert_close(a, e)
    loss = cross_entropy_(logits, target, row_scale=upstream())
    for a, e in zip((loss, logits), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_the_widest_vocabulary():
    """262,144 columns, 64 steps of all lanes."""
    check(*make(262144, torch.bfloat16, ignored=(), rows=1))


def test_more_rows_in_flight_than_the_cache_holds(monkeypatch):
    """A program then takes several rows, in turn."""
    logits, target = make(33, torch.float32, rows=7)
    expected = in_place(logits, target)
    monkeypatch.setattr(module, "L2_BYTES", 2 * 33 * 4)
    with recorded() as seen:
        actual = in_place(logits, target)
    assert seen[0].grid == (2,)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


# ---------------------------------------------------------------- promises


def test_inputs_are_only_read():
    logits, target = make(300, torch.bfloat16, stride=304)
    weight = torch.rand(300, device=DEVICE)
    leaf = logits.requires_grad_()
    watched = [leaf, target, weight]
    before = [(x.detach().clone(), x._version) for x in watched]
    loss = cross_entropy(leaf, target, weight, 0.1)
    sent = upstream()
    loss.backward(sent)
    assert torch.equal(sent, upstream())
    for x, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version


def test_in_place_is_seen_by_autograd():
    """A gradient that still needs the logits is refused, not wrong."""
    x = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    logits = x.exp()  # its backward needs its result
    cross_entropy_(logits.detach(), torch.tensor([0, 1], device=DEVICE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_evaluation_in_inference_mode():
    """Where tensors have no version to count."""
    with torch.inference_mode():
        logits, target = torch.randn(2, 5, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
        loss = cross_entropy(logits, target)
        assert torch.equal(cross_entropy_(logits, target), loss)


def test_in_place_hands_the_gradient_on():
    """As the docstring has it: the gradient of the mean loss with respect to a weight."""
    torch.manual_seed(0)
    x, w = torch.randn(6, 4, device=DEVICE), torch.randn(4, 9, device=DEVICE, requires_grad=True)
    target = torch.randint(9, (6,), device=DEVICE)
    (expected,) = torch.autograd.grad(F.cross_entropy(x @ w, target), w)
    logits = x @ w
    scale = torch.tensor(1 / 6, device=DEVICE)
    loss = cross_entropy_(logits.detach(), target, row_scale=scale)
    logits.backward(logits.detach())
    torch.testing.assert_close(w.grad, expected)
    torch.testing.assert_close((loss * scale).sum(), F.cross_entropy(x @ w, target).detach())


def test_launches_and_nothing_else():
    """One kernel forward, one backward, no copy of an upstream gradient of stride 0."""
    logits, target = make(33, torch.float32)
    leaf = logits.requires_grad_()
    with recorded() as seen:
        cross_entropy(leaf, target).sum().backward()
    assert [x.kernel for x in seen] == ["_loss_kernel", "_gradient_kernel"]
    assert seen[1].arguments["scale_stride"] == 0
    with recorded() as seen:
        cross_entropy_(logits.detach(), target)
    assert [x.kernel for x in seen] == ["_in_place_kernel"]


def test_one_binary_for_all_rows_widths_and_alignments():
    """Rows, V, strides, offsets, the ignored index and the smoothing are run-time numbers."""
    with recorded(run=False) as seen:
        for V, rows, offset in itertools.product([513, 528, 4096], [1, 16, 17], [0, 1]):
            logits, target = make(V, torch.bfloat16, V + offset, offset, (), rows)
            for e, ignore in ((0.1, -100), (0.2, 16)):
                cross_entropy_(logits, target, None, e, ignore)
                cross_entropy(logits, target, None, e, ignore)
    assert compilations(seen) == 2


def test_declared_launches_are_those_that_run():
    """What is compiled without a GPU is what a GPU runs: every dtype, size and option."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    every = {
        "weight": torch.ones(50257, device=DEVICE),
        "label_smoothing": 0.1,
        "report": TargetReport.on(DEVICE),
    }
    cases = [(50257, bf16), (50257, fp16), (50257, fp32), (2, bf16), (5000, bf16), (50257, bf16)]
    with recorded(run=False) as seen:
        for i, (V, dtype) in enumerate(cases):
            options, scale = (every, {"row_scale": upstream(2)}) if i == 5 else ({}, {})
            logits, target = make(V, dtype, ignored=(), rows=2)
            with_autograd(cross_entropy, logits, target, **options)
            cross_entropy_(logits, target, **options, **scale)
    assert launches_are_declared(seen, module) == {launch.name for launch in module.LAUNCHES}


def test_the_table_has_the_kernel():
    assert TRITON.cross_entropy is cross_entropy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(2, 5, dtype=torch.float64)},
            "fp32, fp16 or bf16, got torch.float64",
        ),
        ({"logits": torch.zeros(5, 2).T}, r"unit stride along V, got \(1, 2\): call .contig"),
        ({"target": torch.zeros(3).long()}, r"got \(2, 5\) and \(3,\)"),
        ({"target": torch.zeros(2).int()}, "int64 target, got torch.int32: call .long"),
        ({"weight": torch.ones(4)}, r"expected weight \(5,\), got \(4,\)"),
        ({"target": torch.zeros(2, device="meta").long()}, "expected target on .*, got meta"),
    ],
    ids=["fp64", "strided", "rows", "int32", "weight", "device"],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"logits": torch.zeros(2, 5), "target": torch.zeros(2).long()} | change
    for loss in (cross_entropy, cross_entropy_):
        with pytest.raises(ValueError, match=message):
            loss(**given)


def test_a_device_without_kernels_is_named(monkeypatch):
    """Rather than a wild read: a CPU tensor where nothing interprets."""
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    target = torch.zeros(2, dtype=torch.int64)
    for loss in (cross_entropy, cross_entropy_):
        with pytest.raises(ValueError, match="expected logits on a GPU, got cpu"):
            loss(torch.zeros(2, 5), target)


def test_in_place_needs_rows_of_its_own():
    target = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"without gradient, .*: .detach\(\)"):
        cross_entropy_(torch.zeros(2, 5, device=DEVICE, requires_grad=True), target)
    with pytest.raises(ValueError, match="rows that do not overlap, got stride 0 < 5"):
        cross_entropy_(torch.zeros(5, device=DEVICE).expand(2, 5), target)
