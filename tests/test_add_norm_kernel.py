"""kernels/add_norm.py, its backward and row_tiles.py: the kernels against the definition."""

import functools
import itertools
from contextlib import contextmanager

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import ROWS, empty_is_poisoned, guarded, poisoned
from launches import Operations, compilations, launches_are_declared, recorded
from torch import Tensor

from minift.kernels import add_norm as forward_module
from minift.kernels import add_norm_backward as backward_module
from minift.kernels.add_norm import Norm, add_norm, add_norm_ref
from minift.kernels.dropout import dropout_keep
from minift.kernels.row_tiles import WIDEST, row_tile
from minift.ops import TORCH, TRITON, Draw

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
posts = pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
NAMES = ["y", "stream", "dx", "dresidual", "dweight", "dnorm_bias", "dbias"]


def make(T, C, dtype=torch.float32, parameters=torch.float32):
    """x, residual, weight, norm bias, bias; the gradients of both results, which differ."""
    torch.manual_seed(T + 7 * C)
    x, r, dy, ds = torch.randn(4, T, C, dtype=torch.float64, device=DEVICE).to(dtype)
    columns = torch.randn(3, C, dtype=torch.float64, device=DEVICE).to(dtype).to(parameters)
    w, nb, b = columns.unbind()
    inputs = x.clone(), r + 3, w + 1, nb.clone(), b.clone()  # + 3: a mean that must be taken off
    return [*inputs], (dy.clone(), ds.clone())


def without(inputs, *absent):
    """The inputs, None where absent."""
    return [None if name[1:] in absent else i for i, name in zip(inputs, NAMES[2:], strict=True)]


def run(fn, inputs, upstream, eps=EPS, rms=False, frozen=False, **options):
    """y, stream and the gradient of every input that is there; 0 where autograd has none."""
    leaves = [None if i is None else i.detach().requires_grad_() for i in inputs]
    for leaf in leaves[2:] if frozen else ():
        leaf.requires_grad_(False)
    x, r, w, nb, b = leaves
    results = fn(x, r, Norm(w, nb, eps, rms), b, **options)
    sent = zip(results, upstream, strict=True)
    pairs = [(y, g.to(y.dtype)) for y, g in sent if g is not None]
    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    grads = [torch.zeros_like(i) if i.grad is None else i.grad for i in leaves if i is not None]
    return [*(y.detach() for y in results), *grads]


@functools.cache
def drawn(T, C, p, site=1):
    """Dropout of T rows, and the mask."""
    draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    dropout = TRITON.draw_dropout(draw, torch.arange(T, device=DEVICE), C, 5, 1).at(site, p)
    return dropout, dropout and dropout_keep(dropout, C)[:, 0]


def as_type(inputs, dtype):
    return [i if i is None else i.to(dtype) for i in inputs]


def scales(inputs, upstream, keep, p, eps=EPS, rms=False):
    """The largest of the terms that add up to y, and of those that add up to a gradient."""
    x, r, w, nb, b = as_type(inputs, torch.float64)
    s = add_norm_ref(x, r, Norm(w, nb, eps, rms), b, keep, p)[1]
    spread = s.square().mean(-1) if rms else s.var(-1, correction=0)
    rstd = 1 / (spread + eps).sqrt()
    sent = [(g * w).abs().max() for g in upstream if g is not None]
    return (s.abs().amax(-1) * rstd * w.abs().max()).max().item(), (
        rstd.max() * max(sent) / (1 - p)
    ).item()


def check(inputs, upstream, p=0.0, **options):
    """The kernels against the definition, in the dtype of x and in fp64."""
    x = inputs[0]
    dropout, keep = drawn(*x.shape, p)
    with empty_is_poisoned():
        actual = run(add_norm, inputs, upstream, dropout=dropout, **options)
    same_dtype, exact = (
        run(add_norm_ref, as_type(inputs, d), upstream, keep=keep, p=p, **options)
        for d in (x.dtype, torch.float64)
    )
    present = [i for i in inputs if i is not None]
    assert [a.dtype for a in actual] == [x.dtype, x.dtype, *(i.dtype for i in present)]
    names = ("eps", "rms")
    sizes = scales(inputs, upstream, keep, p, **{k: options[k] for k in names if k in options})
    for i, (a, same, e) in enumerate(zip(actual, same_dtype, exact, strict=True)):
        assert_as_accurate(a.to(x.dtype), same, e, max(sizes[i > 1], e.abs().max().item()))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("T", "C"), ROWS)
