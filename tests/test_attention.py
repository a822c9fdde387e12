"""kernels/attention.py: the definition against torch's, and TORCH.attention against it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from minift import torch_attention
from minift.kernels.attention import attention_kv_ref, attention_ref
from minift.kernels.dropout import dropout_keep
from minift.ops import TORCH, Draw, Layout

# id: lengths, slack rows, H, Hk, D
CASES = {
    "one token: softmax of one score, dq and dk are 0": ([1], 0, 2, 2, 16),
    "all of length 1: nothing but v passes": ([1, 1, 1], 0, 2, 2, 16),
    "all equal: the view path": ([7, 7, 7], 0, 2, 2, 16),
    "ragged: the gather path": ([3, 5, 2, 7], 0, 2, 2, 16),
    "one long among many short: several groups": ([4, 2, 3, 4, 70, 4, 4], 0, 2, 2, 16),
    "two ragged groups: offsets of both": ([2, 3, 90, 89, 80], 0, 1, 1, 16),
    "empty sequences first, within, last": ([0, 3, 0, 5, 0], 0, 2, 2, 16),
    "slack rows, ragged": ([3, 5], 4, 2, 2, 16),
    "slack rows, equal": ([4, 4], 3, 2, 2, 16),
    "slack rows and nothing else": ([0], 5, 2, 2, 16),
    "one head": ([3, 6], 0, 1, 1, 32),
    "GQA: groups of 3 query heads": ([3, 6, 4], 2, 6, 2, 16),
    "GQA on the view path": ([5, 5], 0, 4, 2, 16),
    "MQA: one key head": ([3, 6, 4], 0, 4, 1, 16),
    "D = 32, MiniLM's": ([9, 12], 0, 2, 2, 32),
    "D = 64, BERT's": ([9, 12], 0, 2, 2, 64),
    "D = 80, no power of two": ([9, 12], 0, 2, 2, 80),
    "D = 128": ([9, 12], 0, 2, 2, 128),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
causality = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN: what is returned unwritten shows. (cuBLAS would want more.)"""
    if DEVICE == "cpu":
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(case, seed=0, dtype=torch.float64):
    """(qkv, upstream gradient, layout): every row differs, slack rows too."""
    lengths, slack, H, Hk, D = case
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.pack(lengths, sum(lengths) + slack).to(DEVICE)
    qkv = torch.randn(layout.rows, H + 2 * Hk, D, generator=generator, dtype=torch.float64)
    dout = torch.randn(layout.rows, H, D, generator=generator, dtype=torch.float64)
    return qkv.to(DEVICE, dtype), dout.to(DEVICE, dtype), layout


def make_kv(lengths, key_lengths, H, Hk, D, slack=(0, 0), dtype=torch.float64):
    """((q, k, v), upstream gradient, layout) where keys are of other lengths than queries."""
    generator = torch.Generator().manual_seed(0)
    rows, key_rows = sum(lengths) + slack[0], sum(key_lengths) + slack[1]
    layout = Layout.pack(lengths, rows, key_lengths, key_rows).to(DEVICE)
    shapes = [(rows, H, D), (key_rows, Hk, D), (key_rows, Hk, D), (rows, H, D)]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    *inputs, dout = (x.to(DEVICE, dtype) for x in drawn)
    return inputs, dout, layout


def run(fn, qkv, dout, *args, **options):
    """Result and gradient of `fn`."""
    return run_kv(lambda x: fn(x, *args, **options), [qkv], dout)


