"""kernels/attention.py: the kernels against the definition, to the bit where a bit is promised.

A sequence of up to 64 rows takes other kernels than a longer one: cases come in pairs.
"""

import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import empty_is_poisoned, guarded, poisoned
from launches import recorded
from test_attention import both, causality, drawn, key_cases, make, make_kv, run, run_kv
from torch import Tensor

from minift.kernels.attention import (
    attention,
    attention_kv,
    attention_kv_ref,
    attention_probs,
    attention_ref,
)
from minift.kernels.dropout import Dropout, dropout_keep
from minift.kernels.layout import SPAN
from minift.ops import TORCH, Draw, Layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
either = pytest.mark.parametrize("lengths", [[9, 40], [70, 3]], ids=["short", "long"])

# id: lengths, slack rows, H, Hk, D
CASES = {
    "one token: softmax of one score, dq and dk are 0": ([1], 0, 2, 2, 16),
    "all of length 1": ([1, 1, 1], 0, 1, 1, 16),
    "around the blocks of the gradient of a long one": ([191, 193], 0, 1, 1, 16),
    "one long among short": ([4, 2, 150, 7], 0, 1, 1, 16),
    "all equal": ([12, 12], 0, 2, 2, 16),
    "empty sequences first, within, last": ([0, 3, 0, 70, 0], 0, 1, 1, 16),
    "slack rows after short ones, more than a span": ([3, 5], 140, 1, 1, 16),
    "slack rows after a long one, more than a span": ([3, 66], 140, 1, 1, 16),
    "slack rows and nothing else": ([0], 5, 2, 2, 16),
    "four heads of each": ([5, 66], 0, 4, 4, 16),
    "heads narrower than a product": ([5, 66], 0, 1, 1, 8),
    "heads of an odd size": ([5, 66], 0, 2, 1, 9),
    "GQA: groups of 2 query heads": ([5, 66], 2, 4, 2, 16),
    "MQA: one key head": ([5, 66], 0, 6, 1, 16),
    "D = 32": ([5, 66], 0, 1, 1, 32),
    "D = 40, no power of two": ([5, 66], 0, 1, 1, 40),
    "D = 64": ([5, 66], 0, 1, 1, 64),
    "D = 80, no power of two": ([5, 66], 0, 1, 1, 80),
    "D = 96, no power of two": ([5, 66], 0, 1, 1, 96),
    "D = 128": ([5, 66], 0, 1, 1, 128),
}
# Each with a dtype, causal or not, with or without dropout: neighbours in the list differ.
OPTIONS = list(itertools.product([0.0, 0.3], [True, False], DTYPES))
CHOSEN = [(case, *OPTIONS[(7 * i) % 12]) for i, case in enumerate(CASES.values())]


def assert_all_as_accurate(actual, same_dtype, exact, inputs, p=0.0):
    """Result and gradients, at the scale of the inputs; in fp32 of a product of two, which dq and
    dk are differences of: that of one token is 0 and leaves a few ulp of it."""
    size = max([x.abs().max().item() for x in inputs if x.numel()], default=1.0)
    scale = size ** (2 if same_dtype[0].dtype == torch.float32 else 1) / (1 - p)
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert a.dtype == s.dtype
        assert_as_accurate(a, s, e, scale)


def check(case, causal=False, p=0.0, dtype=torch.float32):
    """Result and gradient against the definition in the same dtype and in fp64."""
    *results, qkv, dout = both(case, causal, p, dtype, attention)
    assert results[0][0].dtype == results[0][1].dtype == dtype
    assert_all_as_accurate(*results, [qkv, dout], p)


def check_kv(inputs, dout, layout, causal=False, p=0.0):
    dropout = drawn(layout, inputs[0].shape[1], p) if p else None
    keep = dropout_keep(dropout, max(layout.key_lengths)) if p else None
    options = {"causal": causal}
    actual = run_kv(attention_kv, inputs, dout, layout, dropout=dropout, **options)
    same_dtype, exact = (
        run_kv(attention_kv_ref, [x.to(d) for x in inputs], dout, layout, keep=keep, p=p, **options)
        for d in (dout.dtype, torch.float64)
    )
    assert_all_as_accurate(actual, same_dtype, exact, [*inputs, dout], p)
    return actual


def equal(actual, expected):
    """Bit for bit, all of them."""
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# ---------------------------------------------------------------- values


@causality
@dtypes
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_the_whole_grid_of_options(causal, dtype, p):
    """Where every kernel has a part: short, long, slack, grouped heads."""
    check(([5, 66], 2, 2, 1, 16), causal, p, dtype)


@pytest.mark.parametrize(("case", "p", "causal", "dtype"), CHOSEN, ids=CASES)
def test_every_case(case, p, causal, dtype):
    check(case, causal, p, dtype)


