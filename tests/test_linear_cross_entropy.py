"""kernels/linear_cross_entropy.py and its twin in torch, against the definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import empty_is_poisoned, guarded, poisoned
from launches import Operations, compilations, launches_are_declared, recorded

from minift import torch_ops
from minift.kernels import linear_cross_entropy as module
from minift.kernels.linear_cross_entropy import (
    _gather,
    _scale_,
    _scatter_,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_ref,
)
from minift.ops import IGNORE_INDEX, TORCH, TRITON, TargetReport

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TWIN = TORCH.linear_cross_entropy
BOTH = [linear_cross_entropy, TWIN]
both = pytest.mark.parametrize("op", BOTH, ids=["kernel", "torch"])
# (T, C, V, N): rows, width, classes, targets; N = T: all rows. One, primes, a row of two blocks,
# gradients of many blocks.
SHAPES = [(1, 1, 2, 1), (5, 3, 7, 5), (20, 24, 37, 9), (11, 40, 130, 11), (3, 1031, 9, 2)]


def make(T, C, V, N, dtype=torch.float32, ignored=()):
    """x, weight, targets, rows (None when all), row_scale, bias: all of them of order 1."""
    g = torch.Generator().manual_seed(T + C + V + N)
    x = torch.randn(T, C, generator=g)
    weight = torch.randn(V, C, generator=g) * 2 / C**0.5
    bias = torch.randn(V, generator=g)
    targets = torch.randint(V, (N,), generator=g)
    targets[list(ignored)] = IGNORE_INDEX
    rows = None if T == N else torch.randperm(T, generator=g)[:N].sort()[0]
    scale = torch.rand(N, generator=g) + 0.5
    x, weight, bias = (tensor.to(DEVICE, dtype) for tensor in (x, weight, bias))
    return (
        x,
        weight,
        targets.to(DEVICE),
        None if rows is None else rows.to(DEVICE),
        scale.to(DEVICE),
        bias,
    )


def run(op, x, weight, targets, rows=None, row_scale=None, bias=None, upstream=1.0, **options):
    """The loss and the gradients of x, weight and bias, for an upstream gradient."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    x, weight, bias = leaves
    loss = op(x, weight, targets, rows, row_scale, bias, **options)
    upstream = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    wanted = [t for t in leaves if t is not None]
    return loss.detach(), *torch.autograd.grad(loss, wanted, upstream)


def double(*tensors):
    return (t.double() if t is not None and t.is_floating_point() else t for t in tensors)


def check(op, *inputs, upstream=1.0, vocab=None, **options):
    """Against the definition in the same dtype and in fp64. How far off the definition is does not
    depend on how lucky a factor is: it is judged without the upstream gradient."""
    with empty_is_poisoned():
        actual = run(op, *inputs, upstream=upstream, vocab=vocab, **options)
    same = run(linear_cross_entropy_ref, *inputs, vocab=vocab)
    exact = run(linear_cross_entropy_ref, *double(*inputs), vocab=vocab)
    x, weight, targets, *_ = inputs
    terms = x.double().abs() @ weight[:vocab].double().abs().T  # of each logit
    ulps = torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps
    scales = [terms.max().item() * max(len(targets), ulps)]  # a logit has an ulp of x
    scales += [max(1.0, e.abs().max().item()) for e in exact[1:]]
    factors = [1.0] + [upstream] * len(exact[1:])
    for a, s, e, scale, factor in zip(actual, same, exact, scales, factors, strict=True):
        assert a.dtype == s.dtype
        assert_as_accurate(a, factor * s.double(), factor * e, scale)
    return actual


