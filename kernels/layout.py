"""Where sequences lie on the token axis: every index that an operation needs, made once.

Layout      B sequences are laid end to end on one axis of T rows; nothing is padded.

                rows        0 1 2 | 3 4 5 6 7 | 8 9        lengths (3, 5, 2), T = 10
                sequence    0 0 0 | 1 1 1 1 1 | 2 2        cu_seqlens (0, 3, 8, 10)

            A layout may end in slack rows that belong to no sequence (T > cu_seqlens[B]):
            operations may compute there, and attention returns zeros.

Groups      Without a kernel that understands cu_seqlens, attention is a batched matrix product, and
            a batch wants equal lengths. Neighbours of like length share one product, padded to the
            longest of them: sort sequences by length and the padding is small. A group of equal
            lengths is a view and needs no gather.

All of it is computed on the host when a batch is put together: no operation sorts, searches for
nonzeros or waits for the device.
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

# What one more group costs, in scores: a group is about ten small launches. Measured on a CPU.
GROUP_OVERHEAD = 2048


@dataclass(frozen=True, eq=False)
class Group:
    """n sequences on rows start : stop, seen as a padded (n, length) rectangle."""

    start: int
    stop: int
    n: int
    length: int
    gather: Tensor | None   # (n * length,) int64: row after `start` of each cell; None: no padding
    scatter: Tensor | None  # (stop - start,) int64: cell of each row
    real: Tensor | None     # (n, length) fp32: 1 on cells that hold a row, 0 on padding


@dataclass(frozen=True, eq=False)
class Layout:
    """B sequences end to end. Make one with `Layout.pack`."""

    lengths: tuple[int, ...]      # (B,) rows of each sequence, on the host
    cu_seqlens: Tensor            # (B + 1,) int32: b is rows cu_seqlens[b] : cu_seqlens[b + 1]
    rows: int                     # T, slack included
    first: Tensor                 # (B,) int64: first row of each sequence that has one
    last: Tensor                  # (B,) int64: last row of each sequence that has one
    groups: tuple[Group, ...]

    @staticmethod
    def pack(lengths: list[int], rows: int | None = None) -> "Layout":
        """The layout of sequences of these lengths.

        Args:
            lengths: rows of each sequence; 0 is allowed and owns no row.
            rows: T, at least the sum of lengths, to leave slack rows at the end. Default: the sum.

        Raises:
            ValueError: a length is negative, or `rows` is too small.
        """
        ends = [0, *accumulate(lengths)]
        rows = ends[-1] if rows is None else rows
        if min(lengths, default=0) < 0 or rows < ends[-1]:
            raise ValueError(f"expected lengths >= 0 that fit {rows} rows, got {list(lengths)}")
        return Layout(
            lengths=tuple(lengths),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32),
            rows=rows,
            first=torch.tensor(ends[:-1], dtype=torch.int64),
            last=torch.tensor([end - 1 for end in ends[1:]], dtype=torch.int64),
            groups=tuple(_groups([length for length in lengths if length])),
        )

    @property
    def max_length(self) -> int:
        """Rows of the longest sequence."""
        return max(self.lengths, default=0)

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout with its tensors on `device`; copies do not wait."""
        return replace(_moved(self, device), groups=tuple(_moved(g, device) for g in self.groups))


def _moved(record, device):
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(record, **{n: t.to(device, non_blocking=True) for n, t in tensors.items()})


def _groups(lengths):
    """Neighbours are joined while the padding costs less than another group would."""
    start = begin = 0
    while begin < len(lengths):
        end, longest, real = begin, 0, 0
        while end < len(lengths):
            next_longest = max(longest, lengths[end])
            padded = (end + 1 - begin) * next_longest**2
            alone = (end - begin) * longest**2 + lengths[end] ** 2 + GROUP_OVERHEAD
            if end > begin and padded > alone:
                break
            longest, real, end = next_longest, real + lengths[end], end + 1
        yield _group(start, lengths[begin:end], longest)
        start, begin = start + real, end


def _group(start, lengths, longest):
    n, stop = len(lengths), start + sum(lengths)
    if min(lengths) == longest:
        return Group(start, stop, n, longest, None, None, None)
    size = torch.tensor(lengths)
    real = torch.arange(longest) < size[:, None]                      # (n, length)
    scatter = real.flatten().nonzero()[:, 0]                          # cells that hold a row
    # A padded cell repeats its own sequence's first row: a NaN stays in its sequence.
    gather = (size.cumsum(0) - size).repeat_interleave(longest)
    gather[scatter] = torch.arange(stop - start)
    return Group(start, stop, n, longest, gather, scatter, real.float())