@causality
@pytest.mark.parametrize("lengths", [[31, 32, 33], [63, 64, 65], [127, 128, 129]], ids=str)
def test_lengths_around_a_block(lengths, causal):
    """In fp32, where a row too much or too few cannot pass for rounding: around a block of a short
    sequence, the longest short one, a span of a long one."""
    check((lengths, 0, 1, 1, 16), causal, p=0.0 if causal else 0.3)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_the_widest_heads(dtype):
    check(([5, 66], 0, 1, 1, 256), True, 0.3, dtype)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_sequences(rows):
    qkv, dout, layout = make(([], rows, 2, 1, 16), dtype=torch.float32)
    with empty_is_poisoned():
        results = run(attention, qkv, dout, layout, 2)
    assert equal(results, (torch.zeros_like(dout), torch.zeros_like(qkv)))


@key_cases
@causality
def test_other_keys(case, causal):
    """The mask is aligned to the end; slack of queries and of keys has results of 0."""
    inputs, dout, layout = make_kv(*case, 2, 1, 16, (2, 3), torch.float32)
    out, dq, dk, dv = check_kv(inputs, dout, layout, causal, 0.3 if causal else 0.0)
    for x, used in ((out, case[0]), (dq, case[0]), (dk, case[1]), (dv, case[1])):
        assert not x[sum(used) :].any()


OFFSETS = [14, 15, 16, 30, 31, 32]  # of the diagonal, around blocks


@pytest.mark.parametrize(
    ("lengths", "key_lengths"),
    [
        ([3] * 6 + [3 + n for n in OFFSETS], [3 + n for n in OFFSETS] + [3] * 6),
        ([5] * 9 + [67, 68, 69], [66, 67, 68, 69, 70, 130, 131, 132, 133] + [5] * 3),
    ],
    ids=["short", "long"],
)
def test_where_the_diagonal_enters_a_block(lengths, key_lengths):
    """Which blocks need a mask is a matter of one key or query."""
    inputs, dout, layout = make_kv(lengths, key_lengths, 1, 1, 16, dtype=torch.float32)
    check_kv(inputs, dout, layout, causal=True)


@pytest.mark.parametrize(
    ("case", "blind"),
    [(([9, 40], [3, 20]), [*range(6), *range(9, 29)]), (([130], [70]), [*range(60)])],
    ids=["short", "long"],
)
def test_queries_that_see_no_key_are_zero(case, blind):
    """Causal, more queries than keys: the first ones give 0, take no gradient and give none."""
    inputs, dout, layout = make_kv(*case, 1, 1, 16, dtype=torch.float32)
    with empty_is_poisoned():
        expected = run_kv(attention_kv, inputs, dout, layout, causal=True)
        inputs[0][blind] = dout[blind] = 9.0
        actual = run_kv(attention_kv, inputs, dout, layout, causal=True)
    assert equal(actual, expected)
    for x in actual[:2]:
        assert not x[blind].any()


# ---------------------------------------------------------------- properties

heads = st.sampled_from([(1, 1), (1, 1), (2, 1)])
length = st.one_of(st.integers(0, 6), st.integers(0, 3), st.just(1), st.sampled_from([33, 65]))
drawn_cases = st.builds(
    lambda lengths, slack, heads: (lengths, slack, *heads, 16),
    st.lists(length, min_size=2, max_size=3).filter(lambda lengths: 0 < sum(lengths) < 72),
    st.integers(0, 3),
    heads,
)
probability = st.sampled_from([0.0, 0.3])


def rows_of(layout):
    """The rows of each sequence."""
    cu = layout.cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(cu)]


@settings(max_examples=35)
@given(drawn_cases, st.booleans(), probability, st.sampled_from(DTYPES))
def test_any_batch_is_as_accurate_as_the_definition(case, causal, p, dtype):
    """Lengths, heads and slack that nobody thought of."""
    check(case, causal, p, dtype)


@settings(max_examples=45)
@given(drawn_cases, st.booleans(), probability)
def test_a_sequence_alone_equals_itself_in_a_batch(case, causal, p):
    """To the bit, forward and gradient, with the dropout of its rows."""
    qkv, dout, layout = make(case, dtype=torch.float32)
    dropout = drawn(layout, case[2], p) if p else None
    batch = run(attention, qkv, dout, layout, case[2], causal=causal, dropout=dropout)
    for rows in rows_of(layout):
        alone = Layout.pack([rows.stop - rows.start]).to(DEVICE)
        at = torch.arange(rows.start, rows.stop, device=DEVICE)
        own = dropout and dropout.at(2, p, at)
        single = run(attention, qkv[rows], dout[rows], alone, case[2], causal=causal, dropout=own)
        assert equal(single, [x[rows] for x in batch])


