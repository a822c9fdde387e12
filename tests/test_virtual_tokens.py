"""Virtual tokens among the rows of a batch: where they go, that both directions are right, and what
names them."""

import pytest
import torch
from accuracy import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from minift.batch import Example, collate
from minift.kernels.layout import Layout
from minift.kernels.virtual_tokens import Virtual, key_of, put_virtual, put_virtual_ref

lengths_of = st.lists(st.integers(0, 9), min_size=0, max_size=6)


def packed(lengths, slack, P, **options) -> tuple[Layout, Virtual]:
    layout = Layout.pack(lengths, sum(lengths) + slack)
    return layout, Virtual.pack(layout, P, **options)


@given(lengths_of, st.integers(0, 20), st.integers(1, 7), st.booleans())
def test_rows_go_where_the_definition_puts_them(lengths, slack, P, keys_only):
    """Empty sequences have virtual rows too; slack rows stay behind all; rows beyond those of the
    definition are no sequence's."""
    layout, where = packed(lengths, slack, P, keys_only=keys_only)
    T, B = layout.rows, len(lengths)
    x = torch.arange(2.0 * T).view(T, 2)
    virtual = -1 - torch.arange(2.0 * P).view(P, 2)
    wanted = put_virtual_ref(x, virtual, tuple(lengths))
    if T + B == 0:
        return
    found = put_virtual(x, virtual, where)
    assert torch.equal(found[: len(wanted)], wanted)
    assert len(found) == len(where.source) == -(-len(wanted) // 16) * 16
    assert torch.equal(found[where.place], x)
    assert torch.equal(found[where.rows], virtual.repeat(B, 1))
    wide = where.layout
    longer = tuple(n + P for n in lengths)
    assert (wide.lengths, wide.key_lengths) == (tuple(lengths) if keys_only else longer, longer)
    assert (wide.rows, wide.key_rows) == (T if keys_only else len(found), len(found))


@given(lengths_of.filter(len), st.integers(0, 5), st.integers(1, 4))
def test_gradients_are_the_definitions(lengths, slack, P):
    """In fp64; of the virtual rows it is a sum over sequences, empty ones too."""
    layout, where = packed(lengths, slack, P)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grads = []
    x, virtual = random(layout.rows, 3), random(P, 3)
    upstream = random(layout.rows + P * len(lengths), 3)
    for put in (
        lambda x, v: put_virtual(x, v, where)[: len(upstream)],
        lambda x, v: put_virtual_ref(x, v, layout.lengths),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, virtual)]
        put(*leaves).backward(upstream)
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_by_differences():
    """But of the rows that fill up the last 16: they are nobody's."""
    layout, where = packed((3, 0, 2), 2, 2)
    size = layout.rows + 3 * 2
    generator, shapes = torch.Generator().manual_seed(0), ((layout.rows, 2), (2, 2))
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    x, virtual = (t.requires_grad_() for t in drawn)
    assert torch.autograd.gradcheck(lambda *both: put_virtual(*both, where)[:size], (x, virtual))


def test_what_needs_no_gradient_has_none():
    _, where = packed((3, 2), 0, 2)
    x, virtual = torch.zeros(5, 4), torch.zeros(2, 4, requires_grad=True)
    put_virtual(x, virtual, where).sum().backward()
    assert x.grad is None
    assert torch.equal(virtual.grad, torch.full((2, 4), 2.0))


@pytest.mark.parametrize(
    ("x", "virtual"), [((4, 2), (2, 2)), ((5, 2), (3, 2)), ((5, 2), (2, 3)), ((5, 2), (2,))]
)
def test_what_does_not_fit_is_refused(x, virtual):
    _, where = packed((3, 2), 0, 2)
    with pytest.raises(ValueError, match=r"expected \(5, C\) and \(2, C\), got"):
        put_virtual(torch.zeros(x), torch.zeros(virtual), where)


# ----------------------------------------------------------------------- buckets


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.integers(1, 80),
    st.booleans(),
)
def test_shapes_of_a_bucket_depend_on_rows_and_sequences_alone(a, b, P, keys_only):
    """A captured step reads them all where those of another batch lay."""
    found = []
    for lengths in (a, b):
        layout = Layout.pack(lengths, 512, bucket=(8, 64))
        where = Virtual.pack(layout, P, keys_only, bucket=True)
        wide = where.layout
        tensors = (where.source, where.place, where.rows, wide.first, wide.last)
        tensors += (wide.cu_seqlens, wide.short, wide.long, wide.long_keys)
        facts = wide.rows, wide.key_rows, wide.longest, len(wide.lengths), where.count
        found.append((facts, [t.shape for t in tensors]))
    assert found[0] == found[1]


