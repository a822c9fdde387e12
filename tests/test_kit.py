"""tests/kit.py: what is meant to hurt kernels does."""

import pytest
import torch
from accuracy import DEVICE
from kit import POISON, ROWS, bits, empty_is_poisoned, guarded, lengths, poison, poisoned

dtypes = pytest.mark.parametrize("dtype", list(POISON), ids=str)


def test_lengths_surround_the_block():
    """One, a prime below and above, each edge and its neighbours; nothing twice, no length 0."""
    assert lengths(16) == [1, 2, 11, 15, 16, 17, 31, 32, 33, 53]
    assert lengths(1) == [1, 2, 3, 5]
    for block in (1, 2, 64, 1024):
        assert {1, 2, block, block + 1, 2 * block, 2 * block + 1} <= set(lengths(block))
        assert lengths(block) == sorted(set(lengths(block)))
        assert lengths(block)[0] == 1


def test_rows_are_few_and_awkward():
    """A program a row takes milliseconds in the interpreter. Odd, even and multiples of 16."""
    assert all(rows * columns <= 5000 for rows, columns in ROWS)
    widths = {columns for _, columns in ROWS}
    assert {1, 2, 127, 128, 129, 1023, 1024, 1025} <= widths
    assert len(set(ROWS)) == len(ROWS)


@dtypes
def test_poison_is_nan_or_stands_out(dtype):
    """Bits that arithmetic on NaN does not leave: torch's own NaN has others."""
    tensor = poison(torch.zeros(4, dtype=dtype, device=DEVICE))
    if dtype.is_floating_point:
        assert tensor.isnan().all()
        assert (bits(tensor) != bits(torch.full_like(tensor, float("nan")))).all()
    else:
        assert (tensor != 0).all()
        assert (bits(tensor) == POISON[dtype]).all()


def fresh(dtype=torch.float32):
    x = torch.zeros(3, 2, dtype=dtype, device=DEVICE)
    return [
        torch.empty(3, 2, dtype=dtype, device=DEVICE),
        torch.empty((3, 2), dtype=dtype, device=DEVICE),
        torch.empty_like(x),
        torch.empty_strided((3, 2), (2, 1), dtype=dtype, device=DEVICE),
        x.new_empty(3, 2),
        x.new_empty_strided((3, 2), (2, 1)),
    ]


@dtypes
def test_fresh_memory_is_poisoned_in_the_block(dtype):
    """Each way to get memory without writing it; dtype and shape stay."""
    with empty_is_poisoned():
        tensors = fresh(dtype)
    for tensor in tensors:
        assert (tensor.shape, tensor.dtype) == ((3, 2), dtype)
        assert (bits(tensor) == POISON[dtype]).all()


def test_the_block_ends_and_leaves_torch_as_it_was():
    names = "empty", "empty_like", "empty_strided"
    before = [getattr(torch, name) for name in names]
    with pytest.raises(RuntimeError), empty_is_poisoned():
        torch.empty(-1)
    assert [getattr(torch, name) for name in names] == before


def test_parameters_and_indices_are_poisoned_too():
    """requires_grad does not stop it, and a dtype without poison is left alone."""
    with empty_is_poisoned():
        assert torch.empty(2, requires_grad=True).isnan().all()
        assert torch.empty(2, dtype=torch.complex64).shape == (2,)
        assert torch.empty(0).shape == (0,)


@dtypes
@pytest.mark.parametrize(("offset", "slack"), [(0, 0), (1, 0), (0, 3), (3, 5)])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 4), (0, 4), (2, 0)])
def test_a_guarded_tensor_is_the_same_numbers(shape, offset, slack, dtype):
    """Elsewhere in memory: off a multiple of 16 bytes by `offset`, rows `slack` apart, and all
    around it poison."""
    x = (torch.arange(24, device=DEVICE)[: max(1, torch.Size(shape).numel())]).to(dtype)
    x = x[: torch.Size(shape).numel()].reshape(shape)
    guard = guarded(x, offset, slack)
    assert torch.equal(guard.tensor, x)
    assert guard.tensor.data_ptr() % 16 == offset * x.element_size() % 16 or not x.numel()
    assert int((~guard.outside()).sum()) == x.numel()
    assert (bits(guard.memory)[guard.outside()] == POISON[dtype]).all()
    if x.ndim >= 2 and x.numel():
        assert guard.tensor.stride(-2) == x.shape[-1] + slack
    guard.assert_untouched()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("at", [-1, 3, 9])
def test_a_write_outside_is_found(at, dtype):
    """Before, between rows, and after; NaN itself included."""
    guard = guarded(torch.zeros(2, 3, dtype=dtype, device=DEVICE), offset=1, slack=3)
    guard.memory[guard.tensor.storage_offset() + at] = (
        float("nan") if dtype.is_floating_point else 0
    )
    with pytest.raises(AssertionError, match=rf"1 elements written outside: \[{at}\] from"):
        guard.assert_untouched()


def test_writes_inside_are_no_matter():
    guard = guarded(torch.zeros(2, 3, device=DEVICE), slack=1)
    guard.tensor.fill_(7)
    guard.assert_untouched()
    guard.assert_written()


def test_an_unwritten_output_is_found():
    """Element by element, a NaN that was computed being written."""
    guard = poisoned(2, 3, dtype=torch.float16, slack=2)
    guard.tensor[0] = float("nan")
    guard.tensor[1, :2] = 0
    guard.assert_untouched()
    with pytest.raises(AssertionError, match=r"1 elements not written: \[\[1, 2\]\]"):
        guard.assert_written()
