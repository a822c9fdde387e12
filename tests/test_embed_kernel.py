"""kernels/embed.py and embed_backward.py: the kernels against the definition."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import empty_is_poisoned, guarded
from launches import compilations, launches_are_declared, recorded

from minift.batch import Example, collate
from minift.bert import BertClassifier
from minift.config import ModelConfig
from minift.kernels import embed as module
from minift.kernels import embed_backward as backward_module
from minift.kernels import embed_order as order_module
from minift.kernels.dropout import dropout_keep
from minift.kernels.embed import embed, embed_ref
from minift.kernels.embed_backward import _tables
from minift.kernels.embed_order import EmbedOrder
from minift.layers import init_weights
from minift.ops import TORCH, TRITON, Draw, Norm

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
EPS = 1e-12
ROWS = (50, 12, 2, 1)  # words, positions, types, and a table of one row
PIECE = 12  # rows, for so small batches


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """More than one load of rows each, and segments of more pieces than are loaded at once."""
    for owner in (order_module, backward_module):
        monkeypatch.setattr(owner, "PIECE", PIECE)
    monkeypatch.setitem(backward_module.SEGMENTS, "BLOCK_R", 2)


def make(T, C, K, normed=True, dtype=FP32, offset=0):
    """ids, tables, weight and bias of the norm, in memory full of NaN; upstream gradient."""
    g = torch.Generator().manual_seed(T + C)
    ids = [guarded(torch.randint(rows, (T,), generator=g), offset % 2) for rows in ROWS[:K]]
    tables = [guarded(torch.randn(rows, C, generator=g), offset) for rows in ROWS[:K]]
    params = [guarded(torch.randn(C, generator=g) + 1, offset) for _ in range(2 * normed)]
    dy = guarded(torch.randn(T, C, generator=g).to(dtype), offset, slack=offset)
    lists = [[x.tensor.to(DEVICE) for x in xs] for xs in (ids, tables, params)]
    return tuple(lists[0]), *lists[1:], dy.tensor.to(DEVICE)


def run(fn, ids, tables, params, dy, dtype, **options):
    """y and the gradient of every table and of the norm."""
    leaves = [x.detach().requires_grad_() for x in (*tables, *params)]
    K = len(tables)
    norm = Norm(*leaves[K:], EPS) if params else None
    y = fn(ids, tuple(leaves[:K]), norm, dtype, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def ours(ids, *args, **options):
    with empty_is_poisoned():
        return run(embed, ids, *args, order=EmbedOrder.sort(ids).to(DEVICE), **options)


def drawn(T, C, p=0.3):
    draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    dropout = TRITON.draw_dropout(draw, torch.arange(T, device=DEVICE), C + 3, 3, 1).at(1, p)
    return dropout, dropout_keep(dropout, C)[:, 0]


def check(ids, tables, params, dy, p=0.0):
    """y and all gradients, against the definition in the same dtype and in fp64."""
    T, C = dy.shape
    dropout, keep = drawn(T, C, p) if p else (None, None)
    actual = ours(ids, tables, params, dy, dy.dtype, dropout=dropout)
    same_dtype = run(embed_ref, ids, tables, params, dy, dy.dtype, keep=keep, p=p)
    wide = [[x.double() for x in xs] for xs in (tables, params)]
    exact = run(embed_ref, ids, *wide, dy, torch.float64, keep=keep, p=p)
    assert len(actual) == 1 + len(tables) + len(params)
    # Rows of the gradient are differences, of terms of this size.
    s = sum(table[i].double() for i, table in zip(ids, tables, strict=True))
    centred = s - s.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + EPS).rsqrt() if params else 1.0
    sizes = [dy.double() * rstd, *exact]
    scale = max([1.0, *(x.abs().max().item() for x in sizes if x.numel())])
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert a.dtype == s.dtype
        assert_as_accurate(a, s, e, scale)
    return actual


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_every_number_of_tables(K, normed, p):
    """Ids repeat, and of the last table all are the same; inputs lie among NaN."""
    dtype = DTYPES[(K + normed) % 3]
    check(*make(PIECE + 1, 40, K, normed, dtype), p)


@dtypes
@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
def test_every_dtype_and_odd_storage(dtype, normed):
    """Nothing starts at a multiple of 16 bytes, and rows of dy have a gap between them."""
    check(*make(9, 37, 3, normed, dtype, offset=1), 0.3)


@pytest.mark.parametrize("C", [1, 2, 3, 31, 32, 33, 128, 257, 384, 768, 1025, 8192])
def test_every_width(C):
    """Up to a warp's columns and past them; powers of two and others."""
    check(*make(2, C, 1 if C > 512 else 2, dtype=BF16), 0.1)