@pytest.mark.slow
@settings(max_examples=35)
@given(drawn_cases, st.booleans(), probability, st.randoms(use_true_random=False))
def test_permuting_sequences_permutes_results(case, causal, p, random):
    """To the bit."""
    qkv, dout, layout = make(case, dtype=torch.float32)
    lengths, _, H, _, _ = case
    dropout = drawn(layout, H, p) if p else None
    order = list(range(len(lengths)))
    random.shuffle(order)
    spans = [rows_of(layout)[b] for b in order] + [slice(sum(lengths), layout.rows)]
    rows = torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(DEVICE)
    permuted = Layout.pack([lengths[b] for b in order], layout.rows).to(DEVICE)
    own = dropout and dropout.at(2, p, rows)
    batch = run(attention, qkv, dout, layout, H, causal=causal, dropout=dropout)
    again = run(attention, qkv[rows], dout[rows], permuted, H, causal=causal, dropout=own)
    assert equal(again, [x[rows] for x in batch])


@settings(max_examples=35)
@given(drawn_cases, probability, st.data())
def test_causal_token_never_sees_its_future(case, p, data):
    """To the bit: other future tokens, same result; and no gradient flows to the future."""
    qkv, dout, layout = make(case, dtype=torch.float32)
    lengths, _, H, _, _ = case
    dropout = drawn(layout, H, p) if p else None
    now = data.draw(st.integers(0, sum(lengths) - 1))
    (span,) = [rows for rows in rows_of(layout) if rows.start <= now < rows.stop]
    past, future = slice(span.start, now + 1), slice(now + 1, span.stop)
    changed = qkv.clone()
    changed[future] = 7 - changed[future]
    only = torch.zeros_like(dout)
    only[past] = dout[past]
    out, grad = run(attention, qkv, only, layout, H, causal=True, dropout=dropout)
    out_, grad_ = run(attention, changed, only, layout, H, causal=True, dropout=dropout)
    assert equal((out_[past], grad_[past]), (out[past], grad[past]))
    assert not grad[future].any()
    assert p or bool((out_[future] != out[future]).all())


