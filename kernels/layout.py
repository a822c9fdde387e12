"""Where sequences lie on the token axis: every index that an operation needs, made once.

Layout      B sequences are laid end to end on one axis of T rows; nothing is padded.

                rows        0 1 2 | 3 4 5 6 7 | 8 9        lengths (3, 5, 2), T = 10
                sequence    0 0 0 | 1 1 1 1 1 | 2 2        cu_seqlens (0, 3, 8, 10)

            A layout may end in slack rows that belong to no sequence (T > cu_seqlens[B]):
            operations may compute there, and attention returns zeros.

Spans       The attention kernels take their work from a list. A span is a piece of one sequence
            and all that a program must know of it, five numbers:

                first row of the piece, counted in the sequence
                begin and end of the sequence's query rows
                begin and end of its key rows

            Sequences of up to SHORT queries and keys are one span each, `short`. Longer ones are
            cut every SPAN rows: `long` lists the queries, `long_keys` the keys. The longest come
            first, so that the last programs to run are small. How a sequence is cut depends on its
            own length and on nothing beside it. Slack rows are spans too, at the end, of queries
            that see no key and of keys that no query sees: that is how they come out as zeros. An
            empty sequence has no span.
            A captured step needs lists of the same length for every batch of a bucket: `pack` pads
            them with spans of no rows to what any such batch could need.

Groups      Without a kernel that understands cu_seqlens, attention is a batched matrix product, and
            a batch wants equal lengths. Neighbours of like length share one product, padded to the
            longest of them: sort sequences by length and the padding is small. A group of equal
            lengths is a view and needs no gather.

All of it is computed on the host when a batch is put together: no operation sorts, searches for
nonzeros or waits for the device.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# What one more group costs, in scores: a group is about ten small launches. Measured on a CPU.
GROUP_OVERHEAD = 2048
SHORT = 64  # a sequence of so many queries and keys at most is one span
SPAN = 128  # rows of a span of a longer one


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
    key_lengths: tuple[int, ...]  # (B,) of its keys and values: the same, but for a cache
    cu_seqlens: Tensor            # (B + 1,) int32: b is rows cu_seqlens[b] : cu_seqlens[b + 1]
    rows: int                     # T, slack included
    key_rows: int                 # of keys and values
    first: Tensor                 # (B,) int64: first row of each sequence; some row if it has none
    last: Tensor                  # (B,) int64: last row of each sequence; likewise
    groups: tuple[Group, ...]
    short: Tensor                 # (spans, 5) int32: sequences of one span
    long: Tensor                  # (spans, 5) int32: queries of the others
    long_keys: Tensor             # (spans, 5) int32: their keys

    @staticmethod
    def pack(
        lengths: Sequence[int], rows: int | None = None, key_lengths: Sequence[int] | None = None,
        key_rows: int | None = None, bucket: tuple[int, int] | None = None,
    ) -> "Layout":
        """The layout of sequences of these lengths.

        Args:
            lengths: rows of each sequence; 0 is allowed and owns no row.
            rows: T, at least the sum of lengths, to leave slack rows at the end. Default: the sum.
            key_lengths, key_rows: the same of keys and values, where they are others.
            bucket: (sequences, longest): the shapes of all tensors, but of `groups`, are then
                those of every batch of as many rows and at most so many sequences, none longer
                than that.

        Raises:
            ValueError: a length is negative, or does not fit `rows` or the bucket.
        """
        same = key_lengths is None
        if same and key_rows is not None:
            raise ValueError("expected key_lengths with key_rows: keys are the queries otherwise")
        lengths = [operator.index(n) for n in lengths]
        key_lengths = None if same else [operator.index(n) for n in key_lengths]
        if bucket is not None:
            lengths = _filled(lengths, *bucket)
            key_lengths = None if same else _filled(key_lengths, *bucket)
        ends = _ends(lengths, rows)
        key_ends = ends if same else _ends(key_lengths, key_rows)
        if len(ends) != len(key_ends):
            counts = f"{len(key_lengths)} for {len(lengths)} sequences"
            raise ValueError(f"expected a key length for each sequence, got {counts}")
        return Layout(
            lengths=tuple(lengths),
            key_lengths=tuple(lengths if same else key_lengths),
            cu_seqlens=torch.tensor(ends[:-1], dtype=torch.int32),
            rows=ends[-1],
            key_rows=key_ends[-1],
            first=torch.tensor([min(end, max(ends[-1] - 1, 0)) for end in ends[:-2]]).long(),
            last=torch.tensor([max(end - 1, 0) for end in ends[1:-1]]).long(),
            groups=tuple(_groups([length for length in lengths if length])),
            **_spans(ends, key_ends, same, bucket),
        )

    @property
    def max_length(self) -> int:
        """Rows of the longest sequence."""
        return max(self.lengths, default=0)

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout with its tensors on `device`; copies of pinned memory do not wait."""
        return replace(_moved(self, device), groups=tuple(_moved(g, device) for g in self.groups))


