"""kernels/layout.py: where the rows of packed sequences lie, and how they are grouped."""

from dataclasses import fields

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minift.kernels.layout import GROUP_OVERHEAD, Layout

lengths = st.lists(
    st.one_of(st.just(0), st.integers(1, 9), st.integers(1, 200)), min_size=0, max_size=12
)
slack = st.integers(0, 5)


def tensors(record) -> dict[str, torch.Tensor]:
    each = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: x for name, x in each.items() if isinstance(x, torch.Tensor)}


@given(lengths, slack)
@example([], 3)
@example([0, 0], 0)
def test_sequences_lie_end_to_end(lengths, slack):
    """Every index against a walk over the rows."""
    layout = Layout.pack(lengths, sum(lengths) + slack)
    start = 0
    assert layout.cu_seqlens[0] == 0
    for b, length in enumerate(lengths):
        assert layout.first[b] == start
        start += length
        assert layout.last[b] == start - 1
        assert layout.cu_seqlens[b + 1] == start
    assert layout.lengths == tuple(lengths)
    assert layout.rows == start + slack
    assert layout.max_length == max([0, *lengths])
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.first.dtype == layout.last.dtype == torch.int64
    assert len(layout.first) == len(layout.last) == len(lengths)


@given(lengths, slack)
@example([3, 3, 3], 0)
@example([2, 0, 5], 2)
def test_groups_partition_the_rows_of_sequences(lengths, slack):
    """Groups follow each other and hold every row but the slack, and each sequence whole."""
    layout = Layout.pack(lengths, sum(lengths) + slack)
    real = [length for length in lengths if length]
    stop = n = 0
    for group in layout.groups:
        assert group.start == stop
        members = real[n : n + group.n]
        assert group.stop - group.start == sum(members)
        assert group.length == max(members)
        stop, n = group.stop, n + group.n
    assert stop == sum(lengths)
    assert n == len(real)


@given(lengths)
@example([3, 5, 2])
def test_gather_and_scatter_are_inverse(lengths):
    """Row -> cell -> row is the identity; cell (i, j) holds row j of sequence i; the rest is 0."""
    layout = Layout.pack(lengths)
    n = 0
    real = [length for length in lengths if length]
    for group in layout.groups:
        members, n = real[n : n + group.n], n + group.n
        equal = len(set(members)) == 1
        assert [x is None for x in (group.gather, group.scatter, group.real)] == [equal] * 3
        if equal:
            continue
        rows = group.stop - group.start
        assert torch.equal(group.gather[group.scatter], torch.arange(rows))
        cells = group.gather.view(group.n, group.length)
        row = 0
        for i, length in enumerate(members):
            assert cells[i, :length].tolist() == list(range(row, row + length))
            assert group.real[i].tolist() == [1.0] * length + [0.0] * (group.length - length)
            row += length
            assert set(cells[i, length:].tolist()) <= {row - length}  # its own first row


@given(lengths)
@example([40, 60])
@example([1, 46, 47])
def test_neighbours_share_a_group_while_padding_is_cheap(lengths):
    """A group's padding costs no more than the groups it saves, and no group could take one
    sequence more: the promise that one long sequence does not pad many short ones."""
    layout = Layout.pack(lengths)
    real, n = [length for length in lengths if length], 0
    for group in layout.groups:
        members, n = real[n : n + group.n], n + group.n
        cells = group.n * group.length**2
        assert cells <= sum(m * m for m in members) + (group.n - 1) * GROUP_OVERHEAD
        if n < len(real):
            longer = (group.n + 1) * max(group.length, real[n]) ** 2
            assert longer > cells + real[n] ** 2 + GROUP_OVERHEAD


def test_equal_lengths_are_one_view():
    """However long: there is no padding to pay for."""
    (group,) = Layout.pack([128] * 7).groups
    assert (group.start, group.stop, group.n, group.length) == (0, 7 * 128, 7, 128)
    assert group.gather is group.scatter is group.real is None


def test_one_long_sequence_among_short_ones_has_its_own_group():
    layout = Layout.pack([4] * 6 + [300] + [4] * 6)
    assert [(g.n, g.length) for g in layout.groups] == [(6, 4), (1, 300), (6, 4)]


@pytest.mark.parametrize(
    ("lengths", "rows", "message"),
    [
        ([3, -1, 4], None, r"expected lengths >= 0 that fit 6 rows, got \[3, -1, 4\]"),
        ([3, 4], 6, r"expected lengths >= 0 that fit 6 rows, got \[3, 4\]"),
    ],
    ids=["negative", "rows too few"],
)
def test_lengths_that_do_not_fit_are_named(lengths, rows, message):
    with pytest.raises(ValueError, match=message):
        Layout.pack(lengths, rows)


def test_moved_to_the_device_it_is_on_nothing_changes():
    layout = Layout.pack([3, 0, 5, 90, 90], 200)
    moved = layout.to("cpu")
    pairs = [(layout, moved), *zip(layout.groups, moved.groups, strict=True)]
    for old, new in pairs:
        assert type(new) is type(old)
        for field in fields(old):
            a, b = getattr(old, field.name), getattr(new, field.name)
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
                assert a.dtype == b.dtype
            elif field.name != "groups":
                assert a == b


def test_every_tensor_moves():
    """A tensor left behind would fail only on a GPU: `meta` stands in for one."""
    layout = Layout.pack([3, 5, 90, 90], 200).to("meta")
    assert any(group.gather is not None for group in layout.groups)
    for record in (layout, *layout.groups):
        assert {x.device.type for x in tensors(record).values()} <= {"meta"}
    assert len(tensors(layout)) == 3