def workspace(rows, V, dtype=torch.float32):
    """As many MiB as so many rows of logits take, with nothing beside them."""
    return rows * -(-V // 64) * 64 * dtype.itemsize / 2**20


# ---------------------------------------------------------------- values


def test_the_definition_is_torchs_loss():
    """Gathered, weighted and summed by hand, in fp64."""
    x, weight, targets, rows, scale, bias = double(*make(20, 24, 37, 9, ignored=(2, 8)))
    logits = F.linear(x[rows], weight[:30], bias[:30])
    targets = targets.where(targets < 30, 0)
    expected = (F.cross_entropy(logits, targets, reduction="none") * scale).sum()
    actual = linear_cross_entropy_ref(x, weight, targets, rows, scale, bias, vocab=30)
    torch.testing.assert_close(actual, expected)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_the_definition(op, shape, dtype):
    """Loss and every gradient, with lists, scales and a bias; and without any of them."""
    inputs = make(*shape, dtype, ignored=range(2, shape[3], 3))
    check(op, *inputs, upstream=-0.7)
    x, weight, targets, rows, *_ = inputs
    check(op, x, weight, targets, rows)


@both
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_fp32_weights_are_cast_and_their_gradients_are_not(op, dtype):
    """A gradient in fp32 that was rounded on its way, as the definition's is, would be no better
    than that of weights in the dtype of x: this one is, in one chunk and in several."""
    x, weight, targets, rows, scale, bias = make(40, 24, 37, 30)
    weight, bias = (t.to(dtype).float() for t in (weight, bias))  # so that the cast loses nothing
    inputs = x.to(dtype), weight, targets, rows, scale, bias
    same, exact = (run(linear_cross_entropy_ref, *given)[2] for given in (inputs, double(*inputs)))
    rounded = run(op, x.to(dtype), weight.to(dtype), *inputs[2:])[2]
    for rows_at_a_time in (30, 7):
        limit = workspace(rows_at_a_time, 37, dtype) + 24 * 37 * dtype.itemsize / 2**20
        actual = check(op, *inputs, workspace_mib=limit)[2]
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, actual.to(dtype).float())
        error = (actual.double() - exact).norm()
        assert error < (rounded.double() - exact).norm()
        assert error < (same.double() - exact).norm()