def test_every_shape_is_as_accurate_as_the_definition(T, C):
    """Around every tile; with all options, and dropout on every other shape. Of the widest dx
    alone: the interpreter is slow."""
    for dtype in DTYPES[:2]:
        check(*make(T, C, dtype), p=0.3 * (C % 2), post=C % 3 == 0, frozen=C > 2000)


OPTIONS = list(itertools.product([False, True], repeat=5))


@pytest.mark.parametrize(("residual", "bias", "norm_bias", "dropped", "post"), OPTIONS)
def test_the_whole_grid_of_options(residual, bias, norm_bias, dropped, post):
    """A LayerNorm; without a bias of its own an RMSNorm too."""
    inputs, upstream = make(6, 40)
    there = {"residual": residual, "bias": bias, "norm_bias": norm_bias}
    inputs = without(inputs, *(name for name, is_there in there.items() if not is_there))
    for rms in [False, True][: 2 - norm_bias]:
        check(inputs, upstream, p=0.3 * dropped, post=post, rms=rms)


@dtypes
@posts
def test_every_dtype(dtype, post):
    """With parameters in fp32 and in the dtype of x, whose gradients have theirs."""
    for parameters in (torch.float32, dtype):
        check(*make(9, 40, dtype, parameters), p=0.2, post=post)


@posts
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("which", [0, 1], ids=["y", "stream"])
def test_one_gradient_alone(which, p, post):
    """What nobody used has none; it counts as 0."""
    inputs, upstream = make(7, 33)
    upstream = [g if i == which else None for i, g in enumerate(upstream)]
    check(inputs if p else without(inputs, "residual", "bias"), upstream, p=p, post=post)


def test_post_norm_adds_the_gradients_of_both_uses():
    """As if their sum had come into one, to the bit: it is formed in fp32."""
    inputs, (dy, dy2) = make(5, 48)
    both = run(add_norm, inputs, (dy, dy2), post=True)
    for upstream in ((dy + dy2, None), (None, dy + dy2)):
        for a, b in zip(both, run(add_norm, inputs, upstream, post=True), strict=True):
            assert torch.equal(a, b)


def test_both_gradients_are_added_before_they_are_rounded():
    """256 + 1 is no number of bf16."""
    dy = torch.full((1, 8), 256.0, device=DEVICE)
    *_, dnorm_bias, _ = run(add_norm, make(1, 8, torch.bfloat16)[0], (dy, dy / 256), post=True)
    assert dnorm_bias.tolist() == [257.0] * 8


@settings(max_examples=12)
@given(
    st.integers(1, 20),
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.booleans(),
    st.sets(st.sampled_from(["residual", "norm_bias", "bias"])),
)
def test_any_shape_and_options(T, C, dtype, p, post, absent):
    check(without(make(T, C, dtype)[0], *absent), make(T, C, dtype)[1], p=p, post=post)


@pytest.mark.parametrize("C", [2048, WIDEST])
def test_wide_rows(C):
    """Of several warps, to the widest; dx alone."""
    check(*make(2, C, torch.bfloat16), p=0.1, post=True, frozen=True)


# ---------------------------------------------------------------- statistics


@dtypes
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 10.0])
def test_rows_of_equal_numbers_are_the_bias(dtype, eps):
    """0 over sqrt(eps), for every eps: rounding of the mean leaves nothing that could grow."""
    numbers = torch.tensor([1 / 3, -0.1, 7e3, 1e-4, 0.0], device=DEVICE).to(dtype)
    for C in (1, 3, 41, 48, 777):  # 41 * (1 / 41) is not 1
        x = numbers[:, None].expand(5, C)
        _, _, w, nb, _ = make(5, C)[0]
        y, _ = add_norm(x, None, Norm(w, nb, eps))
        assert torch.equal(y, nb.to(dtype).expand(5, C))