@pytest.mark.parametrize("table_dtype", [BF16, FP16])
def test_tables_of_two_bytes(table_dtype):
    """Their gradient is added up in fp32 and rounded once. Whole numbers: a sum of fp32 is exact,
    whatever its order is, one that was rounded on its way is another."""
    ids, tables, params, dy = make(20, 24, 2)
    tables, dy = [x.to(table_dtype) for x in tables], (1000 * dy).round()
    _, *grads = ours(ids, tables, [], dy, FP32)
    assert [x.dtype for x in grads] == [table_dtype] * 2
    for i, table, grad in zip(ids, tables, grads, strict=True):
        expected = torch.zeros(table.shape, device=DEVICE).index_add_(0, i, dy)
        assert torch.equal(grad, expected.to(table_dtype))
    narrow, wide = (ours(ids, xs, params, dy, FP32) for xs in (tables, [x.float() for x in tables]))
    assert [x.dtype for x in narrow[1:]] == [table_dtype] * 2 + [FP32] * 2
    unit = torch.finfo(table_dtype).eps
    for actual, expected in zip(narrow, wide, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(actual.float(), expected, rtol=unit, atol=unit * size)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows):
    """None at all: empty, and gradients of 0."""
    found = check(*make(rows, 12, 3))
    assert rows or not any(x.any() for x in found[1:])


LENGTHS = (PIECE - 1, 2 * PIECE + 1, PIECE, 1, PIECE + 1, 2 * PIECE)


@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
def test_segments_of_every_length(normed):
    """Below, at and above a piece and two; their rows lie all over the batch. Of the other table
    all rows have one id, its last."""
    T, C = sum(LENGTHS), 12
    tables, params, dy = (make(T, C, 2, normed))[1:]
    words = torch.repeat_interleave(torch.arange(len(LENGTHS)) * 9, torch.tensor(LENGTHS))
    words = words[torch.randperm(T, generator=torch.Generator().manual_seed(0))].to(DEVICE)
    _, dwords, dlast, *_ = check((words, torch.full_like(words, 11)), tables, params, dy)
    used = torch.zeros(50, dtype=torch.bool, device=DEVICE)
    used[words] = True
    assert (dwords != 0).any(1).equal(used)
    assert not dwords[~used].any()
    assert not dlast[:11].any()


def test_all_ids_are_different():
    """A piece a row, the first and the last of the table among them."""
    tables, params, dy = make(50, 12, 1)[1:]
    ids = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check((ids,), tables, params, dy)


@settings(max_examples=5)
@given(st.data())
def test_gradients_are_sums_to_the_bit(data):
    """Of whole numbers, which fp32 adds up exactly, whatever the ids are."""
    T, C = data.draw(st.integers(0, 2 * PIECE)), data.draw(st.sampled_from([1, 5, 300]))
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    g = torch.Generator().manual_seed(T)
    ids = tuple(torch.randint(rows, (T,), generator=g).to(DEVICE) for rows in sizes)
    tables = [torch.zeros(rows, C, device=DEVICE) for rows in sizes]
    dy = torch.randint(-99, 99, (T, C), generator=g).float().to(DEVICE)
    _, *grads = ours(ids, tables, [], dy, FP32)
    for i, table, grad in zip(ids, tables, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(table).index_add_(0, i, dy))


