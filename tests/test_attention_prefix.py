"""Attention to a prefix: both implementations against the definition, and that against rows of the
batch whose keys and values are overwritten."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate
from kit import empty_is_poisoned
from test_attention import CASES, run_kv

from minift import torch_prefix
from minift.kernels.attention import attention_ref
from minift.kernels.attention_prefix import attention_prefix, attention_prefix_ref
from minift.kernels.dropout import dropout_keep
from minift.ops import TORCH, Draw, Layout, Virtual

PREFIXES = pytest.mark.parametrize("P", [1, 5, 20])
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
causality = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def make(case, P, seed=0, dtype=torch.float64):
    """((qkv, prefix), upstream gradient, layout)"""
    lengths, slack, H, Hk, D = case
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.pack(lengths, sum(lengths) + slack).to(DEVICE)
    shapes = (layout.rows, H + 2 * Hk, D), (P, 2 * Hk, D), (layout.rows, H, D)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    *inputs, dout = (x.to(DEVICE, dtype) for x in drawn)
    return inputs, dout, layout


def drop(layout, P, H, p=0.3):
    """A dropout of the layout's rows with a column for each key."""
    key = torch.arange(layout.rows, device=DEVICE) << 7
    draw = Draw(*(torch.tensor(i, device=DEVICE) for i in (5, 2)))
    return TORCH.draw_dropout(draw, key, layout.max_length + P, 4, H).at(2, p)


@cases
@causality
@PREFIXES
def test_torch_is_the_definition(case, causal, P):
    inputs, dout, layout = make(case, P)
    H = case[2]
    with empty_is_poisoned():
        found = run_kv(TORCH.attention_prefix, inputs, dout, layout, H, causal)
    wanted = run_kv(attention_prefix_ref, inputs, dout, layout, H, causal=causal)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@causality
@pytest.mark.parametrize("long", [False, True], ids=["kept", "made again"])
def test_dropout_is_the_definitions(causal, long, monkeypatch):
    monkeypatch.setattr(torch_prefix, "LONG", 0 if long else 1000)
    case = [3, 6, 4], 2, 4, 2, 16
    inputs, dout, layout = make(case, 5)
    dropout = drop(layout, 5, 4)
    keep = dropout_keep(dropout, layout.max_length + 5)
    assert 0 < keep.float().mean() < 1
    found = run_kv(TORCH.attention_prefix, inputs, dout, layout, 4, causal, dropout)
    options = {"causal": causal, "keep": keep, "p": dropout.p}
    wanted = run_kv(attention_prefix_ref, inputs, dout, layout, 4, **options)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@causality
def test_a_prefix_is_rows_whose_keys_are_overwritten(causal):
    """Real rows at the head of each sequence, with keys and values of the prefix, are the same to
    all other rows: so it is the prefix of the paper."""
    (qkv, prefix), _, layout = make(([3, 5], 0, 2, 2, 16), 4)
    where = Virtual.pack(layout, 4).to(DEVICE)
    heads = torch.cat([torch.randn(4, 2, 16, dtype=qkv.dtype, device=DEVICE), prefix], 1)
    rows = where.gather(qkv, heads)
    wide = attention_ref(rows, where.layout, 2, causal=causal)
    found = attention_prefix_ref(qkv, prefix, layout, 2, causal=causal)
    torch.testing.assert_close(found, wide[where.place], rtol=1e-12, atol=1e-12)


# Those in which a prefix may go wrong; what a tile does is shown without one.
INTERPRETED = [
    ("ragged: the gather path", True),
    ("ragged: the gather path", False),
    ("one long among many short: several groups", True),
    ("empty sequences first, within, last", False),
    ("slack rows, ragged", True),
    ("slack rows and nothing else", False),
    ("GQA: groups of 3 query heads", True),
    ("D = 80, no power of two", False),
]


@pytest.mark.parametrize(("name", "causal"), INTERPRETED, ids=str)
def test_the_kernels_are_as_accurate_as_torch(name, causal):
    """And leave no memory unwritten."""
    case = CASES[name]
    inputs, dout, layout = make(case, 5, dtype=torch.float32)
    H = case[2]
    with empty_is_poisoned():
        found = run_kv(attention_prefix, inputs, dout, layout, H, causal)
    torchs, exact = (
        run_kv(attention_prefix_ref, [x.to(d) for x in inputs], dout, layout, H, causal=causal)
        for d in (torch.float32, torch.float64)
    )
    for a, b, c in zip(found, torchs, exact, strict=True):
        assert_as_accurate(a, b, c, scale=10.0)


def test_the_kernels_in_16_bits_are_as_accurate_as_torch():
    """fp16 and bf16; the gradient of the prefix is a sum over sequences, rounded once."""
    for dtype in (torch.float16, torch.bfloat16):
        inputs, dout, layout = make(([3, 5, 2], 1, 2, 2, 16), 3, dtype=dtype)
        found = run_kv(attention_prefix, inputs, dout, layout, 2, True)
        same = run_kv(TORCH.attention_prefix, inputs, dout, layout, 2, True)
        doubles = [x.double() for x in inputs], dout.double(), layout
        exact = run_kv(attention_prefix_ref, *doubles, 2, causal=True)
        for a, b, c in zip(found, same, exact, strict=True):
            assert a.dtype == dtype
            assert_as_accurate(a, b, c, scale=4.0)


def test_the_kernels_drop_the_same():
    case = [3, 70, 4], 3, 2, 1, 16
    inputs, dout, layout = make(case, 5, dtype=torch.float32)
    dropout = drop(layout, 5, 2)
    where = Virtual.pack(layout, 5, keys_only=True, bucket=True).to(DEVICE)
    found = run_kv(attention_prefix, inputs, dout, layout, 2, True, dropout, where)
    wanted = run_kv(TORCH.attention_prefix, inputs, dout, layout, 2, True, dropout)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 4, 8), "expected a prefix"), ((3, 2, 16), "expected a prefix"), ((3, 4), "a prefix")],
)
def test_what_does_not_fit_is_refused(shape, message):
    (qkv, _), _, layout = make(([3], 0, 2, 2, 16), 2)
    with pytest.raises(ValueError, match=message):
        TORCH.attention_prefix(qkv, torch.zeros(shape, dtype=qkv.dtype), layout, 2)
