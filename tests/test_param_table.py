"""kernels/param_table.py: owners and sizes of chunks, and which tensors may be written in place."""

import pytest
import torch
from accuracy import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from minift.kernels.param_table import (
    BLOCK,
    COLUMNS,
    FIRST,
    GRAD,
    GROUP,
    NUMEL,
    ParamTable,
    is_dense,
    like,
    same_order,
)

SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]


def table_of(sizes, groups=None):
    tensors = [torch.zeros(n, device=DEVICE) for n in sizes]
    return ParamTable(tensors, groups or [0] * len(sizes), torch.device(DEVICE))


@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=8))
def test_chunks_cover_every_element_once(sizes):
    """A chunk belongs to one tensor; a tensor's chunks follow each other; an empty one has none."""
    table = table_of(sizes)
    table.write([(0,) * 7] * len(sizes))
    owners, rows = table.owners.tolist(), table.rows.tolist()
    expected = [i for i, n in enumerate(sizes) for _ in range(0, n, BLOCK)]
    assert owners == expected
    for i, n in enumerate(sizes):
        assert rows[i][NUMEL.value] == n
        if n:
            assert rows[i][FIRST.value] == owners.index(i)


def test_addresses_stand_in_their_columns():
    """And other gradients change one column, however often."""
    table = table_of([5, 7], [1, 0])
    table.write([(1, 2, 3, 4, 5, 6, 0), (11, 12, 13, 14, 15, 16, 1)])
    assert table.rows.shape == (2, COLUMNS.value)
    assert table.rows[1, :7].tolist() == [11, 12, 13, 14, 15, 16, 1]
    assert table.rows[:, GROUP.value].tolist() == [1, 0]
    before = table.rows.tolist()
    for grads in ([20, 0], [21, 22]):
        table.write_grads(grads)
        before[0][GRAD.value], before[1][GRAD.value] = grads
        assert table.rows.tolist() == before


def test_a_capture_needs_room_made_before():
    """Pinned memory must not be taken in a capture: the message says what to call."""
    with pytest.raises(RuntimeError, match=r"prepare\(\)"):
        table_of([3]).write_captured([(0,) * 7], [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_capture_has_its_own_rows():
    table = table_of([3])
    table.reserve()
    first = table.write_captured([(1,) * 7], [])
    second = table.write_captured([(2,) * 7], [])
    assert first.data_ptr() != second.data_ptr()
    assert (first[0, 0].item(), second[0, 0].item()) == (1, 2)
    assert table.captured


def test_dense_is_every_element_once():
    """In any order; not with gaps, not twice."""
    x = torch.zeros(2, 3, 4, 5)
    dense = [
        x,
        x.permute(3, 1, 0, 2),
        x.to(memory_format=torch.channels_last),
        x[:1],
        x[0, 0, 0, 0],
    ]
    assert all(map(is_dense, [*dense, torch.zeros(0, 3), torch.zeros(1, 4).expand(1, 4)]))
    other = [
        x[:, :2],
        x[..., ::2],
        torch.zeros(1, 4).expand(3, 4),
        torch.zeros(9).as_strided((2, 2), (1, 1)),
    ]
    assert not any(map(is_dense, other))


def test_order_is_that_of_elements():
    """Strides of axes of length 1 say nothing."""
    x = torch.zeros(1, 4)
    assert same_order(x, x.as_strided((1, 4), (1, 1)))
    assert not same_order(torch.zeros(3, 4), torch.zeros(4, 3).t())


def test_like_is_the_tensor_itself_where_it_can_be():
    p = torch.arange(6.0, device=DEVICE).view(2, 3).t()
    assert like(p, p) is p
    for other in (p.contiguous(), p.bfloat16(), p.double()):
        new = like(p, other)
        assert (new.dtype, new.stride()) == (torch.float32, p.stride())
        assert torch.equal(new, p)