def test_gradients_lie_side_by_side_and_nothing_between_is_written():
    """An odd number of elements each: the next begins at a multiple of 16 bytes all the same. And
    autograd takes them as they are: a copy of them would cost as much as the rest."""
    ids, tables, params, dy = make(30, 5, 3)
    leaves = [x.detach().requires_grad_() for x in tables]
    embed(ids, tuple(leaves), Norm(*params, EPS), FP32).backward(dy)
    grads = [leaf.grad for leaf in leaves]
    memory = torch.empty(0, device=DEVICE).set_(grads[0].untyped_storage())
    assert all(grad.data_ptr() % 16 == 0 for grad in grads)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
    assert memory.count_nonzero() == sum(grad.count_nonzero() for grad in grads)


# ---------------------------------------------------------------- dropout


@dtypes
def test_what_is_dropped_is_what_dropout_says(dtype):
    """To the bit, forward and backward; one token an id, so that a gradient is its element's."""
    T, C, p = 12, 72, 0.4
    dropout, keep = drawn(T, C, p)
    ids = (torch.arange(T, device=DEVICE).flip(0),)
    dy = torch.rand(T, C, device=DEVICE) + 1
    y, grad = ours(ids, [torch.ones(T, C, device=DEVICE)], [], dy, dtype, dropout=dropout)
    assert torch.equal(y != 0, keep)
    assert torch.equal(grad.flip(0) != 0, keep)
    params = [torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)]
    table = torch.ones(T, C, device=DEVICE)
    y, _, _, dbias = ours(ids, [table], params, dy, dtype, dropout=dropout)
    assert torch.equal(y != 0, keep)
    torch.testing.assert_close(dbias, (dy.to(dtype).float() * keep).sum(0) / (1 - p))


def test_dropout_of_nothing_and_of_almost_all():
    """p = 0 is no dropout at all; p near 1 keeps few."""
    inputs = make(11, 24, 2)
    zero = replace(drawn(11, 24)[0], p=0.0)
    for a, b in zip(ours(*inputs, FP32, dropout=zero), ours(*inputs, FP32), strict=True):
        assert torch.equal(a, b)
    check(*inputs, p=0.99)


# ---------------------------------------------------------------- hard ids


@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("bad", [-1, 50, 2**31 + 3, 2**32 + 7, -(2**63)])
def test_an_id_out_of_range_is_nan_and_has_no_gradient(bad, normed):
    """Its row is NaN, other rows are what they were. Its table is not written for it; the other
    tables are."""
    T, row = 9, 4
    ids, tables, params, dy = make(T, 40, 2, normed)
    ids[0][row] = 49  # nobody else has it
    ids[0][:row] %= 49
    ids[0][row + 1 :] %= 49
    clean, dclean, *_ = ours(ids, tables, params, dy, FP32)
    ids[0][row] = bad
    y, dwords, dpositions, *_ = ours(ids, tables, params, dy, FP32)
    others = torch.arange(T, device=DEVICE) != row
    assert y[row].isnan().all()
    assert torch.equal(y[others], clean[others])
    assert not dwords[49].any()
    assert torch.equal(dwords[:49], dclean[:49])
    assert dpositions[ids[1][row]].isnan().all() == normed


def test_bad_ids_of_several_kinds_share_no_row():
    """Many of them, a long segment of their own: nothing is written for it."""
    ids, tables, _, dy = make(3 * PIECE, 12, 1, False)
    ids[0][::2] = -7
    ids[0][1::4] = 2**40
    _, grad = ours(ids, tables, [], dy, FP32)
    good = (ids[0] >= 0) & (ids[0] < 50)
    expected = torch.zeros(50, 12, device=DEVICE).index_add_(0, ids[0][good], dy[good])
    torch.testing.assert_close(grad, expected)


def test_tables_beyond_two_thousand_million_elements():
    """Offsets are 64 bits wide: the last row begins at 2**31 elements."""
    rows, C = 2**28 + 1, 8
    table = torch.empty(rows, C, dtype=BF16, device=DEVICE)  # 4 GiB, untouched but for two rows
    table[0], table[-1] = 1.0, torch.arange(C)
    ids = (torch.tensor([rows - 1, 0, rows - 1], device=DEVICE),)
    y = embed(ids, (table,), None, FP32)
    assert torch.equal(y, table[ids[0]].float())
    dy = torch.randn(3, C, device=DEVICE)
    _tables(dy, ids, [table], None, EmbedOrder.sort(ids).to(DEVICE))
    assert torch.equal(table[-1], (dy[0] + dy[2]).to(BF16))
    assert torch.equal(table[0], dy[1].to(BF16))