def run_kv(fn, inputs, dout, *args, **options):
    """Result and gradients of a function of several tensors."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = fn(*leaves, *args, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def drawn(layout, H, p, seed=3):
    """The dropout of a batch, at a place that is not the first."""
    key = torch.zeros(layout.rows, dtype=torch.int64)
    start = 0
    for b, length in enumerate(layout.lengths):
        key[start : start + length] = (b << 32) + torch.arange(length)
        start += length
    draw = Draw(torch.tensor(seed, device=DEVICE), torch.tensor(1, device=DEVICE))
    columns = max(layout.key_lengths, default=0) + 5
    return TORCH.draw_dropout(draw, key.to(DEVICE), columns, 4, H).at(2, p)


def both(case, causal=False, p=0.0, dtype=torch.float64, fn=TORCH.attention):
    """((out, dqkv) of `fn`, of the definition in dtype, of the definition in fp64, qkv, dout)."""
    qkv, dout, layout = make(case, dtype=dtype)
    H = case[2]
    dropout = drawn(layout, H, p) if p else None
    keep = dropout_keep(dropout, layout.max_length) if p else None
    actual = run(fn, qkv, dout, layout, H, causal=causal, dropout=dropout)
    refs = [
        run(attention_ref, qkv.to(d), dout.to(d), layout, H, causal=causal, keep=keep, p=p)
        for d in (dtype, torch.float64)
    ]
    return actual, *refs, qkv, dout


# ---------------------------------------------------------------- the definition


@cases
@causality
def test_ref_is_sdpa_on_each_sequence(case, causal):
    """Torch's own attention, told of grouped heads, on one sequence at a time."""
    lengths, _, H, Hk, _ = case
    qkv, _, layout = make(case)
    out = attention_ref(qkv, layout, H, causal=causal)
    start = 0
    for length in lengths:
        if length:
            rows = qkv[start : start + length].transpose(0, 1)
            q, k, v = rows.split([H, Hk, Hk])
            expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            torch.testing.assert_close(out[start : start + length], expected.transpose(0, 1))
        start += length
    assert torch.equal(out[start:], torch.zeros_like(out[start:]))


# id: lengths of queries, of keys
KEY_CASES = {
    "one token after a cache": ([1], [9]),
    "caches of different lengths": ([3, 2], [20, 40]),
    "more queries than keys": ([9, 40], [3, 20]),
    "keys of an empty sequence": ([4, 3], [0, 5]),
    "queries of an empty sequence": ([0, 3], [5, 4]),
    "a long cache": ([5, 1], [130, 3]),
    "few keys of a long sequence": ([130, 2], [5, 7]),
    "long and different": ([70], [100]),
    "long and the last tile sees all": ([130], [70]),
}
key_cases = pytest.mark.parametrize("case", KEY_CASES.values(), ids=KEY_CASES)


@key_cases
@causality
def test_ref_is_sdpa_to_other_keys(case, causal):
    """The last query sees all keys. A query that sees none gives 0, and no gradient is NaN."""
    (q, k, v), dout, layout = make_kv(*case, 4, 2, 16, slack=(2, 3))
    out, *grads = run_kv(attention_kv_ref, (q, k, v), dout, layout, causal=causal)
    start, key_start = 0, 0
    for length, key_length in zip(*case, strict=True):
        mask = torch.ones(length, key_length, dtype=torch.bool, device=DEVICE)
        mask = mask.tril(key_length - length) if causal else mask
        rows, keys = slice(start, start + length), slice(key_start, key_start + key_length)
        parts = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))
        expected = F.scaled_dot_product_attention(*parts, mask, enable_gqa=True).transpose(0, 1)
        expected = torch.where(mask.any(1)[:, None, None], expected, 0)
        torch.testing.assert_close(out[rows], expected)
        start, key_start = start + length, key_start + key_length
    assert not out[start:].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_ref_divides_kept_probabilities_after_the_softmax():
    """Dropout does not renormalise: with all scores equal, out is the sum of kept v over L q."""
    layout, L, p = Layout.pack([4]), 4, 0.5
    qkv = torch.zeros(L, 3, 2, dtype=torch.float64)
    qkv[:, 2] = torch.arange(8.0).view(4, 2)
    keep = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    out = attention_ref(qkv, layout, 1, keep=keep[:, None], p=p)
    torch.testing.assert_close(out[:, 0], keep.double() @ qkv[:, 2] / L / (1 - p))


# ---------------------------------------------------------------- torch against the definition


@cases
@causality
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_fp64_equals_the_definition(case, causal, p):
    """Forward and gradient to 12 digits: no wrong term hides behind rounding."""
    actual, _, exact, _, _ = both(case, causal, p)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@cases
@causality
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_is_as_accurate_as_the_definition(case, causal, dtype, p):
    actual, same_dtype, exact, qkv, dout = both(case, causal, p, dtype)
    scale = max(qkv.abs().max().item(), dout.abs().max().item()) / (1 - p)
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, s, e, scale)