def test_rows_of_equal_numbers_give_the_weight_no_gradient():
    """The mean that backward reads is theirs to the bit."""
    x = torch.tensor([1 / 3, -0.1, 7e3, 1e-4], device=DEVICE)[:, None].expand(4, 41)
    _, _, w, nb, _ = make(4, 41)[0]
    *_, dw, _ = run(add_norm, [x, None, w, nb, None], (torch.ones_like(x), None), 1e-12)
    assert not dw.any()


def test_one_column_has_no_gradient_but_that_of_the_sum():
    """But for what rounding leaves of g - mean(g), where their product is fused with one."""
    inputs, (dy, ds) = make(5, 1)
    _, _, dx, dr, dw, dnb, db = run(add_norm, inputs, (dy, ds))
    unit = torch.finfo(dx.dtype).eps
    left = unit * (dy * inputs[2]).abs().max().item() / EPS**0.5
    torch.testing.assert_close(dx, ds, rtol=unit, atol=left)
    assert torch.equal(dr, dx)
    assert torch.equal(dw, torch.zeros_like(dw))
    torch.testing.assert_close(dnb, dy.sum(0))
    torch.testing.assert_close(db, ds.sum(0))


@pytest.mark.parametrize("mean", [1e3, 1e4, -1e5])
def test_statistics_do_not_lose_a_large_mean(mean):
    """Deviation 1 in fp32. The definition loses digits of y by its mean; here y has all of them."""
    torch.manual_seed(0)
    x = torch.randn(4, 300, device=DEVICE) + mean
    w, nb = torch.randn(2, 300, device=DEVICE)
    y, _ = add_norm(x, None, Norm(w, nb, EPS))
    exact, _ = add_norm_ref(x.double(), None, Norm(w.double(), nb.double(), EPS))
    assert_as_accurate(y, exact.float(), exact, scale=4 * exact.abs().max().item())


@posts
def test_eps_is_added_to_the_variance(post):
    """From where it does nothing to where it decides."""
    inputs, upstream = make(5, 16)
    for eps in (0.0, 1e-12, 0.1, 10.0):
        check(inputs, upstream, eps=eps, post=post)
        check(without(inputs, "norm_bias"), upstream, eps=eps, post=post, rms=True)


# ---------------------------------------------------------------- dropout


@dtypes
@pytest.mark.parametrize("C", [5, 130])
def test_the_bits_are_those_of_the_draw(C, dtype):
    """Exactly where `dropout_keep` says an element stays, forward and backward, at every site."""
    T = 11
    inputs, upstream = make(T, C, dtype)
    inputs[0] = inputs[0].abs() + 1
    inputs[4] = inputs[4].abs()  # x + bias is nowhere 0
    for site in (0, 3):
        dropout, keep = drawn(T, C, 0.4, site)
        _, s, *_ = run(add_norm, without(inputs, "residual"), upstream, dropout=dropout)
        assert torch.equal(s != 0, keep)
        _, s, dx, dr, *_ = run(add_norm, inputs, upstream, dropout=dropout)
        assert torch.equal(s[~keep], inputs[1][~keep])
        assert torch.equal(dx != 0, keep & (dr != 0))
        assert (dr != 0).float().mean() > 0.9


def test_picked_rows_keep_their_bits():
    """The last layer norms only some rows."""
    dropout, keep = drawn(20, 24, 0.5)
    rows = torch.tensor([3, 17, 4], device=DEVICE)
    x = torch.ones(3, 24, device=DEVICE)
    weight = torch.ones(24, device=DEVICE)
    _, s = add_norm(x, None, Norm(weight, None, EPS), None, dropout.at(1, 0.5, rows))
    assert torch.equal(s != 0, keep[rows])


def test_dropout_of_another_draw_is_as_good():
    """Torch's words lie elsewhere in memory."""
    inputs, upstream = make(9, 24)
    draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    other = TORCH.draw_dropout(draw, torch.arange(9, device=DEVICE), 27, 3, 1).at(1, 0.3)
    ours = drawn(9, 24, 0.3)[0]
    first, second = (run(add_norm, inputs, upstream, dropout=d) for d in (other, ours))
    keep = dropout_keep(other, 24)[:, 0]
    assert torch.equal(first[1] != inputs[1], keep)
    assert first[1].shape == second[1].shape