@both
@pytest.mark.parametrize("rows_at_a_time", [20, 10, 3])
def test_chunks_change_nothing(op, rows_at_a_time):
    """1, 2 and 7 of them: logits here are whole numbers, alike in any product, so that sums in
    fp32 can differ by their order alone. In bf16, too, since that is how dW is added up."""
    N, C, V = 20, 16, 37
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (N, C), generator=g).to(DEVICE, torch.bfloat16)
    weight = torch.randint(-1, 2, (V, C), generator=g).to(DEVICE).float()
    targets = torch.randint(V, (N,), generator=g).to(DEVICE)
    scale = torch.rand(N, generator=g).to(DEVICE)
    limit = workspace(rows_at_a_time, V, x.dtype) + V * C * 2 / 2**20
    one = run(op, x, weight, targets, None, scale, weight[:, 0])
    with Operations() as calls:
        several = run(op, x, weight, targets, None, scale, weight[:, 0], workspace_mib=limit)
    assert calls.products == 3 * -(-N // rows_at_a_time)
    for a, b in zip(several, one, strict=True):
        ulps = 4 * N if a.dtype == torch.float32 else 2  # dx, of each row by itself, is in bf16
        assert (a - b).abs().max() <= ulps * torch.finfo(a.dtype).eps * b.abs().max()


def test_one_chunk_or_several_of_bf16_weights():
    """dW of one chunk is rounded by its product, that of several after the sum in fp32: they agree
    to that rounding."""
    inputs = make(30, 24, 37, 30, torch.bfloat16)
    for op in BOTH:
        one, several = (run(op, *inputs, workspace_mib=mib)[2] for mib in (512, 1e-9))
        assert one.dtype == several.dtype == torch.bfloat16
        ulp = torch.finfo(torch.bfloat16).eps * one.abs()
        assert ((one - several).abs() <= ulp + 1e-6).all()


@given(
    N=st.integers(0, 50_000),
    V=st.integers(1, 200_000),
    beside=st.integers(0, 2**30),
    mib=st.sampled_from([1e-6, 1.0, 100.0, 512.0, 4096.0]),
)
@settings(max_examples=60)
def test_a_chunk_fits(N, V, beside, mib):
    """All of it in the limit, or no more than 2048 rows at the default, or one; chunks of like
    size, as few as may be."""
    size = chunk_rows(N, 2 * V, beside, mib)
    least = 2048 if mib >= 512 else 1
    most = max((mib * 2**20 - beside) // (2 * V), least)
    assert 1 <= size <= max(N, 1)
    if size < N:
        assert size <= most
        assert size * 2 * V + beside <= mib * 2**20 or size <= least
        assert mib * 2**20 < N * 2 * V
        assert -(-N // size) == -(-N // int(most))
        assert size % 128 == 0 or size == most
    else:
        assert mib * 2**20 >= N * 2 * V or most >= N or N <= 1


def test_chunks_are_of_like_size():
    """16,384 rows of GPT-2: five of 3328, where 3804 would fit beside the sum."""
    assert chunk_rows(16384, 2 * 50304, 4 * 50257 * 768, 512.0) == 3328
    assert chunk_rows(4096, 2 * 128256, 4 * 128256 * 4096, 512.0) == 2048
    assert chunk_rows(4096, 2 * 128256, 4 * 128256 * 4096, 1024.0) == 4096
    assert chunk_rows(100, 2 * 50304, 0, 1.0) == 10


@both
def test_logits_are_never_there_as_a_whole(op):
    inputs = make(40, 8, 200, 40)
    with Operations() as calls, recorded(run=False):
        run(op, *inputs, workspace_mib=workspace(10, 200))
    assert max(calls.largest.values()) == 10 * 256
    assert calls.largest["new_empty"] == 10 * 256


@both
def test_the_workspace_is_of_all_that_is_extra(op):
    """Beside the logits that is dW in fp32, of bf16 weights that have a gradient; and fp32 weights
    in bf16. In the same limit frozen weights leave room for 22 rows, where 10 were."""
    x, weight, targets, *_ = make(40, 8, 200, 40, torch.bfloat16)
    limit = workspace(10, 200, x.dtype) + 4 * 8 * 200 / 2**20
    for weights, need, chunks in ((weight, True, 4), (weight, False, 2), (weight.float(), True, 3)):
        with Operations() as calls, recorded(run=False):
            op(x, weights.detach().requires_grad_(need), targets, workspace_mib=limit)
        assert calls.products == chunks * (1 + need)


@pytest.mark.skipif(DEVICE == "cuda", reason="it has no such cache")
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_twin_takes_few_rows_at_a_time(rows, monkeypatch):
    """So that they stay in the cache of a CPU: the same bits, loss and gradients."""
    inputs = make(20, 24, 37, 9, ignored=(2, 8))
    expected = *run(TWIN, *inputs), TWIN(*inputs)
    monkeypatch.setattr(torch_ops, "IN_CACHE", 37 * rows)
    for a, e in zip((*run(TWIN, *inputs), TWIN(*inputs)), expected, strict=True):
        assert torch.equal(a, e)


@given(st.lists(st.sampled_from("abx"), min_size=12, max_size=12), st.integers(0, 9))
@settings(max_examples=5)
def test_lists_add_up(where, seed):
    """Rows in one list or in two: losses and gradients add up. Those in neither have none."""
    x, weight, targets, _, scale, bias = make(12, 8, 19, 12)
    x = x + seed
    rows = [torch.tensor([i for i in range(12) if where[i] in which], dtype=torch.int64,
                         device=DEVICE) for which in ("a", "b", "ab")]  # fmt: skip
    for op in BOTH:
        a, b, whole = (run(op, x, weight, targets[r], r, scale[r], bias) for r in rows)
        for p, q, both_of_them in zip(a, b, whole, strict=True):
            torch.testing.assert_close(p + q, both_of_them, rtol=1e-5, atol=1e-5)
        unlisted = [i for i in range(12) if where[i] == "x"]
        assert not whole[1][unlisted].any()


# ---------------------------------------------------------------- lists


@both
def test_a_list_may_be_padded(op):
    """Entries with an ignored target, at rows that are listed, before and after, or not: as if
    they were not there."""
    x, weight, targets, rows, _, bias = make(20, 24, 37, 9, torch.bfloat16)
    nowhere = torch.full((5,), IGNORE_INDEX, device=DEVICE)
    extra = torch.stack((rows[0], rows[4], rows[8], rows[8], rows.new_tensor(0)))
    padded = [torch.cat(pair) for pair in ((extra, rows), (rows, extra))]
    many = [torch.cat(pair) for pair in ((nowhere, targets), (targets, nowhere))]
    for more_rows, more_targets in zip(padded, many, strict=True):
        check(op, x, weight, more_targets, more_rows, None, bias)
        for limit in (512, workspace(4, 37, x.dtype)):
            a = run(op, x, weight, more_targets, more_rows, bias=bias, workspace_mib=limit)
            e = run(op, x, weight, targets, rows, bias=bias)
            torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-3)


@both
def test_what_is_not_listed_may_be_nan(op):
    """Nor may what is listed with an ignored target alone leave a trace: 0 * NaN is NaN."""
    x, weight, targets, rows, scale, bias = make(20, 24, 37, 9, ignored=(4,))
    clean = run(op, x, weight, targets, rows, scale, bias)
    trash = x.new_full(x.shape, torch.nan)
    kept = rows[targets != IGNORE_INDEX]
    trash[kept] = x[kept]
    scale[4] = torch.nan
    for a, e in zip(run(op, trash, weight, targets, rows, scale, bias), clean, strict=True):
        assert torch.equal(a, e)


@both
@pytest.mark.parametrize("rows", [None, 4], ids=["all rows", "a list"])
def test_all_ignored(op, rows):
    """Loss 0 and gradients 0, though the scale be 1 / 0."""
    x, weight, targets, *_, bias = make(4, 24, 37, 4, ignored=range(4))
    rows = None if rows is None else torch.arange(4, device=DEVICE)
    scale = 1 / (targets != IGNORE_INDEX).sum()
    for result in run(op, x, weight, targets, rows, scale, bias):
        assert not result.any()


@both
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("T", [0, 3])
def test_no_targets(op, T, dtype):
    """Of no rows, or of an empty list: gradients are there, and 0."""
    x = torch.randn(T, 8, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(37, 8, device=DEVICE), torch.randn(37, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    with empty_is_poisoned():
        results = run(op, x, weight, none, none if T else None, weight.new_ones(0), bias)
    assert [r.shape for r in results] == [(), (T, 8), (37, 8), (37,)]
    assert not any(r.any() for r in results)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_row_that_does_not_exist_is_not_read():
    """The loss is NaN; a wild read would end the process."""
    x, weight, targets, *_ = make(4, 8, 7, 4)
    for bad in (-1, 4, 2**40):
        rows = torch.tensor([0, 1, bad, 3], device=DEVICE)
        loss, dx, _ = run(linear_cross_entropy, x, weight, targets, rows)
        assert loss.isnan()
        assert dx[[0, 1, 3]].isfinite().all()
        assert not dx[2].any()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_of_any_offset_and_stride(dtype):
    """Rows, targets and x begin anywhere, with NaN between the rows of x; nothing is written
    beside dx."""
    x, _, targets, rows, *_ = make(9, 37, 5, 6, dtype, ignored=(2,))
    for offset, slack in itertools.product((0, 1, 3), (0, 5)):
        inputs = guarded(x, offset, slack).tensor, *(guarded(t, 1).tensor for t in (rows, targets))
        with empty_is_poisoned():
            x_c = _gather(*inputs)
        expected = x[rows]
        expected[2] = 0
        assert torch.equal(x_c, expected)
        dx, dx_c = poisoned(9, 37, dtype=dtype, offset=offset), guarded(x_c, offset).tensor
        _scatter_(dx.tensor, dx_c, *inputs[1:])
        dx.assert_untouched()
        written = dx.tensor.nan_to_num(77) != 77
        kept = rows[targets != IGNORE_INDEX]
        assert written.any(1).nonzero()[:, 0].tolist() == kept.tolist()
        assert torch.equal(dx.tensor[kept], x[kept])


def test_rows_beyond_two_thousand_million_elements():
    """Offsets are 64 bits wide: the third row starts at 2**31 + 4 elements."""
    stride = 2**30 + 2
    flat = torch.empty(2 * stride + 8, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, untouched
    x = flat.as_strided((3, 6), (stride, 1))
    x.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    rows = torch.tensor([0, 2], device=DEVICE)
    assert torch.equal(_gather(x, rows, rows), x[rows])


# ---------------------------------------------------------------- vocabulary, weights


@both
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1, 30, 36, 37])
def test_padding_of_the_vocabulary(op, vocab, dtype):
    """Columns that would win had they been classes: no probability, and gradients exactly 0."""
    x, weight, targets, rows, scale, bias = make(20, 24, 37, 9, dtype, ignored=(1,))
    targets = targets.clamp(max=vocab - 1)
    weight[vocab:], bias[vocab:] = 50, 1000
    for limit in (512, workspace(4, 37, dtype)):
        inputs = x, weight, targets, rows, scale, bias
        _, _, dweight, dbias = check(op, *inputs, vocab=vocab, workspace_mib=limit)
        assert not dweight[vocab:].any()
        assert not dbias[vocab:].any()


@both
def test_tied_weights(op):
    """One parameter embeds and projects: the gradients of its two uses add up, by autograd."""
    torch.manual_seed(0)
    weight = torch.randn(37, 24, device=DEVICE)
    ids = torch.randint(37, (12,), device=DEVICE)

    def gradient(op, weight):
        weight = weight.detach().requires_grad_()
        op(F.embedding(ids[:-1], weight).tanh(), weight, ids[1:]).backward()
        return weight.grad

    actual, same = gradient(op, weight), gradient(linear_cross_entropy_ref, weight)
    exact = gradient(linear_cross_entropy_ref, weight.double())
    assert_as_accurate(actual, same, exact, scale=exact.abs().max().item())


@both
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_is_frozen_costs_nothing(op, needs):
    """A chunk takes one product for its logits and one for each of dx and dW that is wanted."""
    inputs = make(20, 24, 37, 9)
    _, *every = run(op, *inputs)
    leaves = [inputs[i].requires_grad_(need) for i, need in zip((0, 1, 5), needs, strict=True)]
    with Operations() as calls:
        loss = op(*inputs, workspace_mib=workspace(4, 37))
    assert calls.products == 3 * (1 + needs[0] + needs[1])
    assert loss.requires_grad == any(needs)
    if any(needs):
        with Operations() as calls:
            loss.backward()
        assert calls.products == 0
    for leaf, need, grad in zip(leaves, needs, every, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, grad)


@both
def test_without_grad_only_the_loss(op):
    """No gradient of the logits is written either."""
    inputs = make(20, 24, 37, 9)
    expected, *_ = run(op, *inputs)
    x, weight, *_, bias = inputs
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Operations() as calls, recorded() as seen:
            loss = op(*inputs)
        assert torch.equal(loss, expected)
        assert not loss.requires_grad
        assert calls.products == 1
        kernels = ["_gather_kernel", "_loss_kernel"] if op is linear_cross_entropy else []
        assert [launch.kernel for launch in seen] == kernels


# ---------------------------------------------------------------- what comes from above


@both
@pytest.mark.parametrize("upstream", [1.0, 0.5, -4.0, 0.0])
def test_gradients_are_linear_in_the_upstream_gradient(op, upstream):
    """To the bit by powers of two, of which 1 is one."""
    for dtype in DTYPES[:2]:
        inputs = make(11, 40, 130, 11, dtype)
        expected = run(op, *inputs)
        for a, e in zip(run(op, *inputs, upstream=upstream)[1:], expected[1:], strict=True):
            assert torch.equal(a, upstream * e)


@pytest.mark.parametrize("sizes", [(5, 3, 1), (1024, 1025, 2048), (3000, None, 7), (None, 1, None)])
def test_scaling_in_place(sizes, monkeypatch):
    """Whole blocks and their rest, by one program or several; nothing beside is written."""
    for dtype, programs in ((torch.float32, 1056), (torch.bfloat16, 2)):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        grads = [None if n is None else guarded(torch.randn(n).to(DEVICE, dtype)) for n in sizes]
        before = [None if g is None else g.tensor.clone() for g in grads]
        given = [None if g is None else g.tensor for g in grads]
        with recorded() as seen:
            _scale_(given, torch.tensor([9.0, 0.3], device=DEVICE)[1])
        assert len(seen) == 1
        for g, b in zip(grads, before, strict=True):
            if g is not None:
                g.assert_untouched()
                assert torch.equal(g.tensor, (b.float() * torch.tensor(0.3)).to(dtype))


def test_a_scale_of_nan_is_not_1():
    grad = torch.ones(3, device=DEVICE)
    _scale_([grad, None, None], torch.tensor(torch.nan, device=DEVICE))
    assert grad.isnan().all()


@both
def test_a_second_backward_is_refused(op):
    """Its gradients would be scaled twice, or be somebody else's by now."""
    x, weight, targets, *_ = make(5, 3, 7, 5)
    loss = op(x.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    with pytest.raises(RuntimeError, match="expected one backward of linear_cross_entropy"):
        loss.backward()
    assert torch.equal(x.grad, first)


@both
def test_gradients_accumulate_over_calls(op):
    """As micro-batches do: none hands out memory that another still writes."""
    x, weight, targets, rows, scale, bias = make(20, 24, 37, 9)
    weight.requires_grad_()
    for part in (slice(0, 4), slice(4, 9)):
        op(x, weight, targets[part], rows[part], scale[part], bias).backward()
    expected = run(op, x, weight, targets, rows, scale, bias)[2]
    torch.testing.assert_close(weight.grad, expected)


# ---------------------------------------------------------------- hard cases


@both
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
def test_large_logits(op, dtype):
    """Of 1e4: no overflow, and as right as the definition."""
    x, weight, targets, rows, scale, bias = make(20, 24, 37, 9, dtype)
    for result in check(op, x * 1e3, weight * 10, targets, rows, scale, bias):
        assert result.isfinite().all()


@pytest.mark.parametrize("chunk", [9, 4, 1])
def test_the_report_counts_over_chunks(chunk):
    """A target out of range makes the loss NaN and is named by its place in the whole list; the
    last of them, as in a single chunk."""
    x, weight, targets, rows, scale, _ = make(20, 24, 37, 9, ignored=(3,))
    options = {"workspace_mib": workspace(chunk, 37), "vocab": 30}
    report = TargetReport.on(DEVICE)
    targets = targets.where(targets < 30, 29)
    for _ in range(2):
        loss = linear_cross_entropy(x, weight, targets, rows, scale, report=report, **options)
    assert loss.isfinite()
    report.check()
    assert report.counted == 16
    targets[5], targets[6], targets[0] = 30, -7, 36  # 30 and more are padding
    loss = linear_cross_entropy(x, weight, targets, rows, scale, report=report, **options)
    assert loss.isnan()
    assert report.counted == 16 + 5
    with pytest.raises(ValueError, match=r"^row 6: expected a class .* got -7$"):
        report.check()
    linear_cross_entropy(x, weight, targets[:3], rows[:3], report=report, **options)
    with pytest.raises(ValueError, match=r"^row 6: "):  # an earlier one is not lost
        report.check()


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assert ends the process")
def test_the_twin_stops_at_a_bad_target():
    x, weight, targets, *_ = make(5, 3, 7, 5)
    targets[3] = 6
    report = TargetReport.on(DEVICE)
    TWIN(x, weight, targets, report=report)
    assert report.counted == 5
    with pytest.raises(ValueError, match=r"row 3: expected a class .* got 6"):
        TWIN(x, weight, targets, vocab=6)


# ---------------------------------------------------------------- promises


@both
def test_inputs_are_only_read(op):
    """By the bits and by autograd's count of writes; twice gives the same bits."""
    inputs = make(20, 24, 37, 9, ignored=(2,))
    leaves = [t.requires_grad_() for t in (inputs[0], inputs[1], inputs[5])]
    before = [(t.detach().clone(), t._version) for t in inputs]
    sent = torch.tensor(0.3, device=DEVICE)
    found = [torch.autograd.grad(op(*inputs), leaves, sent) for _ in range(2)]
    assert sent == torch.tensor(0.3)
    for t, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version
    assert all(map(torch.equal, *found))


def test_nothing_waits_for_the_device():
    """No number is read on the host, and no shape depends on data: a graph can be captured."""
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select",
             "unique", "_unique2", "cpu", "repeat_interleave"}  # fmt: skip
    inputs = make(20, 24, 37, 9, torch.bfloat16, ignored=(2,))
    report = TargetReport.on(DEVICE)
    for limit in (512, workspace(4, 37)):
        with Operations() as calls, recorded(run=False):
            run(linear_cross_entropy, *inputs, report=report, vocab=30, workspace_mib=limit)
        assert not waits & set(calls.names)
        assert calls.names.count("mm") + calls.names.count("addmm") > 0
        assert "index" not in calls.names  # by a mask, or a list


def test_launches_and_nothing_else():
    """Without a list no rows are moved; backward is one kernel, whatever was asked for."""
    x, weight, targets, rows, scale, bias = make(20, 24, 37, 9)
    with recorded() as seen:
        run(linear_cross_entropy, x, weight, targets, rows, scale, bias)
    assert [launch.kernel for launch in seen] == [
        *("_gather_kernel", "_in_place_kernel", "_scatter_kernel", "_scale_kernel"),
    ]
    with recorded() as seen:
        run(linear_cross_entropy, x[:9], weight, targets)
    assert [launch.kernel for launch in seen] == ["_in_place_kernel", "_scale_kernel"]
    with recorded() as seen:
        linear_cross_entropy(x, weight.requires_grad_(), targets, rows).backward()
    assert [launch.kernel for launch in seen] == [
        *("_gather_kernel", "_in_place_kernel", "_scale_kernel"),
    ]


def test_one_binary_for_all_numbers_of_rows():
    """T, N, V and chunks are run-time numbers: one gather, loss, scatter and scale."""
    with recorded(run=False) as seen:
        for T, N, V in itertools.product((1, 16, 33), (1, 16, 17), (513, 528)):
            x, weight, targets, *_ = make(T, 16, V, T)
            rows = torch.zeros(N, dtype=torch.int64, device=DEVICE)
            for limit in (512, workspace(5, V)):
                run(linear_cross_entropy, x, weight, targets[:1].expand(N), rows,
                    workspace_mib=limit)  # fmt: skip
    assert compilations(seen) == 4


def test_declared_launches_are_those_that_run():
    """What is compiled without a GPU is what a GPU runs, for every dtype of rows and weights."""
    cases = [(t, t) for t in DTYPES] + [(torch.bfloat16, torch.float32)]
    with recorded(run=False) as seen:
        for dtype, weights in cases:
            x, weight, targets, rows, scale, bias = make(5, 768, 9, 3, dtype)
            rows, targets = guarded(rows, 1).tensor, guarded(targets, 1).tensor
            weight, bias = weight.to(weights), bias.to(weights)
            run(linear_cross_entropy, x, weight, targets, rows, scale, bias)
    assert launches_are_declared(seen, module) == {launch.name for launch in module.LAUNCHES}


def test_the_tables_have_it():
    assert TRITON.linear_cross_entropy is linear_cross_entropy
    assert TORCH.linear_cross_entropy is not linear_cross_entropy


BAD = [
    ({"x": torch.zeros(4)}, r"expected x \(T, C\) and weight \(V, C\), got \(4,\) and \(7, 3\)"),
    ({"weight": torch.zeros(7, 4)}, r"got \(4, 3\) and \(7, 4\)"),
    ({"weight": torch.zeros(7, 3).half()}, "expected weight in torch.float32 or fp32, got .*16"),
    ({"bias": torch.zeros(3)}, r"expected bias \(7,\), got \(3,\)"),
    ({"vocab": 8}, r"expected vocab in \[1, 7\], got 8"),
    ({"vocab": 0}, r"expected vocab in \[1, 7\], got 0"),
    ({"targets": torch.zeros(3).long()}, r"a target for each of x, got \(3,\) for \(4,\)"),
    ({"rows": torch.zeros(3).long()}, r"each of rows \(N,\), got \(4,\) for \(3,\)"),
    ({"rows": torch.zeros(4, 1).long()}, r"each of rows \(N,\), got \(4,\) for \(4, 1\)"),
    ({"targets": torch.zeros(4).int()}, "expected targets in int64, got torch.int32: call .long"),
    ({"rows": torch.zeros(4).int()}, "expected rows in int64, got torch.int32: call .long"),
    ({"row_scale": torch.ones(3)}, r"expected row_scale \(4,\) or \(\), got \(3,\)"),
    ({"row_scale": torch.ones(4, requires_grad=True)}, r"without gradient, .*: .detach\(\)"),
    ({"bias": torch.zeros(7, device="meta")}, "expected bias on .*, got meta"),
    ({"rows": torch.zeros(4, device="meta").long()}, "expected rows on .*, got meta"),
]


@both
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_fit_is_named(op, change, message):
    good = {"x": torch.zeros(4, 3), "weight": torch.zeros(7, 3), "targets": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=message):
        op(**good | change)


def test_what_kernels_cannot_take_is_named(monkeypatch):
    """Another dtype or stride; and a CPU tensor where nothing interprets."""
    targets = torch.zeros(4, dtype=torch.int64)
    for x, message in (
        (torch.zeros(4, 3, dtype=torch.float64), "expected x in fp32, fp16 or bf16, got .*64"),
        (torch.zeros(3, 4).T, r"expected unit stride along C, got \(1, 4\): call .contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(x, torch.zeros(7, 3, dtype=x.dtype), targets)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="expected x on a GPU, got cpu"):
        linear_cross_entropy(torch.zeros(4, 3), torch.zeros(7, 3), targets)