def test_cases_reach_every_path():
    """The ids above say which path they take; this keeps them true when grouping changes."""
    groups = {name: Layout.pack(case[0]).groups for name, case in CASES.items()}

    def gathers(name):
        return [g.gather is not None for g in groups[name]]

    assert gathers("all equal: the view path") == [False]
    assert gathers("GQA on the view path") == [False]
    assert gathers("ragged: the gather path") == [True]
    assert gathers("two ragged groups: offsets of both") == [True, True]
    assert len(gathers("one long among many short: several groups")) == 3
    assert gathers("slack rows and nothing else") == []


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_of_a_long_sequence(p):
    """Thousands of probabilities: a mask shifted by one row, head or column cannot pass."""
    actual, _, exact, _, _ = both(([33, 40], 0, 3, 3, 16), p=p)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_huge_scores_do_not_overflow():
    """Softmax subtracts the maximum: scores of 1e6 pick the largest key."""
    qkv, dout, layout = make(([3, 5], 0, 2, 2, 16), dtype=torch.float32)
    out, grad = run(TORCH.attention, qkv * 1e3, dout, layout, 2)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    exact = attention_ref(qkv.double() * 1e3, layout, 2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


def test_expanded_gradient_and_strided_input_are_read_right():
    """`out.sum()` sends a gradient of stride 0; qkv may be a slice of something wider."""
    _, _, layout = make(([3, 5], 2, 2, 2, 16))
    torch.manual_seed(0)
    wide = torch.randn(16, layout.rows, 9, dtype=torch.float64, device=DEVICE)
    grads = []
    for fn in (TORCH.attention, attention_ref):
        leaf = wide.clone().requires_grad_()
        fn(leaf.permute(1, 2, 0)[:, 1:7], layout, 2).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


# ---------------------------------------------------------------- without a backward pass


@cases
@causality
@pytest.mark.parametrize("long", [0, torch_attention.LONG_FORWARD], ids=["all long", "as it is"])
@torch.no_grad()
def test_without_a_backward_pass_it_equals_the_definition(case, causal, long, monkeypatch):
    """Where other kernels are the faster ones."""
    monkeypatch.setattr(torch_attention, "LONG_FORWARD", long)
    qkv, _, layout = make(case)
    out = TORCH.attention(qkv, layout, case[2], causal=causal)
    torch.testing.assert_close(out, attention_ref(qkv, layout, case[2], causal=causal))


@cases
@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_queries_of_some_rows_are_the_full_computation_indexed(case, backward, p):
    """First rows of sequences, which alone are computed without a backward pass, and any others;
    some in the order of nobody, one twice."""
    qkv, _, layout = make(case)
    dropout = drawn(layout, case[2], p) if p else None
    some = torch.arange(layout.rows, device=DEVICE).flip(0)[: 1 + layout.rows // 2]
    with torch.set_grad_enabled(backward):
        whole = TORCH.attention(qkv, layout, case[2], dropout=dropout)
        for rows in (layout.first, some, torch.cat([some, some[:1]])):
            out = TORCH.attention_at(qkv, layout, case[2], rows, dropout)
            if backward:  # training computes what it always did, to the bit
                assert torch.equal(out, whole[rows])
            torch.testing.assert_close(out, whole[rows])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_queries_do_not_depend_on_neighbours(dtype):
    """Those of a sequence in any batch, beside padding of any values: alone to rounding, and a NaN
    stays in its own sequence."""
    lengths = [5, 9, 9, 60, 61, 70]
    qkv, _, layout = make((lengths, 2, 3, 3, 16), dtype=dtype)
    together = TORCH.attention_at(qkv, layout, 3, layout.first)
    for i, part in enumerate(qkv[: sum(lengths)].split(lengths)):
        own = Layout.pack(lengths[i : i + 1]).to(DEVICE)
        alone = TORCH.attention_at(part, own, 3, own.first)
        torch.testing.assert_close(alone[0], together[i])
    at = layout.first[4]
    qkv[at] = torch.nan
    spoilt = TORCH.attention_at(qkv, layout, 3, layout.first).isnan().flatten(1).any(1)
    assert spoilt.tolist() == [False] * 4 + [True, False]


# ---------------------------------------------------------------- long sequences


@pytest.fixture
def long(monkeypatch):
    """Every sequence counts as long, and is cut in pieces of few queries and few pairs."""
    small = {"LONG": 0, "LONG_DROPPED": 0, "BLOCK": 4, "PIECE": 64}
    for name, value in small.items():
        monkeypatch.setattr(torch_attention, name, value)


@cases
@causality
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.usefixtures("long")
def test_long_sequences_in_fp64_equal_the_definition(case, causal, p):
    """Pieces of the last queries, of the last pairs, of one query; shared keys; the same masks."""
    actual, _, exact, _, _ = both(case, causal, p)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@causality
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_long_sequences_are_as_accurate_as_the_definition(causal, dtype, p):
    """As they are cut in earnest."""
    lengths = [130, 550] if p else [130, 200]
    assert max(lengths) > (torch_attention.LONG_DROPPED if p else torch_attention.LONG)
    actual, same, exact, qkv, dout = both((lengths, 3, 2, 1, 64), causal, p, dtype)
    scale = max(qkv.abs().max().item(), dout.abs().max().item()) / (1 - p)
    for a, s, e in zip(actual, same, exact, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, s, e, scale)


@pytest.mark.usefixtures("long", "nan_memory")
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", [[9], [6, 6], [4, 9, 7]], ids=str)
def test_long_sequences_see_neither_future_nor_slack(lengths, p):
    """Bitwise, forward and backward: what later tokens and slack rows hold changes nothing before
    them, and no gradient flows there."""
    case = (lengths, 2, 4, 2, 16)
    qkv, dout, layout = make(case, dtype=torch.float32)
    dropout = drawn(layout, 4, p) if p else None
    first, used = layout.first.tolist(), sum(lengths)
    half = [first[b] + length // 2 for b, length in enumerate(lengths)]
    past = [r for b in range(len(lengths)) for r in range(first[b], half[b])]
    future = sorted({*range(used)} - {*past})
    dout[future] = 0
    before = run(TORCH.attention, qkv, dout, layout, 4, causal=True, dropout=dropout)
    qkv[future] = 7 - qkv[future]
    qkv[used:] = dout[used:] = torch.nan
    after = run(TORCH.attention, qkv, dout, layout, 4, causal=True, dropout=dropout)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[past], b[past])
        assert not b[used:].any()
    assert not torch.equal(before[0][future], after[0][future])
    assert not after[1][future].any()
    again = run(TORCH.attention, qkv, dout, layout, 4, causal=True, dropout=dropout)
    for a, b in zip(after, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["", "dropout"])
def test_of_long_sequences_no_scores_are_kept(p):
    """What backward reads is a few times as large as what came in, not length times as large."""
    qkv, _, layout = make(([600], 0, 2, 2, 16), dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        leaf = qkv.requires_grad_()
        TORCH.attention(leaf, layout, 2, True, drawn(layout, 2, p) if p else None)
    assert 0 < sum(kept) <= 3 * qkv.numel()


# ---------------------------------------------------------------- slack rows


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", [[3, 5], [4, 4], [4, 2, 60], [0]], ids=str)
def test_slack_rows_are_zero_and_reach_nothing(lengths, p):
    """Their results and gradients are 0 exactly, whatever fresh memory held; NaN in their qkv
    and in their upstream gradient changes no bit elsewhere."""
    case = (lengths, 4, 4, 2, 16)
    qkv, dout, layout = make(case, dtype=torch.float32)
    used = sum(lengths)
    dropout = drawn(layout, 4, p) if p else None
    clean = run(TORCH.attention, qkv, dout, layout, 4, dropout=dropout)
    qkv[used:] = dout[used:] = torch.nan
    poisoned = run(TORCH.attention, qkv, dout, layout, 4, dropout=dropout)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[used:], torch.zeros_like(a[used:]))


@pytest.mark.usefixtures("nan_memory")
@cases
def test_every_row_is_written(case):
    """Fresh memory that holds NaN shows in no result and no gradient."""
    qkv, dout, layout = make(case, dtype=torch.float32)
    for result in run(TORCH.attention, qkv, dout, layout, case[2]):
        assert result.isfinite().all()


# ---------------------------------------------------------------- properties

heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 2)])
lengths_of = st.lists(
    st.one_of(st.integers(0, 6), st.integers(1, 60)), min_size=1, max_size=6
).filter(any)
drawn_cases = st.builds(
    lambda lengths, slack, heads, D: (lengths, slack, *heads, D),
    lengths_of,
    st.integers(0, 3),
    heads,
    st.sampled_from([16, 24]),
)
thorough = settings(max_examples=60)