def test_gradients_beyond_two_thousand_million_elements():
    """Rows of dy that lie as far apart."""
    stride = 2**30 + 2
    dy = torch.empty(2 * stride + 8, dtype=BF16, device=DEVICE).as_strided((3, 6), (stride, 1))
    dy.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    ids, tables, params, _ = make(3, 6, 1)
    for parameters in ([], params):
        expected = ours(ids, tables, parameters, dy.clone(), BF16)
        for a, e in zip(ours(ids, tables, parameters, dy, BF16), expected, strict=True):
            assert torch.equal(a, e)


# ---------------------------------------------------------------- what the bits depend on


def test_two_runs_are_equal_to_the_bit():
    inputs, (dropout, _) = make(40, 24, 3, dtype=BF16), drawn(40, 24)
    first, second = (ours(*inputs, BF16, dropout=dropout) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_row_is_the_same_wherever_it_stands():
    """Tokens in another order: the results in that order, to the bit; so are gradients when the
    rows of an id keep theirs."""
    ids, tables, params, dy = make(40, 24, 2)
    y, *_ = ours(ids, tables, params, dy, FP32)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    moved, *_ = ours(tuple(i[order] for i in ids), tables, params, dy[order], FP32)
    assert torch.equal(moved, y[order])
    by_id = ids[0].sort(stable=True).indices
    _, grad = ours(ids[:1], tables[:1], [], dy, FP32)
    _, grad_ = ours((ids[0][by_id],), tables[:1], [], dy[by_id], FP32)
    assert torch.equal(grad, grad_)


def test_the_gradient_of_an_id_knows_nothing_of_others():
    """Other rows around its own, and other names of ids: the same bits. Its pieces are its own."""
    T, C = 2 * PIECE + 5, 8
    table, dy = torch.zeros(50, C, device=DEVICE), torch.randn(T, C, device=DEVICE)
    ids = torch.full((T,), 7, device=DEVICE)
    _, alone = ours((ids,), [table], [], dy, FP32)
    for other, name in ((3, 7), (9, 7), (9, 44)):
        mixed, dys = torch.full((2 * T,), other, device=DEVICE), torch.randn(2 * T, C)
        mixed[1::2], dys[1::2] = name, dy
        _, grad = ours((mixed,), [table], [], dys.to(DEVICE), FP32)
        assert torch.equal(grad[name], alone[7])


@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
def test_upstream_gradients_of_any_stride(normed):
    """Columns side by side, one row for all, every second id: as if they were dense."""
    ids, tables, params, dy = make(8, 12, 1, normed)
    strided = ids[0].repeat_interleave(2)[::2]
    for upstream in (dy.T.contiguous().T, dy[:1].expand(8, 12)):
        actual = ours((strided,), tables, params, upstream, FP32)
        expected = ours(ids, tables, params, upstream.clone().contiguous(), FP32)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_without_an_order_it_makes_its_own():
    inputs = make(16, 12, 2)
    for a, b in zip(run(embed, *inputs, FP32), ours(*inputs, FP32), strict=True):
        assert torch.equal(a, b)


def test_an_order_of_more_ids_is_picked_from():
    """In any order of the tables."""
    ids, tables, params, dy = make(16, 12, 3)
    order = EmbedOrder.sort(ids).to(DEVICE).pick(2, 0)
    two, tables = (ids[2], ids[0]), [tables[2], tables[0]]
    actual = run(embed, two, tables, params, dy, FP32, order=order)
    for a, b in zip(actual, ours(two, tables, params, dy, FP32), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- what is launched


def launched(T, C=24, K=3, normed=True, needed=None, seed=0, dtype=BF16, p=0.0):
    """What a forward and backward pass would launch; `needed`: the leaves that want a gradient."""
    ids, tables, params, dy = make(T, C, K, normed, dtype)
    ids = tuple(i.flip(0) if seed else i for i in ids)
    leaves = [x.detach() for x in (*tables, *params)]
    needed = [True] * len(leaves) if needed is None else needed
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(bool(need))
    norm = Norm(*leaves[K:], EPS) if normed else None
    dropout = drawn(T, C, p)[0] if p else None
    with recorded(run=False) as seen:
        order = EmbedOrder.sort(ids).to(DEVICE)
        embed(ids, tuple(leaves[:K]), norm, dtype, dropout, order).backward(dy)
    assert [leaf.grad is not None for leaf in leaves] == list(map(bool, needed))
    return seen


@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
def test_another_length_compiles_nothing(normed):
    """Once there are more rows than a piece has, the launches are the same."""
    lengths = (PIECE + 1, 2 * PIECE, 2 * PIECE + 7)
    one = launched(lengths[0], normed=normed)
    every = [x for T in lengths for x in launched(T, normed=normed)]
    assert compilations(every) == compilations(one) == len(one)
    assert {x.kernel for x in launched(1, normed=normed)} < {x.kernel for x in one}


def test_other_ids_change_no_launch():
    """A captured step can be replayed: kernels, grids and shapes depend on T alone."""
    first, second = launched(30), launched(30, seed=1)
    assert [(x, x.grid) for x in first] == [(x, x.grid) for x in second]
    assert len(first) == 1 + 4


BACKWARD = ["_rows_kernel", "_column_sums_kernel", "_pieces_kernel", "_segments_kernel"]


@pytest.mark.parametrize(
    ("needed", "kernels", "tables"),
    [
        ([1, 1, 1, 1, 1], BACKWARD, 3),
        ([1, 0, 0, 0, 1], BACKWARD, 1),
        ([0, 1, 1, 0, 0], [x for x in BACKWARD if x != "_column_sums_kernel"], 2),
        ([0, 0, 0, 1, 1], BACKWARD[:2], 0),
        ([0, 0, 0, 1, 0], BACKWARD[:2], 0),
    ],
    ids=["all", "words and bias", "no norm", "norm", "weight"],
)
def test_what_is_frozen_costs_nothing(needed, kernels, tables):
    """Neither launches nor programs; what is trained has the same gradient."""
    seen = launched(PIECE + 6, needed=needed)
    assert [x.kernel for x in seen[1:]] == kernels
    for launch in seen:
        if launch.kernel in BACKWARD[2:]:
            assert launch.grid[2] == tables
        if launch.kernel == "_rows_kernel":
            assert (launch.arguments["ds_ptr"] is None) == (not tables)
            assert (launch.arguments["partials_ptr"] is None) == (not any(needed[3:]))


def test_frozen_inputs_change_no_gradient():
    ids, tables, params, dy = make(PIECE + 6, 24, 3)
    every = ours(ids, tables, params, dy, FP32)[1:]
    for i in range(5):
        leaves = [x.detach() for x in (*tables, *params)]
        leaves[i].requires_grad_()
        y = embed(ids, tuple(leaves[:3]), Norm(*leaves[3:], EPS), FP32)
        (grad,) = torch.autograd.grad(y, leaves[i], dy)
        assert torch.equal(grad, every[i])


def test_launches_are_declared(monkeypatch):
    """So the code that `bench.codegen` judges is what runs."""
    monkeypatch.undo()
    seen = launched(order_module.PIECE + 1, 768, p=0.1) + launched(1, 768)
    seen += launched(1, 768, 2, normed=False, p=0.1)
    seen += launched(1, 768, needed=[0, 0, 0, 1, 1], p=0.1)
    seen += launched(1, 768, needed=[1, 0, 0, 0, 0], p=0.1)
    wide = [x for C in (384, 8192) for x in launched(1, C, p=0.1)]
    seen += [x for x in wide if x.kernel in ("_forward_kernel", "_rows_kernel")]
    # Not the rows kernel without dropout, nor pieces of one table: they are like others.
    seen = [x for x in seen if ("kept", None) not in x.constexprs or x.kernel != "_rows_kernel"]
    seen = [x for x in seen if ("dtable1_ptr", None) not in x.constexprs]
    for found in (module, backward_module):
        names = {launch.name for launch in found.LAUNCHES}
        assert launches_are_declared(seen, found) == names


def test_labels_are_unique():
    names = [x.name for found in (module, backward_module) for x in found.LAUNCHES]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- in a model


FAMILIES = {"bert": (2, 0), "roberta": (1, 2), "distilbert": (0, 0)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_learns_the_same_by_both_tables(family):
    """Loss and gradients with this kernel and without, of every family: positions from an offset
    on, one type though the examples know two, none."""
    n_types, offset = FAMILIES[family]
    config = ModelConfig(
        vocab_size=20, max_len=40, n_types=n_types, dim=8, n_layer=1, n_head=2, ffn_dim=16,
        activation="gelu_erf", norm_eps=1e-12,
        embedding_dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1,
        classifier_dropout=0.1, init_std=0.5, labels=("a", "b"),
        family=family, position_offset=offset,
    )  # fmt: skip
    model = BertClassifier(config)
    init_weights(model, config.init_std, seed=0)
    model = model.to(DEVICE)
    g = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(20, (n,), generator=g).tolist(), [i % 3 // 2 for i in range(n)], 0)
        for n in (30, 31, 7, 12)
    ]
    batch = collate(examples, range(4), train=True).to(DEVICE)
    draw = Draw(torch.tensor(0, device=DEVICE), torch.tensor(0, device=DEVICE))
    found = []
    for table in (TORCH, replace(TORCH, embed=TRITON.embed)):
        loss = F.cross_entropy(model(batch, table, draw=draw), batch.targets)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    assert TRITON.embed is embed


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": (torch.zeros(3).long(),)}, r"one \(T,\) index for each of 2 tables"),
        ({"ids": (torch.zeros(3).int(),) * 2}, r"int64 ids, got .*int32.*call .long"),
        ({"ids": (torch.zeros(3).long(),) * 5, "tables": (torch.zeros(2, 4),) * 5}, "1 to 4"),
        ({"tables": (torch.zeros(5, 4), torch.zeros(6, 5))}, "tables of one width"),
        ({"tables": (torch.zeros(5, 4), torch.zeros(6, 4).bfloat16())}, "of one dtype"),
        ({"tables": (torch.zeros(5, 4).double(),) * 2}, "expected fp32, fp16 or bf16"),
        ({"tables": (torch.zeros(5, 4), torch.zeros(4, 6).T)}, "expected dense tables"),
        ({"tables": (torch.zeros(5, 4), torch.zeros(0, 4))}, "with at least a row"),
        ({"tables": (torch.zeros(5, 8193),) * 2}, "1 to 8,192 columns"),
        ({"dtype": torch.float64}, "to torch.float64"),
        ({"norm": Norm(torch.zeros(5), torch.zeros(5), EPS)}, r"a norm of 4, got \(5,\)"),
        ({"norm": Norm(torch.zeros(4), torch.zeros(4, device="meta"), EPS)}, "on one GPU"),
        ({"dropout": drawn(4, 4)[0]}, r"dropout of \(rows, columns, heads\)"),
        ({"order": EmbedOrder.sort((torch.zeros(3).long(),))}, "an order of 2 x 3 ids"),
        ({"order": EmbedOrder.sort((torch.zeros(4).long(),) * 2)}, "got 2 of 4 rows"),
        ({"order": EmbedOrder.sort((torch.zeros(3).long(),) * 2).to("meta")}, "rows on meta"),
    ],
)
def test_what_does_not_fit_is_said_before_a_launch(changes, message):
    arguments = {
        "ids": (torch.zeros(3).long(),) * 2,
        "tables": (torch.zeros(5, 4), torch.zeros(6, 4)),
        "norm": Norm(torch.zeros(4), torch.zeros(4), EPS),
        "dtype": FP32,
    } | changes
    ids, tables = (tuple(x.to(DEVICE) for x in arguments.pop(name)) for name in ("ids", "tables"))
    weight, bias, *_ = arguments.pop("norm")
    norm = Norm(weight.to(DEVICE), bias if bias.is_meta else bias.to(DEVICE), EPS)
    if arguments.get("order") and not arguments["order"].words.is_meta:
        arguments["order"] = arguments["order"].to(DEVICE)
    with recorded() as seen, pytest.raises(ValueError, match=message):
        embed(ids, tables, norm, **arguments)
    assert not seen