@settings(max_examples=20)
@given(drawn_cases, st.booleans(), probability)
def test_grouped_heads_equal_repeated_keys_and_values(case, causal, p):
    """Query head h uses key head h // (H / Hk); the gradients of its group add up."""
    lengths, slack, _, _, D = case
    H, Hk = 2, 1
    qkv, dout, layout = make((lengths, slack, H, Hk, D), dtype=torch.float32)
    dropout = drawn(layout, H, p) if p else None
    q, k, v = qkv.split([H, Hk, Hk], dim=1)
    repeated = torch.cat([q, *(x.repeat_interleave(H // Hk, 1) for x in (k, v))], 1)
    out, grad = run(attention, qkv, dout, layout, H, causal=causal, dropout=dropout)
    out_full, full = run(attention, repeated, dout, layout, H, causal=causal, dropout=dropout)
    gq, gk, gv = full.split([H, H, H], dim=1)
    added = (g.unflatten(1, (Hk, H // Hk)).sum(2) for g in (gk, gv))
    torch.testing.assert_close(out, out_full)
    torch.testing.assert_close(grad, torch.cat([gq, *added], 1))


@pytest.mark.slow
@settings(max_examples=30)
@given(drawn_cases, st.booleans(), st.integers(0, 2), st.sampled_from([40, 64, 90, 300]))
def test_a_padded_layout_changes_nothing(case, causal, more, longest):
    """To the bit: a bucket has spans of no rows, and runs under any batch that fits it."""
    lengths, _, H, _, _ = case
    qkv, dout, layout = make(case, dtype=torch.float32)
    bucket = len(lengths) + more, max(longest, *lengths, 1)
    padded = Layout.pack(lengths, layout.rows, bucket=bucket).to(DEVICE)
    with empty_is_poisoned():
        exact = run(attention, qkv, dout, layout, H, causal=causal)
        again = run(attention, qkv, dout, padded, H, causal=causal)
    assert equal(again, exact)


@either
def test_two_runs_are_bitwise_equal(lengths):
    """A run that is repeated or resumed gives the same weights."""
    qkv, dout, layout = make((lengths, 2, 2, 1, 16), dtype=torch.bfloat16)
    dropout = drawn(layout, 2, 0.1)
    first, second = (
        run(attention, qkv, dout, layout, 2, causal=True, dropout=dropout) for _ in range(2)
    )
    assert equal(first, second)


# ---------------------------------------------------------------- storage


@contextmanager
def guarded_outputs():
    """In the block, what is made with new_empty is poison within poison: yields the guards."""
    guards, original = [], Tensor.new_empty

    def new_empty(self, *shape, dtype=None, **options):
        if options:  # nothing of ours
            return original(self, *shape, dtype=dtype, **options)
        shape = torch.empty(*shape, device="meta").shape
        guards.append(poisoned(*shape, dtype=dtype or self.dtype, device=self.device))
        return guards[-1].tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield guards


@either
@pytest.mark.parametrize(("dtype", "offset"), list(zip(DTYPES, [1, 0, 3], strict=True)))
def test_nothing_is_touched_beside_the_tensors(lengths, dtype, offset):
    """Inputs that lie anywhere, with NaN between their heads; results are written in full, and
    nothing around them is."""
    case, p = (lengths, 2, 2, 1, 24), 0.3
    _, same_dtype, exact, qkv, dout = both(case, False, p, dtype, TORCH.attention)
    _, _, layout = make(case)
    inputs = [guarded(x, offset, slack=8) for x in (qkv, dout)]
    before = [x.memory.clone() for x in inputs]
    with guarded_outputs() as guards:
        leaves = [x.tensor for x in inputs]
        actual = run(attention, *leaves, layout, 2, dropout=drawn(layout, 2, p))
    assert_all_as_accurate(actual, same_dtype, exact, [qkv, dout], p)
    for x, memory in zip(inputs, before, strict=True):
        assert torch.equal(x.memory.nan_to_num(7), memory.nan_to_num(7))
        x.assert_untouched()
    assert [tuple(g.tensor.shape) for g in guards[:2]] == [tuple(dout.shape), (2, layout.rows)]
    for guard in guards:
        guard.assert_untouched()
        guard.assert_written()


@either
def test_a_slice_of_something_wider_is_read_in_place(lengths):
    """Any strides of rows and heads, odd ones, and a storage offset of as many elements."""
    _, _, layout = make((lengths, 2, 2, 1, 16))
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, layout.rows + 1, 19, generator=generator).to(DEVICE)
    results = []
    for fn in (attention, attention_ref):
        leaf = wide.clone().requires_grad_()
        qkv = leaf[1:5, 1:, 1:17].transpose(0, 1)  # heads lie further apart than rows
        out = fn(qkv, layout, 2)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        results.append((out.detach(), grad))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@either
def test_keys_as_a_cache_has_them(lengths):
    """(Hk, Tk, D) seen as (Tk, Hk, D): rows closer together than heads; q and dout as well."""
    keys = [n + 5 for n in lengths]
    inputs, dout, layout = make_kv(lengths, keys, 2, 2, 16, (1, 1), torch.float32)
    expected = run_kv(attention_kv, inputs, dout, layout, causal=True)
    *inputs, dout = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (*inputs, dout))
    assert inputs[1].stride(0) < inputs[1].stride(1)
    assert equal(run_kv(attention_kv, inputs, dout, layout, causal=True), expected)


@either
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_slack_rows_are_zero_and_reach_nothing(lengths, p):
    """Their results and gradients are 0 exactly, whatever fresh memory held; NaN in their qkv
    and in their upstream gradient changes no bit elsewhere."""
    qkv, dout, layout = make((lengths, 4, 1, 1, 16), dtype=torch.float32)
    used = sum(lengths)
    dropout = drawn(layout, 1, p) if p else None
    with empty_is_poisoned():
        clean = run(attention, qkv, dout, layout, 1, dropout=dropout)
        qkv[used:] = dout[used:] = torch.nan
        noisy = run(attention, qkv, dout, layout, 1, dropout=dropout)
    assert equal(noisy, clean)
    for x in clean:
        assert x.isfinite().all()
        assert not x[used:].any()


@either
def test_slack_keys_reach_nothing(lengths):
    """The same where queries and keys have slack rows of their own."""
    keys = [n + 3 for n in lengths]
    inputs, dout, layout = make_kv(lengths, keys, 1, 1, 16, (2, 3), torch.float32)
    with empty_is_poisoned():
        clean = run_kv(attention_kv, inputs, dout, layout)
        for x, used in zip((*inputs, dout), (lengths, keys, keys, lengths), strict=True):
            x[sum(used) :] = torch.nan
        noisy = run_kv(attention_kv, inputs, dout, layout)
    assert equal(noisy, clean)
    for x, used in zip(clean, (lengths, lengths, keys, keys), strict=True):
        assert not x[sum(used) :].any()


@either
def test_a_gradient_of_stride_zero(lengths):
    """`out.sum()` sends one number for all elements; one number a row may come as well."""
    qkv, dout, layout = make((lengths, 0, 1, 1, 16), dtype=torch.float32)
    expected = run(attention, qkv, torch.ones_like(dout), layout, 1)
    for size, step in (((), 0), ((16,), 1)):
        sent = torch.ones(size, device=DEVICE).expand(dout.shape)
        assert (sent.stride(0), sent.stride(2)) == (0, step)
        assert equal(run(attention, qkv, sent, layout, 1), expected)


def test_rows_beyond_two_thousand_million_elements():
    """Row 128 starts at 2**31 elements: within a long sequence, and before a short one."""
    row = 2**24
    memory = torch.empty(143 * row, dtype=torch.bfloat16, device=DEVICE)  # 4.5 GiB, untouched
    qkv, dout, layout = make(([140, 3], 0, 1, 1, 16), dtype=torch.bfloat16)
    expected = run(attention, qkv, dout, layout, 1)
    far = memory.as_strided(qkv.shape, (row, 16, 1)).copy_(qkv)
    far_dout = memory.as_strided(dout.shape, (row, 16, 1), 48).copy_(dout)
    assert equal(run(attention, far, far_dout, layout, 1), expected)


@pytest.mark.parametrize("lengths", [[3], [66]], ids=["short", "long"])
def test_heads_beyond_two_thousand_million_elements(lengths):
    """Head 2 starts past 2**31 elements, of queries, keys and values, alone and in a group."""
    head = 2**30 + 16
    memory = torch.empty(2 * head + 2**18, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, untouched
    for n_key in (3, 1):
        inputs, dout, layout = make_kv(lengths, lengths, 3, n_key, 16, dtype=torch.bfloat16)
        expected = run_kv(attention_kv, inputs, dout, layout)
        far = [
            memory.as_strided(x.shape, (16, head, 1), 2**16 * i).copy_(x)
            for i, x in enumerate((*inputs, dout))
        ]
        assert equal(run_kv(attention_kv, far[:3], far[3], layout), expected)


def test_inputs_are_only_read():
    qkv, dout, layout = make(([9, 70], 2, 2, 1, 16), dtype=torch.float32)
    leaf, kept = qkv.clone().requires_grad_(), dout.clone()
    attention(leaf, layout, 2).backward(dout)
    assert equal((leaf.detach(), dout), (qkv, kept))
    assert (leaf._version, dout._version) == (0, 0)


@pytest.mark.parametrize(
    ("lengths", "kernels"),
    [
        ([9, 40], ["_forward_kernel", "_short_kernel"]),
        ([300], ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]),
        ([], []),
    ],
    ids=["short", "long", "nothing"],
)
def test_launches_and_nothing_else(lengths, kernels):
    """A program for each head and tile of a span, as many as the lists say; none for a list that
    is empty."""
    H, n_key, cut = 4, 2, lengths == [300]
    qkv, _, layout = make((lengths, 0, H, n_key, 16), dtype=torch.bfloat16)
    with recorded(run=False) as seen:
        attention(qkv.requires_grad_(), layout, H).sum().backward()
    assert [x.kernel for x in seen] == kernels
    for launched in seen:
        shape, spans = dict(launched.constexprs), launched.arguments["spans_ptr"]
        tile = shape["BLOCK_N" if launched.kernel == "_dkv_kernel" else "BLOCK_M"] if cut else SPAN
        heads = n_key if launched.kernel in ("_short_kernel", "_dkv_kernel") else H
        assert launched.grid == (len(spans) * heads * SPAN // tile,)


# ---------------------------------------------------------------- the bits of dropout


def revealed(layout, H, D, dropout):
    """Masks (T, H, L) as out, dq, dk and dv show them, where all keys are alike to a query.

    P is 1 / L. Row j of an identity in the place of v (of k) brings entry j of a row of P (of
    dS = P (dP - delta)) into out (dq); one in the place of dout (of q) brings it into dv (dk).
    """
    T = layout.rows
    starts = layout.cu_seqlens[:-1].tolist()
    at = torch.cat([torch.arange(n) for n in layout.lengths]).to(DEVICE)
    eye = torch.eye(D, device=DEVICE)[at][:, None].expand(T, H, D)
    zero, one = torch.zeros_like(eye), torch.ones_like(eye)
    out, grad = run(attention, torch.cat([zero, eye, eye], 1), one, layout, H, dropout=dropout)
    _, grad_ = run(attention, torch.cat([eye, zero, one], 1), eye, layout, H, dropout=dropout)
    size = torch.tensor(layout.lengths, device=DEVICE).repeat_interleave(
        torch.tensor(layout.lengths, device=DEVICE)
    )[:, None, None]
    # dq and dk hold (Z - P delta) / sqrt(D): delta = sum of Z, which out shows.
    root, delta = math.sqrt(D), out.sum(-1, keepdim=True)
    dq = grad[:, :H] * root * size + delta
    turned = torch.zeros(2, T, H, D, device=DEVICE)  # rows of dk and dv are keys
    for start, n in zip(starts, layout.lengths, strict=True):
        rows = slice(start, start + n)
        for x, part in zip(turned, (grad_[rows, H : 2 * H], grad_[rows, 2 * H :]), strict=True):
            x[rows, :, :n] = part[:, :, :n].permute(2, 1, 0)
    dk = turned[0] * root * size + delta
    L = layout.max_length
    real = torch.arange(L, device=DEVICE) < size
    names = {"out": out * size, "dq": dq, "dk": dk, "dv": turned[1] * size}
    half = 0.5 / (1 - dropout.p)
    return {name: (x[..., :L] > half) & real for name, x in names.items()}, real


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_bit_of_dropout(p):
    """Forward and in both halves of the gradient, of short and of long sequences, of each head:
    exactly those of the definition, and as many as they should be."""
    layout = Layout.pack([20, 100]).to(DEVICE)
    dropout = drawn(layout, 2, p)
    masks, real = revealed(layout, 2, 128, dropout)
    keep = dropout_keep(dropout, 100) & real
    for name, mask in masks.items():
        assert torch.equal(mask, keep), f"{(mask != keep).sum()} bits of {name}"
    n = 2 * (20**2 + 100**2)
    assert abs(keep.sum().item() - n * (1 - p)) < 4 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("length", [7, 70], ids=["short", "long"])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_smallest_kept_word_is_kept_and_the_one_below_is_not(length, p):
    """The compare is unsigned and `>=`, in each kernel."""
    smallest, layout = round(p * 2**32), Layout.pack([length]).to(DEVICE)
    word = torch.tensor([smallest - 1, smallest, smallest + 1, 0, 2**32 - 1, 2**31 - 1, 2**31])
    word = word.repeat(length // 7).to(DEVICE)
    rows = torch.zeros(length, 4, dtype=torch.int32, device=DEVICE)
    rows[:, 3] = word.to(torch.int32)  # a = 0, b = word: every key has the query's word
    columns = torch.arange(length, dtype=torch.int32, device=DEVICE)
    place = torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
    masks, real = revealed(layout, 1, 80, Dropout(p, 0, rows, columns, place))
    keep = (word >= smallest)[:, None, None] & real
    assert equal(masks.values(), [keep] * 4)


def test_bits_differ_between_steps_sites_and_heads():
    """As the definition's do; half of the bits, within 4 sigma."""
    layout, n = Layout.pack([20]).to(DEVICE), 20**2
    key = torch.arange(20, device=DEVICE)
    found = []
    for step, site in ((1, 0), (2, 0), (1, 1)):
        draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(step, device=DEVICE))
        dropout = TORCH.draw_dropout(draw, key, 20, 2, 2).at(site, 0.5)
        masks, _ = revealed(layout, 2, 32, dropout)
        assert equal(masks.values(), [dropout_keep(dropout, 20)] * 4)
        found += masks["out"].unbind(1)
    for a, b in itertools.combinations(found, 2):
        assert abs((a != b).sum().item() - n / 2) < 4 * math.sqrt(n / 4)


@either
def test_a_probability_too_small_to_drop_anything(lengths):
    """p * 2^32 rounds to 0: every word is kept, none is the smallest by chance."""
    qkv, dout, layout = make((lengths, 0, 1, 1, 16), dtype=torch.float32)
    expected = run(attention, qkv, dout, layout, 1)
    actual = run(attention, qkv, dout, layout, 1, dropout=drawn(layout, 1, 1e-11))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- extremes


@either
@causality
def test_huge_scores_do_not_overflow(lengths, causal):
    """Scores of 1e4 and more pick the largest key."""
    qkv, dout, layout = make((lengths, 0, 1, 1, 16), dtype=torch.float32)
    qkv[:, :2] *= 100
    results = [
        run(fn, qkv.to(d), dout.to(d), layout, 1, causal=causal)
        for fn, d in (
            (attention, qkv.dtype),
            (attention_ref, qkv.dtype),
            (attention_ref, torch.float64),
        )
    ]
    assert all(x.isfinite().all() for x in results[0])
    assert_all_as_accurate(*results, [qkv, dout])


@either
def test_equal_scores(lengths):
    """Every key counts the same: a row of out is the mean of v."""
    qkv, dout, layout = make((lengths, 0, 1, 1, 16), dtype=torch.float32)
    qkv[:, 0] = qkv[:, 1] = 2.0
    out, _ = run(attention, qkv, dout, layout, 1)
    for rows in rows_of(layout):
        expected = qkv[rows, 2:].mean(0, keepdim=True).expand_as(out[rows])
        torch.testing.assert_close(out[rows], expected)


@either
@causality
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_below_those_of_padding(lengths, causal, sign):
    """All real scores are -1e3, those of rows that a tile only pads itself with are 0: the
    exponential of a score that is not masked would be inf, and its gradient NaN."""
    qkv, dout, layout = make((lengths, 0, 1, 1, 16), dtype=torch.float32)
    qkv[:, 0], qkv[:, 1] = sign * 16.0, 16.0
    qkv[:, :2] += make((lengths, 0, 1, 1, 16), seed=1, dtype=torch.float32)[0][:, :2] / 100
    results = [
        run(fn, qkv.to(d), dout.to(d), layout, 1, causal=causal)
        for fn, d in (
            (attention, qkv.dtype),
            (attention_ref, qkv.dtype),
            (attention_ref, torch.float64),
        )
    ]
    # Scores of 1e3 are wrong by an ulp in whatever order they are added up, which differs from CPU
    # to CPU, and gradients by that times a query or key of 16.
    size = torch.tensor(16 * 1e3).sqrt()
    assert_all_as_accurate(*results, [qkv, dout, size])


@pytest.mark.parametrize(
    ("bad", "value"), [(0, math.nan), (1, math.nan), (0, -math.inf), (1, -math.inf)]
)
def test_what_is_not_finite_stays_in_its_sequence(bad, value):
    """A key and value of NaN, a query of -inf, in a short sequence and in a long one."""
    qkv, dout, layout = make(([5, 70, 9], 0, 1, 1, 16), dtype=torch.float32)
    clean = run(attention, qkv, dout, layout, 1)
    rows = rows_of(layout)[bad]
    qkv[rows.start + 2, 0 if value < 0 else slice(1, 3), 0] = value
    for a, b in zip(run(attention, qkv, dout, layout, 1), clean, strict=True):
        assert a[rows].isnan().any()
        others = torch.ones(len(a), dtype=torch.bool, device=DEVICE)
        others[rows] = False
        assert torch.equal(a[others], b[others])


# ---------------------------------------------------------------- what each token looks at


@causality
def test_probabilities_are_those_of_the_definition(causal):
    """One matrix a sequence; rows are distributions, and with v they give the result."""
    qkv, _, layout = make(([3, 0, 7], 2, 4, 2, 16), dtype=torch.float32)
    probs = attention_probs(qkv, layout, 4, causal=causal)
    out = attention_ref(qkv, layout, 4, causal=causal)
    v = qkv[:, 6:].repeat_interleave(2, 1)
    assert [tuple(x.shape) for x in probs] == [(4, 3, 3), (4, 0, 0), (4, 7, 7)]
    for rows, x in zip(rows_of(layout), probs, strict=True):
        torch.testing.assert_close(x.sum(-1), torch.ones_like(x.sum(-1)))
        torch.testing.assert_close(torch.einsum("hij,jhd->ihd", x, v[rows]), out[rows])
        assert not causal or not x.triu(1).any()


def test_probabilities_of_chosen_heads():
    """In the order asked for; of bf16 they are fp32 and have no gradient."""
    qkv, _, layout = make(([3, 7], 0, 4, 2, 16), dtype=torch.bfloat16)
    every = attention_probs(qkv.requires_grad_(), layout, 4)
    chosen = attention_probs(qkv, layout, 4, heads=(3, 0))
    for a, e in zip(chosen, every, strict=True):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        assert torch.equal(a, e[[3, 0]])


@pytest.mark.parametrize("heads", [(4,), (0, -1)])
def test_a_head_that_is_not_there_is_named(heads):
    qkv, _, layout = make(([3], 0, 4, 2, 16))
    with pytest.raises(ValueError, match=r"expected heads in 0 to 3, got \[.*\]"):
        attention_probs(qkv, layout, 4, heads=heads)


# ---------------------------------------------------------------- what does not fit


def refused(fn, message, *args, **options):
    """Raises ValueError of one line, before a kernel runs."""
    with recorded() as seen, pytest.raises(ValueError, match=message) as error:
        fn(*args, **options)
    assert "\n" not in str(error.value)
    assert not seen


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.zeros(5, 3, 16).double(), "expected fp32, fp16 or bf16, got torch.float64"),
        (torch.zeros(5, 3, 16).long(), "expected fp32, fp16 or bf16, got torch.int64"),
        (torch.zeros(5, 3, 0), r"heads of at most 256 \(fp32: 128\), got 0"),
        (torch.zeros(5, 3, 264).half(), "heads of at most 256 .*, got 264"),
        (torch.zeros(5, 3, 256), "heads of at most 256 .*, got 256"),
        (torch.zeros(5, 16, 3).mT, r"unit stride along D, got \(48, 1, 3\): call .contiguous"),
        (torch.zeros(6, 3, 16), r"expected qkv \(5, H \+ 2 \* Hk, D\), heads .*, got \(6, 3, 16\)"),
        (torch.zeros(5, 4, 16), r"expected H \+ 2 \* Hk heads, Hk dividing H = 1, got 4"),
        (torch.zeros(5, 3, 16, device="meta"), "expected tensors on a GPU, got meta"),
    ],
    ids=["fp64", "int", "D 0", "D 264", "fp32, D 256", "strided", "rows", "heads", "device"],
)
def test_a_projection_that_does_not_fit_is_named(qkv, message):
    qkv = qkv if qkv.is_meta else qkv.to(DEVICE)
    refused(attention, message, qkv, Layout.pack([2, 3]).to(DEVICE), 1)


def test_rows_too_far_apart_are_named():
    """Within a tile an offset has 32 bits."""
    memory = torch.empty(2**26 + 64, dtype=torch.float16, device=DEVICE)
    qkv = memory.as_strided((3, 3, 16), (2**24 + 8, 16, 1))
    message = r"rows at most 2\^24 elements apart, got 16777224"
    refused(attention, message, qkv, Layout.pack([3]).to(DEVICE), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (5, 16)}, r"expected q \(T, H, D\), k and v \(Tk, Hk, D\), got"),
        ({"v": (7, 1, 32)}, r"got \[\(5, 2, 16\), \(7, 1, 16\), \(7, 1, 32\)\]"),
        ({"k": (7, 2, 16)}, r"got \[\(5, 2, 16\), \(7, 2, 16\), \(7, 1, 16\)\]"),
        ({"q": (5, 2, 32)}, r"got \[\(5, 2, 32\), \(7, 1, 16\), \(7, 1, 16\)\]"),
        ({"q": (6, 2, 16)}, "expected 5 rows of q and 7 of k and v, got 6 and 7"),
        ({"k": (5, 1, 16), "v": (5, 1, 16)}, "expected 5 rows .* 7 .*, got 5 and 5"),
        ({"k": (7, 3, 16), "v": (7, 3, 16)}, "expected Hk dividing H, got H = 2, Hk = 3"),
        ({"k": (7, 0, 16), "v": (7, 0, 16)}, "expected Hk dividing H, got H = 2, Hk = 0"),
    ],
    ids=["no H", "v", "k", "D", "rows", "rows of keys", "Hk", "no keys"],
)
def test_keys_that_do_not_fit_are_named(change, message):
    shapes = {"q": (5, 2, 16), "k": (7, 1, 16), "v": (7, 1, 16)} | change
    layout = Layout.pack([2, 3], key_lengths=[3, 4]).to(DEVICE)
    tensors = [torch.zeros(shape, device=DEVICE) for shape in shapes.values()]
    refused(attention_kv, message, *tensors, layout)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_keys_of_another_dtype_or_stride_are_named(odd):
    (q, k, v), _, layout = make_kv([2], [3], 1, 1, 16, dtype=torch.float32)
    tensors = [q, k, v]
    tensors[odd] = tensors[odd].half()
    message = r"expected k, v in torch.float\d\d on .*, got torch.float\d\d"
    refused(attention_kv, message, *tensors, layout)
    tensors[odd] = torch.zeros(len([q, k, v][odd]), 16, 2, device=DEVICE).mT[:, :1]
    refused(attention_kv, "expected unit stride along D", *tensors, layout)