# ---------------------------------------------------------------- rows stand alone


@posts
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
def test_a_row_depends_on_itself_alone(dtype, post):
    """The same bits in any batch: y, stream, dx and dresidual."""
    T, C = 70, 20
    inputs, (dy, ds) = make(T, C, dtype)
    dropout, _ = drawn(T, C, 0.3)
    whole = run(add_norm, inputs, (dy, ds), post=post, dropout=dropout)[:4]
    for rows in ([0], [69, 3], [*range(5, 60)]):
        at = torch.tensor(rows, device=DEVICE)
        some = [inputs[0][at], inputs[1][at], *inputs[2:]]
        picked = dropout.at(1, 0.3, at)
        part = run(add_norm, some, (dy[at], ds[at]), post=post, dropout=picked)[:4]
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[at])


def test_a_nan_stays_in_its_row():
    """Masked lanes, rows past the end and the row's neighbours have none of it."""
    inputs, (dy, ds) = make(37, 20)
    inputs[0][5, 3] = torch.nan
    dy[11] = torch.inf
    y, s, dx, dr, *_ = run(add_norm, inputs, (dy, ds))
    for result, hit in ((y, {5}), (s, {5}), (dx, {5, 11}), (dr, {5, 11})):
        assert {*(~result.isfinite()).any(1).nonzero()[:, 0].tolist()} == hit


@posts
def test_programs_share_the_rows_as_they_like(post, monkeypatch):
    """One, three or many: the same y and dx to the bit; and sums that nobody's order decides. Past
    the last row lie NaN, in none of them."""
    inputs, upstream = ([guarded(i).tensor for i in given] for given in make(150, 20))
    tile, _ = row_tile(20, 4, backward_module.CHUNKS)
    assert 3 * tile["ROWS"] < 150  # several tiles a program
    dropout, _ = drawn(150, 20, 0.3)
    many = run(add_norm, inputs, upstream, dropout=dropout, post=post)
    assert all(result.isfinite().all() for result in many)
    for programs in (1, 3):
        monkeypatch.setattr(backward_module, "PROGRAMS", programs)
        few = run(add_norm, inputs, upstream, dropout=dropout, post=post)
        assert all(map(torch.equal, few[:4], many[:4]))
        for a, b in zip(few[4:], many[4:], strict=True):
            torch.testing.assert_close(a, b)


def test_two_runs_give_the_same_bits():
    inputs, upstream = make(50, 64, torch.bfloat16)
    dropout, _ = drawn(50, 64, 0.3)
    runs = [run(add_norm, inputs, upstream, dropout=dropout, post=True) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("C", [1, 96])
@posts
def test_no_rows(post, C):
    """Empty results, and gradients of parameters that are 0."""
    inputs, upstream = make(0, C)
    with empty_is_poisoned():
        y, stream, dx, dr, *sums = run(add_norm, inputs, upstream, post=post)
    assert y.shape == stream.shape == dx.shape == dr.shape == (0, C)
    for total in sums:
        assert torch.equal(total, torch.zeros(C, device=DEVICE))


# ---------------------------------------------------------------- memory


@contextmanager
def outputs_in_poison():
    """In the block every output lies amid poison: the list of them."""
    made, original = [], Tensor.new_empty

    def new_empty(self, *shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return original(self, *shape, dtype=dtype, device=device)
        made.append(poisoned(*shape, dtype=dtype or self.dtype))
        return made[-1].tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield made


@posts
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("T", "C"), [(1, 1), (5, 33), (9, 128), (35, 24)])
def test_only_outputs_are_written_and_all_of_them(T, C, dtype, post):
    """Inputs and what lies around them stay; gradients that come in too."""
    inputs, upstream = make(T, C, dtype)
    dropout, _ = drawn(T, C, 0.3)
    guards = [guarded(i) for i in (*inputs, *upstream)]
    tensors = [g.tensor for g in guards]
    with outputs_in_poison() as outputs:
        run(add_norm, tensors[:5], tensors[5:], post=post, dropout=dropout)
    assert len(outputs) == 7  # y, s, statistics; dx, dresidual, partial sums, sums
    for output in outputs:
        output.assert_untouched()
        output.assert_written()
    for guard, before in zip(guards, [*inputs, *upstream], strict=True):
        guard.assert_untouched()
        assert torch.equal(guard.tensor, before)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("offset", "slack"), [(1, 0), (0, 3), (3, 8)])