def _moved(record, device):
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(record, **{n: t.to(device, non_blocking=True) for n, t in tensors.items()})


def _ends(lengths, rows):
    """Where each sequence ends, from 0 on, and T."""
    ends = [0, *accumulate(lengths)]
    rows = ends[-1] if rows is None else rows
    if min(lengths, default=0) < 0 or rows < ends[-1]:
        raise ValueError(f"expected lengths >= 0 that fit {rows} rows, got {list(lengths)}")
    return [*ends, rows]


def _filled(lengths, sequences, longest):
    """With empty sequences at the end."""
    if len(lengths) > sequences or max(lengths, default=0) > longest:
        limit = f"at most {sequences} sequences, none longer than {longest}"
        raise ValueError(f"expected {limit}, got {list(lengths)}: choose a larger bucket")
    return [*lengths, *[0] * (sequences - len(lengths))]


class _Piece(NamedTuple):
    """A sequence: its rows of queries, and of keys."""

    begin: int
    end: int
    key_begin: int
    key_end: int

    @property
    def length(self) -> int:
        return max(self.end - self.begin, self.key_end - self.key_begin)


def _spans(ends, key_ends, same, bucket):
    """The three lists of spans, as tensors."""
    pieces = map(_Piece, ends[:-2], ends[1:-1], key_ends[:-2], key_ends[1:-1])
    pieces = sorted(pieces, key=lambda piece: -piece.length)
    short = [piece for piece in pieces if piece.length <= SHORT]
    long = pieces[: len(pieces) - len(short)]
    any_long = bool(long) if bucket is None else bucket[1] > SHORT
    queries, keys = ends[-2:], key_ends[-2:]  # where the slack rows begin and end
    slack = _Piece(*queries, keys[0], keys[0]), _Piece(queries[0], queries[0], *keys)
    (long if any_long else short).extend(slack)  # where a kernel is launched anyway
    lists = {
        "short": [(0, *p) for p in short if p.length],
        # Under a causal mask the last queries see most keys, the first keys are seen by most.
        "long": [(i, *p) for p in long for i in reversed(range(0, p.end - p.begin, SPAN))],
        "long_keys": [(i, *p) for p in long for i in range(0, p.key_end - p.key_begin, SPAN)],
    }
    room = {} if bucket is None else _room(ends[-1], key_ends[-1], same, *bucket)
    for name, spans in lists.items():
        padded = spans + [(0,) * 5] * (room.get(name, 0) - len(spans))
        lists[name] = torch.tensor(padded, dtype=torch.int32).view(-1, 5)
    return lists


def _room(rows, key_rows, same, sequences, longest):
    """The most spans of each list in a bucket, counting the slack rows as a sequence: n pieces of
    N rows together have at most (N + (SPAN - 1) * n) / SPAN spans."""
    if longest <= SHORT:
        return {"short": sequences + 2}
    n = min(sequences, (rows if same else rows + key_rows) // (SHORT + 1)) + 1
    long, long_keys = ((total + (SPAN - 1) * n) // SPAN for total in (rows, key_rows))
    return {"short": sequences, "long": long, "long_keys": long_keys}


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