def test_a_packed_call_wants_keys_that_are_its_queries():
    """Of other lengths, and of as many rows laid out otherwise."""
    qkv = torch.zeros(5, 3, 16, device=DEVICE)
    for key_lengths, key_rows in (([3, 4], None), ([3, 2], None), ([2, 3], 9)):
        layout = Layout.pack([2, 3], key_lengths=key_lengths, key_rows=key_rows).to(DEVICE)
        refused(attention, "whose keys are its queries: use attention_kv", qkv, layout, 1)


def test_a_layout_elsewhere_is_named():
    qkv = torch.zeros(5, 3, 16, device=DEVICE)
    message = f"expected a layout on {DEVICE}.*: call layout.to"
    refused(attention, message, qkv, Layout.pack([2, 3]).to("meta"), 1)


def test_dropout_that_does_not_fit_is_named():
    """One column, row or head too few, and no fewer than needed; and a number, as others take."""
    qkv, _, layout = make(([2, 3], 1, 1, 1, 16), dtype=torch.float32)
    draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    key = torch.arange(6, device=DEVICE)
    for rows, columns in ((6, 2), (5, 3), (7, 3)):
        dropout = TORCH.draw_dropout(draw, torch.arange(rows, device=DEVICE), columns, 1, 1)
        message = rf"of \(rows, columns, heads\) \(6, 3, 1\), got \({rows}, {columns}, 1\)"
        refused(attention, message, qkv, layout, 1, dropout=dropout.at(0, 0.5))
    heads, _, _ = make(([2, 3], 1, 2, 2, 16), dtype=torch.float32)
    few = TORCH.draw_dropout(draw, key, 3, 1, 1).at(0, 0.5)
    refused(attention, r"\(6, 3, 2\), got \(6, 3, 1\)", heads, layout, 2, dropout=few)
    refused(attention, r"draw_dropout\(...\).at\(.*\), got 0.1", qkv, layout, 1, dropout=0.1)
    enough = TORCH.draw_dropout(draw, key, 3, 1, 1).at(0, 0.5)
    assert attention(qkv, layout, 1, dropout=enough).shape == (6, 1, 16)


def test_a_device_without_kernels_is_named(monkeypatch):
    """Rather than a wild read: a CPU tensor where nothing interprets."""
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    message = "expected tensors on a GPU, got cpu"
    refused(attention, message, torch.zeros(5, 3, 16), Layout.pack([2, 3]), 1)
