"""kernels/embed_order.py: every row is in one piece, pieces in their segments, and nothing that a
kernel reads depends on more than it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.kernels import embed_order as module
from minift.kernels.embed_order import EmbedOrder


def read(line: torch.Tensor, T: int, piece: int):
    """(rows, pieces, segments) as the kernels take them from a line: pieces are (begin, end, is of
    a long segment, is first), segments (begin, end) by the PIECE places they begin in."""
    blocks = -(-T // piece)
    count, rows, segments, pieces = line.split([1, T, 2 * blocks, T + 1])
    words = pieces.tolist()
    found = [(w >> 2, words[i + 1] >> 2, w >> 1 & 1, w & 1) for i, w in enumerate(words[:-1])]
    assert words[count.item() :] == [4 * T] * (T + 1 - count.item())
    return rows.tolist(), found[: count.item()], segments.view(-1, 2).tolist()


def segments_of(ids: list[int]) -> list[list[int]]:
    """The rows of each id, the smallest id first."""
    return [[row for row, i in enumerate(ids) if i == one] for one in sorted(set(ids))]


def test_the_picture_of_the_header(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2)
    order = EmbedOrder.sort((torch.tensor([7, 3, 7, 7, 0, 3, 7]),))
    rows, pieces, segments = read(order.words[0], 7, 2)
    assert rows == [4, 1, 5, 0, 2, 3, 6]
    assert pieces == [(0, 1, 0, 1), (1, 3, 0, 1), (3, 5, 1, 1), (5, 7, 1, 0)]
    assert segments == [[0, 0], [3, 7], [0, 0], [0, 0]]
    assert (order.rows, order.lines, order.words.dtype) == (7, (0,), torch.int32)


ids_of = st.lists(st.sampled_from([0, 1, 2, 3, 50, 2**31 - 2]), max_size=60)


@settings(max_examples=60)
@given(ids=ids_of, piece=st.integers(1, 9))
def test_pieces_are_their_segments_cut(ids, piece):
    """Each segment is listed row by row in the batch's order and cut every PIECE rows from its own
    beginning; long ones stand in the list of segments; slots are different."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        order = EmbedOrder.sort((torch.tensor(ids, dtype=torch.int64),) * 2)
    assert torch.equal(order.words[0], order.words[1])
    rows, pieces, segments = read(order.words[1], len(ids), piece)
    expected, slots, begin = [], [], 0
    for one in segments_of(ids):
        assert rows[begin : begin + len(one)] == one
        for j, start in enumerate(range(0, len(one), piece)):
            end = begin + min(start + piece, len(one))
            expected.append((begin + start, end, int(len(one) > piece), int(j == 0)))
            if len(one) > piece:
                slots.append(2 * ((begin + start) // piece) + (j == 0))
                assert slots[-1] == 2 * (begin // piece + j) + (j == 0)
        if len(one) > piece:
            assert segments[begin // piece] == [begin, begin + len(one)]
            segments[begin // piece] = [0, 0]
        begin += len(one)
    assert pieces == expected
    assert len(set(slots)) == len(slots)
    assert max(slots, default=0) < 2 * -(-len(ids) // piece) + (not ids)
    assert not any(map(any, segments))


@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 500])
def test_sizes_depend_on_the_number_of_rows_alone(T):
    """A captured step finds the lists of every batch in the same places."""
    kinds = torch.zeros(T).long(), torch.arange(T), torch.arange(T) % 7
    shapes = {tuple(EmbedOrder.sort((ids,)).words.shape) for ids in kinds}
    assert shapes == {(1, 2 + 2 * T + 2 * -(-T // 64))}
    assert module.PIECE == 64


def test_ids_that_no_table_has_stay_apart_from_those_that_exist():
    """However many bits they have: the order of the others is what it is without them."""
    wild = [-1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1]
    order = EmbedOrder.sort((torch.tensor([5, *wild, 5, 0]),))
    rows, pieces, _ = read(order.words[0], 8, 64)
    parts = [rows[begin:end] for begin, end, *_ in pieces]
    assert parts == [[1, 4], [7], [0, 6], [2, 3, 5]]


def test_it_is_picked_from_and_moved():
    ids = torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0]), torch.tensor([2, 1, 0])
    order = EmbedOrder.sort(ids)
    assert order.pick(2, 0).lines == (2, 0)
    assert order.pick(2, 0).pick(1).lines == (0,)
    assert order.pick(1).words is order.words
    moved = order.pick(1).to("meta")
    assert moved.words.is_meta
    assert (moved.rows, moved.lines) == (3, (1,))


def test_ids_are_only_read():
    ids = torch.tensor([3, -4, 2**40])
    before = ids.clone()
    EmbedOrder.sort((ids,))
    EmbedOrder.sort(ids[None])
    assert torch.equal(ids, before)


def test_ids_may_be_the_rows_of_one_tensor():
    ids = torch.arange(400).view(2, 200) % 3
    assert torch.equal(EmbedOrder.sort(ids).words, EmbedOrder.sort(tuple(ids)).words)