def test_any_place_in_memory(offset, slack, dtype):
    """Off 16-byte boundaries and with gaps between rows, every tensor: the same bits."""
    inputs, upstream = make(9, 48, dtype)
    expected = run(add_norm, inputs, upstream)
    moved = [guarded(i, offset, slack if i.ndim == 2 else 0).tensor for i in (*inputs, *upstream)]
    for a, e in zip(run(add_norm, moved[:5], moved[5:]), expected, strict=True):
        assert torch.equal(a, e)


def test_any_strides():
    """Transposed, and one number for all, as `sum` sends."""
    inputs, upstream = make(12, 16)
    one = torch.ones((), device=DEVICE).expand(12, 16)
    for sent in (upstream, (one, one)):
        expected = run(add_norm, inputs, [g.contiguous() for g in sent])
        turned = [i.T.contiguous().T for i in inputs[:2]] + inputs[2:]
        sent = sent if sent[0] is one else [g.T.contiguous().T for g in sent]
        for a, e in zip(run(add_norm, turned, sent), expected, strict=True):
            assert torch.equal(a, e)


# ---------------------------------------------------------------- autograd


def test_only_wanted_gradients_are_made():
    """Every set of inputs: their gradients are those they have among all, nothing else is made,
    and no pointer to it is handed over."""
    inputs, upstream = make(4, 6)
    for p in (0.0, 0.3):
        dropout, _ = drawn(4, 6, p)
        expected = run(add_norm, inputs, upstream, dropout=dropout)[2:]
        for wanted in itertools.product([False, True], repeat=5):
            if not any(wanted) or (p == 0.0 and len({*wanted[2:]}) > 1):
                continue
            leaves = [i.detach().requires_grad_(w) for i, w in zip(inputs, wanted, strict=True)]
            x, r, w, nb, b = leaves
            results = add_norm(x, r, Norm(w, nb, EPS), b, dropout)
            sums = wanted[2:]
            with recorded() as seen:
                torch.autograd.backward(results, upstream)
            assert len(seen) == 1 + any(sums)
            given = seen[0].arguments
            there = [given[f"{name}_ptr"] is not None for name in NAMES[4:]]
            assert there == [*sums]
            assert (given["dx_ptr"] is not None) == (wanted[0] and p > 0)
            assert (given["dr_ptr"] is not None) == (wanted[1] or (wanted[0] and p == 0))
            for leaf, wants, e in zip(leaves, wanted, expected, strict=True):
                assert torch.equal(leaf.grad, e) if wants else leaf.grad is None


def test_nothing_dropped_is_written_once():
    """x and the residual have one gradient: the same tensor."""
    inputs, upstream = make(4, 8)
    x, r, *columns = [i.detach().requires_grad_() for i in inputs]
    for p, same in ((0.0, True), (0.5, False)):
        results = add_norm(x, r, Norm(*columns[:2], EPS), columns[2], drawn(4, 8, p)[0])
        dx, dr = torch.autograd.grad(results, (x, r), upstream)
        assert (dx.data_ptr() == dr.data_ptr()) == same


def test_nothing_is_copied_that_can_be_shared():
    """Post-norm: y is the stream. Nothing added or dropped: x is. Neither may be written to
    behind autograd's back."""
    x, r, w, nb, b = make(4, 8)[0]
    x.requires_grad_()
    y, stream = add_norm(x, r, Norm(w, nb, EPS), b, post=True)
    assert y.data_ptr() == stream.data_ptr()
    loss = (y * y).sum()
    with torch.no_grad():
        stream.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    y, stream = add_norm(x, None, Norm(w, nb, EPS))
    assert stream.data_ptr() == x.data_ptr()
    assert y.data_ptr() != x.data_ptr()
    with pytest.raises(RuntimeError, match="being modified inplace"):
        stream.add_(1)