@thorough
@given(drawn_cases, st.booleans(), st.sampled_from([0.0, 0.3]))
def test_any_batch_equals_the_definition(case, causal, p):
    """Lengths, heads and slack that nobody thought of."""
    actual, _, exact, _, _ = both(case, causal, p)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@thorough
@given(drawn_cases, st.booleans())
def test_a_sequence_alone_equals_itself_in_a_batch(case, causal):
    """To fp32 rounding, forward and gradient: what a text is packed with does not matter."""
    qkv, dout, layout = make(case, dtype=torch.float32)
    H = case[2]
    batch = run(TORCH.attention, qkv, dout, layout, H, causal=causal)
    start = 0
    for length in case[0]:
        rows = slice(start, start + length)
        alone = Layout.pack([length]).to(DEVICE)
        single = run(TORCH.attention, qkv[rows], dout[rows], alone, H, causal=causal)
        for a, b in zip(single, batch, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=2e-5, atol=2e-5)
        start += length


@thorough
@given(drawn_cases, st.randoms(use_true_random=False))
def test_permuting_sequences_permutes_results(case, random):
    """To fp32 rounding, since they are grouped anew."""
    qkv, dout, layout = make(case, dtype=torch.float32)
    lengths, slack, H, _, _ = case
    order = list(range(len(lengths)))
    random.shuffle(order)
    first = layout.first.tolist()
    rows = [r for b in order for r in range(first[b], first[b] + lengths[b])]
    rows += range(sum(lengths), layout.rows)
    permuted = Layout.pack([lengths[b] for b in order], sum(lengths) + slack).to(DEVICE)
    batch = run(TORCH.attention, qkv, dout, layout, H)
    again = run(TORCH.attention, qkv[rows], dout[rows], permuted, H)
    for a, b in zip(again, batch, strict=True):
        torch.testing.assert_close(a, b[rows], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lengths", [[9], [6, 6], [4, 9, 7]], ids=str)
def test_causal_token_never_sees_its_future(lengths):
    """Bitwise: other future tokens, same result; and no gradient flows to the future."""
    case = (lengths, 0, 4, 2, 16)
    qkv, dout, layout = make(case, dtype=torch.float32)
    for b, length in enumerate(lengths):
        first = layout.first[b].item()
        for t in range(length - 1):
            now, future = first + t, slice(first + t + 1, first + length)
            changed = qkv.clone()
            changed[future] = 7 - changed[future]
            a = TORCH.attention(qkv, layout, 4, causal=True)
            b_ = TORCH.attention(changed, layout, 4, causal=True)
            assert torch.equal(a[first : now + 1], b_[first : now + 1])
            assert not torch.equal(a[future], b_[future])
            only = torch.zeros_like(dout)
            only[now] = dout[now]
            _, grad = run(TORCH.attention, qkv, only, layout, 4, causal=True)
            assert torch.equal(grad[future], torch.zeros_like(grad[future]))
            assert (grad[first : now + 1, 6:] != 0).all()  # v of the past and of itself


@pytest.mark.parametrize("case", [CASES["ragged: the gather path"], ([64, 60, 50], 0, 6, 2, 32)])
def test_two_runs_are_bitwise_equal(case):
    """A run that is repeated or resumed gives the same weights."""
    qkv, dout, layout = make(case, dtype=torch.float32)
    dropout = drawn(layout, case[2], 0.1)
    first, second = (
        run(TORCH.attention, qkv, dout, layout, case[2], dropout=dropout) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("H", "Hk"), [(4, 2), (6, 2), (6, 3), (4, 1)])
@pytest.mark.parametrize("lengths", [[5, 5], [3, 6, 4]], ids=str)
def test_grouped_heads_equal_repeated_keys_and_values(H, Hk, lengths):
    """Query head h uses key head h // (H / Hk); their gradients add up."""
    case = (lengths, 1, H, Hk, 16)
    qkv, dout, layout = make(case)
    q, k, v = qkv.split([H, Hk, Hk], dim=1)
    repeated = torch.cat([q, *(x.repeat_interleave(H // Hk, 1) for x in (k, v))], 1)
    out, grad = run(TORCH.attention, qkv, dout, layout, H)
    out_full, full = run(TORCH.attention, repeated, dout, layout, H)
    torch.testing.assert_close(out, out_full)
    gq, gk, gv = full.split([H, H, H], dim=1)
    added = (g.unflatten(1, (Hk, H // Hk)).sum(2) for g in (gk, gv))
    torch.testing.assert_close(grad, torch.cat([gq, *added], 1))


def test_dropout_follows_the_token_not_the_batch():
    """The same examples packed in another order and with another: the same masks, so the same
    gradients."""
    qkv, dout, layout = make(([3, 6, 4], 0, 2, 2, 16))
    dropout = drawn(layout, 2, 0.5)
    whole = run(TORCH.attention, qkv, dout, layout, 2, dropout=dropout)
    rows = torch.tensor([9, 10, 11, 12, 0, 1, 2], device=DEVICE)  # the last, then the first
    part = Layout.pack([4, 3]).to(DEVICE)
    again = run(TORCH.attention, qkv[rows], dout[rows], part, 2, dropout=dropout.at(2, 0.5, rows))
    for a, b in zip(again, whole, strict=True):
        torch.testing.assert_close(a, b[rows])


@pytest.mark.parametrize("lengths", [[5, 5], [3, 6, 4]], ids=["view", "gather"])
def test_what_is_shared_between_layers_is_not_between_steps(lengths):
    """Two layouts and two draws of dropout in turn: each sees its own places and its own masks."""
    inputs = []
    for order, seed in ((lengths, 1), (lengths[::-1], 1), (lengths, 2)):
        qkv, dout, layout = make((order, 0, 2, 2, 16), dtype=torch.float32)
        inputs.append((qkv, dout, layout, drawn(layout, 2, 0.5, seed)))
    same = inputs[0][2]
    inputs[2] = (*inputs[2][:2], same, inputs[2][3])  # one layout, another draw
    for qkv, dout, layout, dropout in [*inputs, *inputs]:
        keep = dropout_keep(dropout, layout.max_length)
        actual = run(TORCH.attention, qkv, dout, layout, 2, dropout=dropout)
        expected = run(attention_ref, qkv, dout, layout, 2, keep=keep, p=0.5)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("shape", "n_head", "message"),
    [
        ((8, 6), 2, r"expected qkv \(8, H \+ 2 \* Hk, D\), heads .*, got \(8, 6\)"),
        ((7, 6, 4), 2, r"expected qkv \(8, H \+ 2 \* Hk, D\), heads .*, got \(7, 6, 4\)"),
        ((8, 5, 4), 2, r"expected H \+ 2 \* Hk heads, Hk dividing H = 2, got 5"),
        ((8, 2, 4), 2, r"Hk dividing H = 2, got 2"),
        ((8, 6, 4), 0, r"Hk dividing H = 0, got 6"),
        ((8, 10, 4), 4, r"Hk dividing H = 4, got 10"),
        ((8, 6, 4), 7, r"Hk dividing H = 7, got 6"),
    ],
    ids=["no D", "rows", "odd", "no keys", "no queries", "3 keys, 4 queries", "too many queries"],
)
def test_what_does_not_fit_is_named(shape, n_head, message):
    with pytest.raises(ValueError, match=message):
        TORCH.attention(torch.zeros(shape), Layout.pack([3, 5]), n_head)


def test_a_nan_stays_in_its_sequence():
    """Also where two sequences share one padded product."""
    layout = Layout.pack([3, 5])
    assert len(layout.groups) == 1
    qkv = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0))
    qkv[0] = torch.nan
    out = TORCH.attention(qkv, layout, 1)
    assert out[:3].isnan().all()
    assert not out[3:].isnan().any()
