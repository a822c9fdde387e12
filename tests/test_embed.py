"""kernels/embed.py: the definition against F.embedding, and TORCH.embed against it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_accurate

from minift.kernels.dropout import dropout_keep
from minift.kernels.embed import embed_ref
from minift.ops import TORCH, Draw, Norm

EPS = 1e-12
ROWS = (50, 12, 2)  # words, positions, types
T, C = 23, 24
tables_of = pytest.mark.parametrize("K", [1, 2, 3])
norms = pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])


def make(K, normed, dtype=torch.float64):
    """ids (the word 7 ten times), tables, weight and bias of the norm, upstream gradient."""
    torch.manual_seed(0)
    ids = [torch.randint(rows, (T,), device=DEVICE) for rows in ROWS[:K]]
    ids[0][::2][:10] = 7
    tables = [torch.randn(rows, C, dtype=torch.float64, device=DEVICE) for rows in ROWS[:K]]
    params = list(torch.randn(2, C, dtype=torch.float64, device=DEVICE) + 1) if normed else []
    dy = torch.randn(T, C, dtype=torch.float64, device=DEVICE)
    return tuple(ids), [x.to(dtype) for x in tables], [x.to(dtype) for x in params], dy


def run(fn, ids, tables, params, dy, dtype, **options):
    """y and the gradient of every table and of the norm."""
    tables, params = ([x.detach().requires_grad_() for x in xs] for xs in (tables, params))
    y = fn(ids, tuple(tables), Norm(*params, EPS) if params else None, dtype, **options)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(x.grad for x in tables + params)]


def drawn(p):
    draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    dropout = TORCH.draw_dropout(draw, torch.arange(T, device=DEVICE), C + 3, 3, 2).at(1, p)
    return dropout, dropout_keep(dropout, C)[:, 0]


@tables_of
@norms
def test_ref_is_the_normed_sum_of_embeddings(K, normed):
    """By torch's own embedding and layer norm, gradients included."""

    def expected(ids, tables, norm, dtype):
        s = sum(F.embedding(i, table) for i, table in zip(ids, tables, strict=True))
        return F.layer_norm(s, (C,), norm.weight, norm.bias, norm.eps) if norm else s

    inputs = make(K, normed)
    actual = run(embed_ref, *inputs, torch.float64)
    torch.testing.assert_close(actual, run(expected, *inputs, torch.float64))


@tables_of
@norms
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_fp64_equals_the_definition(K, normed, p):
    inputs = make(K, normed)
    dropout, keep = drawn(p) if p else (None, None)
    actual = run(TORCH.embed, *inputs, torch.float64, dropout=dropout)
    exact = run(embed_ref, *inputs, torch.float64, keep=keep, p=p)
    torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-12)


@tables_of
@norms
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_the_definition(K, normed, p, dtype):
    """fp32 tables, result in dtype: gradients stay fp32."""
    ids, tables, params, dy = make(K, normed, torch.float32)
    dy = dy.to(dtype)
    dropout, keep = drawn(p) if p else (None, None)
    actual = run(TORCH.embed, ids, tables, params, dy, dtype, dropout=dropout)
    assert [x.dtype for x in actual] == [dtype] + [torch.float32] * (len(actual) - 1)
    same_dtype = run(embed_ref, ids, tables, params, dy, dtype, keep=keep, p=p)
    wide = [[x.double() for x in xs] for xs in (tables, params)]
    exact = run(embed_ref, ids, *wide, dy, torch.float64, keep=keep, p=p)
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert_as_accurate(a, s, e, max(1.0, e.abs().max().item()))


@norms
def test_there_is_one_cast_at_the_end(normed):
    """The sum, the norm and dropout are fp32: bf16 is the rounded fp32 result, to the bit."""
    ids, tables, params, _ = make(3, normed, torch.float32)
    norm = Norm(*params, EPS) if normed else None
    dropout, _ = drawn(0.1)
    wide = TORCH.embed(ids, tables, norm, torch.float32, dropout)
    assert torch.equal(TORCH.embed(ids, tables, norm, torch.bfloat16, dropout), wide.bfloat16())


def test_gradient_of_a_row_adds_all_its_uses():
    """Duplicate ids: a row has the sum of the gradients of its tokens, an unused row has 0."""
    ids, tables, _, dy = make(3, False)
    _, *grads = run(TORCH.embed, ids, tables, [], dy, torch.float64)
    assert (ids[0] == 7).sum() >= 10
    for i, grad in zip(ids, grads, strict=True):
        for row, actual in enumerate(grad):
            torch.testing.assert_close(actual, dy[i == row].sum(0))
            assert (i == row).any() or torch.equal(actual, torch.zeros_like(actual))


def test_dropped_elements_have_no_gradient():
    """One token, so that the table's gradient is the element's."""
    table = torch.randn(1, C, device=DEVICE).requires_grad_()
    ids = (torch.zeros(T, dtype=torch.int64, device=DEVICE),)
    dropout, keep = drawn(0.4)
    y = TORCH.embed(ids, (table,), None, torch.float32, dropout)
    y.sum().backward()
    assert torch.equal(y != 0, keep)
    torch.testing.assert_close(table.grad[0], keep.sum(0) / 0.6)


@pytest.mark.parametrize(
    ("ids", "tables", "message"),
    [
        ([(3,)], [(5, 4), (5, 4)], r"one \(T,\) index for each of 2 tables, got \[\(3,\)\]"),
        ([(3,), (2,)], [(5, 4), (5, 4)], r"for each of 2 tables, got \[\(3,\), \(2,\)\]"),
        ([(1, 3)], [(5, 4)], r"for each of 1 tables, got \[\(1, 3\)\]"),
        ([(3,), (3,)], [(5, 4), (5, 1)], r"tables of one width, got \[\(5, 4\), \(5, 1\)\]"),
    ],
    ids=["an index missing", "lengths", "two axes", "widths that would broadcast"],
)
def test_what_does_not_fit_is_named(ids, tables, message):
    ids = tuple(torch.zeros(shape, dtype=torch.int64) for shape in ids)
    with pytest.raises(ValueError, match=message):
        TORCH.embed(ids, tuple(torch.zeros(shape) for shape in tables), None, torch.float32)