def test_what_nobody_needs_is_not_written():
    """Without gradients, a post-norm has one output."""
    x, r, w, nb, b = make(4, 8)[0]
    for post, trains in itertools.product([False, True], repeat=2):
        with torch.set_grad_enabled(trains), recorded() as seen:
            add_norm(x.requires_grad_(), r, Norm(w, nb, EPS), b, post=post)
        assert (seen[0].arguments["s_ptr"] is None) == (post and not trains)


@posts
def test_no_gradient_is_added_by_torch(post):
    """Two layers, each of whose results has two uses: what a model without the second result, or
    with the definition, adds up in kernels of its own."""
    leaves = [*make(6, 16)[0], *make(6, 16)[0][2:], torch.randn(16, 16, device=DEVICE)]
    x, r, w, nb, b, w2, nb2, b2, matrix = [leaf.requires_grad_() for leaf in leaves]

    def layers(fn, twice):
        y, stream = fn(x, r, Norm(w, nb, EPS), b, post=post)
        y, stream = fn(y @ matrix, stream if twice else y, Norm(w2, nb2, EPS), b2, post=post)
        return y.square().mean() if post else (y * stream).mean()

    def ran(fn, twice):
        with Operations() as calls:
            loss = layers(fn, twice)
            grads = torch.autograd.grad(loss, leaves)
        return loss, grads, set(calls.names) & {"add", "add_"}

    loss, grads, added = ran(add_norm, twice=True)
    *expected, added_by_torch = ran(add_norm_ref, twice=True)
    torch.testing.assert_close((loss, grads), tuple(expected), rtol=1e-4, atol=1e-5)
    assert not added
    assert added_by_torch
    assert not post or ran(add_norm, twice=False)[2]


# ---------------------------------------------------------------- launches


def at_shape(T, C, dtype, dropped=True, post=True, absent=(), frozen=False, rms=False):
    """The launches of both passes."""
    inputs, upstream = make(T, C, dtype)
    inputs = without(inputs, *absent)
    dropout, _ = drawn(T, C, 0.1 * dropped)
    x, r, w, nb, b = leaves = [i if i is None else i.detach().requires_grad_() for i in inputs]
    for leaf in leaves[2:] if frozen else ():
        leaf.requires_grad_(False)
    with recorded(run=False) as seen:
        results = add_norm(x, r, Norm(w, nb, EPS, rms), b, dropout, post)
        torch.autograd.backward(results, upstream)
    return seen


@posts
@pytest.mark.parametrize("C", [30, 384])
def test_a_new_number_of_rows_compiles_nothing(C, post):
    """Three binaries in all."""
    rows = (1, 2, 3, 16, 33, 160)
    seen = [launch for T in rows for launch in at_shape(T, C, torch.bfloat16, post=post)]
    assert compilations(seen) == 3
    assert {launch.kernel for launch in seen} == {
        *("_add_norm_kernel", "_add_norm_backward_kernel", "_column_sums_kernel"),
    }


def test_launches_are_those_that_are_declared():
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    seen = [
        *(launch for dtype in (bf16, fp16, fp32) for launch in at_shape(16, 768, dtype)),
        *at_shape(16, 384, bf16),
        *at_shape(16, 1024, bf16),
        *at_shape(16, 768, bf16, dropped=False),
        *at_shape(16, 768, bf16, post=False),
        *at_shape(16, 768, bf16, dropped=False, post=False),
        *at_shape(16, 768, bf16, frozen=True),
    ]
    plain = {"dropped": False, "post": False}
    final = at_shape(16, 768, bf16, absent=("residual", "bias"), **plain)
    rms = at_shape(16, 768, bf16, absent=("residual", "bias", "norm_bias"), rms=True, **plain)
    wide = at_shape(16, 8192, bf16)
    backward = launches_are_declared([*seen, rms[1]], backward_module)
    assert backward == {launch.name for launch in backward_module.LAUNCHES}
    forward = launches_are_declared([*seen, final[0], rms[0], wide[0]], forward_module)
    assert forward == {launch.name for launch in forward_module.LAUNCHES}


