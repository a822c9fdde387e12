"""What hurts a kernel: awkward shapes, storage that is not its own, memory that nobody wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from accuracy import DEVICE
from torch import Tensor

# ---------------------------------------------------------------------------- shapes

# (rows, columns) for kernels that work row by row: one, primes, powers of two and their
# neighbours, the widths of real models. Few elements: the interpreter is slow.
ROWS = [
    *((1, 1), (2, 1), (1, 2), (3, 5), (7, 16), (5, 31), (4, 127), (3, 128), (2, 129)),
    *((17, 64), (33, 48), (2, 768), (3, 1000), (1, 1023), (2, 1024), (1, 1025), (1, 4099)),
]


def lengths(block: int) -> list[int]:
    """Lengths of vectors for a kernel that takes `block` elements at a time."""
    near = {1, 2, block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1}
    return sorted((near | {_prime(block // 2), _prime(3 * block)}) - {0})


def _prime(above: int) -> int:
    """The next prime."""
    return next(n for n in range(above + 1, 2 * above + 3) if all(n % d for d in range(2, n)))


# ---------------------------------------------------------------------------- poison

# Bits that no computation leaves: a NaN with a payload, an unlikely integer. True is likely.
POISON = {
    torch.float64: 0x7FF8_0000_0000_0A5A,
    torch.float32: 0x7FC0_0A5A,
    torch.float16: 0x7E5A,
    torch.bfloat16: 0x7FDA,
    torch.int64: -0x5A5A_5A5A_5A5A_5A5A,
    torch.int32: -0x5A5A_5A5A,
    torch.int16: -0x5A5A,
    torch.int8: -0x5A,
    torch.uint8: 0x5A,
    torch.bool: 1,
}
AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: NaNs are compared by them."""
    if tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        return tensor
    return tensor.view(AS_BITS[tensor.element_size()])


def poison(tensor: Tensor) -> Tensor:
    """Fill a tensor in place: NaN, or an integer that stands out."""
    if tensor.dtype in POISON:  # an index of a dtype unknown here stays as it is
        bits(tensor.detach()).fill_(POISON[tensor.dtype])
    return tensor


@contextmanager
def empty_is_poisoned() -> Iterator[None]:
    """In the block, memory fresh from torch.empty and its kin is NaN (integers: a sentinel).

    On a CPU such memory is often zero, so an output that a kernel leaves unwritten looks right.
    """

    def poisoned_result(original):
        return lambda *args, **kwargs: poison(original(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, poisoned_result(getattr(owner, name)))
        yield


# ---------------------------------------------------------------------------- guards

MARGIN = 64  # elements on either side: no alignment is lost


@dataclass(frozen=True)
class Guarded:
    """A tensor in the middle of memory that is not its own."""

    tensor: Tensor
    memory: Tensor  # poison but for the elements of `tensor`

    def outside(self) -> Tensor:
        """Which elements of `memory` are not the tensor's."""
        outside = torch.ones(len(self.memory), dtype=torch.bool, device=self.memory.device)
        at = self.tensor.storage_offset() - self.memory.storage_offset()
        outside.as_strided(self.tensor.shape, self.tensor.stride(), at).fill_(False)
        return outside

    def assert_untouched(self) -> None:
        """Raises AssertionError when something was written beside the tensor."""
        touched = (bits(self.memory) != POISON[self.memory.dtype]) & self.outside()
        at = (touched.nonzero()[:, 0] - self.tensor.storage_offset()).tolist()
        assert not at, f"{len(at)} elements written outside: {at[:8]} from the first element"

    def assert_written(self) -> None:
        """Raises AssertionError when an element of the tensor was left as it came."""
        left = (bits(self.tensor) == POISON[self.tensor.dtype]).nonzero().tolist()
        assert not left, f"{len(left)} elements not written: {left[:8]}"


def poisoned(*shape: int, dtype=torch.float32, offset=0, slack=0, device=DEVICE) -> Guarded:
    """An output for a kernel: itself and all around it poison.

    Args:
        offset: elements by which its first one is off a multiple of 16 bytes.
        slack: elements between its rows, poison too.
    """
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        row = slack if axis == len(shape) - 2 else 0
        strides[axis] = strides[axis + 1] * shape[axis + 1] + row
    span = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    size = MARGIN + offset + (span if all(shape) else 0) + MARGIN
    memory = poison(torch.zeros(size, dtype=dtype, device=device))
    assert memory.data_ptr() % 16 == 0
    return Guarded(memory.as_strided(shape, strides, MARGIN + offset), memory)


def guarded(tensor: Tensor, offset: int = 0, slack: int = 0) -> Guarded:
    """An input for a kernel: the same numbers, all around them poison. See `poisoned`."""
    guard = poisoned(
        *tensor.shape, dtype=tensor.dtype, offset=offset, slack=slack, device=tensor.device
    )
    guard.tensor.copy_(tensor.detach())
    return guard