@pytest.mark.parametrize("keys_only", [False, True])
def test_training_batches_of_a_shape_have_virtual_tokens_of_a_shape(keys_only):
    """And a batch is moved as one piece of memory with them."""
    batches = []
    for lengths in ((3, 9, 5), (5, 6, 7)):
        examples = [Example([2] * n, (), 0) for n in lengths]
        batches.append(collate(examples, range(3), 0, True, 4, (5, keys_only)))
    assert batches[0].shape == batches[1].shape
    assert len(batches[0].memory) == len(batches[1].memory)
    a, b = batches
    moved = b.within(b.memory.clone())
    for name in ("source", "place", "rows"):
        x = getattr(moved.virtual, name)
        assert torch.equal(x, getattr(b.virtual, name))
        assert x.data_ptr() != getattr(b.virtual, name).data_ptr()
    assert torch.equal(moved.virtual.layout.short, b.virtual.layout.short)
    assert moved.virtual.layout.lengths == b.virtual.layout.lengths
    other = collate([Example([2] * 6, (), 0)] * 3, range(3), 0, True, 4, None)
    assert other.shape != a.shape


def test_shapes_tell_apart_batches_whose_tensors_differ():
    """Outside a bucket: of a prefix's lists the one by keys alone may be another."""
    a, b = (
        collate([Example([2] * n, (), 0) for n in lengths], range(3), virtual=(120, True))
        for lengths in ((8, 8, 12), (4, 12, 12))
    )
    assert a.virtual.layout.long.shape == b.virtual.layout.long.shape
    assert a.virtual.layout.long_keys.shape != b.virtual.layout.long_keys.shape
    assert a.shape != b.shape


# -------------------------------------------------------------------------- keys


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_every_row_of_a_step_has_a_key_of_its_own(documents, P):
    """Virtual rows too, of each of several documents of an example; and real ones keep theirs."""
    examples = [Example([2] * sum(each), (), 0, lengths=tuple(each)) for each in documents]
    batch = collate(examples, range(len(examples)), first=3)
    where = Virtual.pack(batch.layout, P)
    keys = key_of(batch.key, where, batch.layout)
    assert torch.equal(keys[where.place], batch.key)
    real = sum(batch.layout.lengths)
    named = torch.cat([keys[where.place[:real]], keys[where.rows]])
    assert len(named.unique()) == len(named)
    assert torch.equal(named >> 32, (named >> 32).clamp(3, 2 + len(examples)))  # the example's own


def test_a_virtual_rows_key_depends_on_its_own_sequence_alone():
    """So its mask is the same in any batch."""
    examples = [Example([2] * n, (), 0) for n in (4, 7, 3)]
    whole = collate(examples, range(3))
    where = Virtual.pack(whole.layout, 5)
    keys = key_of(whole.key, where, whole.layout)[where.rows].view(3, 5)
    for i in range(3):
        alone = collate(examples, [i], first=i)
        there = Virtual.pack(alone.layout, 5)
        own = key_of(alone.key, there, alone.layout)[there.rows]
        assert torch.equal(keys[whole.rows.index(i)], own)


def test_a_batch_of_empty_sequences_has_virtual_rows_alone():
    """As a prompt of one token is read, whose last token the next step takes."""
    layout, where = packed((0, 0), 0, 3)
    keys = key_of(torch.zeros(0, dtype=torch.int64), where, layout)
    assert len(keys) == len(where.source) == 16
    virtual = torch.ones(3, 2)
    assert torch.equal(put_virtual(torch.zeros(0, 2), virtual, where)[:6], torch.ones(6, 2))


def test_to_moves_all_of_it():
    _, where = packed((3, 2), 1, 2)
    moved = where.to(DEVICE)
    assert moved.count == 2
    assert {t.device.type for t in (moved.source, moved.place, moved.rows)} == {DEVICE}
    assert moved.layout.cu_seqlens.device.type == DEVICE