def test_enough_programs_for_few_rows_and_no_more_than_there_are_sums():
    """800 tokens occupy every SM."""
    for C in (384, 768, 1024):
        forward, backward, _ = at_shape(800, C, torch.bfloat16, dropped=False)
        assert forward.grid[0] >= 100
        assert backward.grid[0] >= 100
    assert at_shape(4000, 768, torch.bfloat16, dropped=False)[1].grid == (backward_module.PROGRAMS,)


@pytest.mark.parametrize("chunks", [3, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_hold_a_row_and_waste_little(size, chunks):
    """Every width has one; those of models have not a column too many, in 16 bytes a lane."""
    for C in range(1, WIDEST + 1):
        tile, warps = row_tile(C, size, chunks)
        n = -(-C // tile["CHUNK"])
        assert 1 <= n <= chunks
        assert warps in (4, 8, 16)
        assert (n - 1) * tile["CHUNK"] < C
        if tile["CHUNK"] > 16:
            assert n * tile["CHUNK"] < 2 * C
        if tile["CHUNK"] <= 2048:
            assert tile["ROWS"] * tile["CHUNK"] * size == warps * 512
    for C in (384, 512, 768, 1024, 1536, 2048, 3072, 4096):
        tile, _ = row_tile(C, size, chunks)
        assert C % tile["CHUNK"] == 0


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"expected x and residual \(T, C\).*got x \(2, 3, 4\)"),
        ({"r": torch.zeros(3, 8)}, r"got x \(4, 8\), residual \(3, 8\)"),
        ({"w": torch.zeros(1)}, r"weight \(1,\)"),
        ({"nb": torch.zeros(9)}, r"norm bias \(9,\)"),
        ({"b": torch.zeros(4, 8)}, r" bias \(4, 8\)"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, r"fp32, fp16 or bf16, got torch.float64"),
        ({"r": torch.zeros(4, 8).half()}, r"residual in torch.float32, got torch.float16"),
        ({"b": torch.zeros(8).half()}, r"parameters all in torch.float32 or torch.float32, "
                                       r"got torch.float16, torch.float32"),
        ({"w": torch.zeros(8, device="meta")}, r"expected all on one GPU, got .*meta"),
        ({"rms": True}, r"expected an RMSNorm without bias"),
        ({"dropout": 0.1}, r"expected draw_dropout\(...\).at\(site, p\), got 0.1"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_launched(change, message):
    given = dict(zip(["x", "r", "w", "nb", "b"], make(4, 8)[0], strict=True))
    given |= {"rms": False, "dropout": None}
    given |= {k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type == "cpu" else v
              for k, v in change.items()}  # fmt: skip
    norm = Norm(given["w"], given["nb"], EPS, given["rms"])
    with recorded() as seen, pytest.raises(ValueError, match=message):
        add_norm(given["x"], given["r"], norm, given["b"], given["dropout"])
    assert not seen


def test_too_many_columns_and_none():
    for C in (0, WIDEST + 1):
        x, r, w, nb, b = make(1, C)[0]
        with pytest.raises(ValueError, match=f"expected 1 to 8192 columns, got {C}"):
            add_norm(x, r, Norm(w, nb, EPS), b)


def test_dropout_of_other_rows_or_fewer_columns():
    x, r, w, nb, b = make(4, 8)[0]
    for dropout in (drawn(5, 8, 0.1)[0], drawn(4, 7, 0.1)[0]):
        with pytest.raises(ValueError, match=r"expected dropout of .* \(4, 8, 1\), got \("):
            add_norm(x, r, Norm(w, nb, EPS), b, dropout)


def test_the_gradient_is_differentiable_once():
    x, r, w, nb, b = make(4, 8)[0]
    y, _ = add_norm(x.requires_grad_(), r, Norm(w, nb, EPS), b)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_table_of_kernels_has_it():
    assert TRITON.add_norm is add_norm
