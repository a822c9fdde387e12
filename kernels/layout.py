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
            lengths is a view and needs no gather. Groups are made when somebody asks for them.

All of it is computed on the host, but for groups when a batch is put together: no operation sorts,
searches for nonzeros or waits for the device.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
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
    longest: int                  # no sequence of the batch is longer, nor of its bucket
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
                than that. Empty sequences are added at the end.

        Raises:
            ValueError: a length is negative, or does not fit `rows` or the bucket.
        """
        same = key_lengths is None
        if same and key_rows is not None:
            raise ValueError("expected key_lengths with key_rows: keys are the queries otherwise")
        lengths = _filled(lengths, bucket)
        key_lengths = lengths if same else _filled(key_lengths, bucket)
        ends = _ends(lengths, rows)
        key_ends = ends if same else _ends(key_lengths, key_rows)
        if len(ends) != len(key_ends):
            counts = f"{len(key_lengths)} for {len(lengths)} sequences"
            raise ValueError(f"expected a key length for each sequence, got {counts}")
        return Layout(
            lengths=lengths,
            key_lengths=key_lengths,
            cu_seqlens=torch.from_numpy(ends[:-1].astype(np.int32)),
            rows=int(ends[-1]),
            key_rows=int(key_ends[-1]),
            first=torch.from_numpy(np.minimum(ends[:-2], max(ends[-1] - 1, 0))),
            last=torch.from_numpy(np.maximum(ends[1:-1] - 1, 0)),
            longest=bucket[1] if bucket else max(lengths, default=0),
            **_spans(ends, key_ends, same, bucket),
        )

    @property
    def max_length(self) -> int:
        """Rows of the longest sequence."""
        return max(self.lengths, default=0)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Sequences side by side, for attention as a batched product; on the device of the rest."""
        groups = _groups([length for length in self.lengths if length])
        return tuple(_moved(group, self.cu_seqlens.device) for group in groups)

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout with its tensors on `device`; copies of pinned memory do not wait."""
        return _moved(self, device)


def _moved(record, device):
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(record, **{n: t.to(device, non_blocking=True) for n, t in tensors.items()})


def _ends(lengths, rows):
    """(B + 2,) int64: where each sequence ends, from 0 on, and T."""
    ends = [0, *accumulate(lengths)]
    rows = ends[-1] if rows is None else rows
    if min(lengths, default=0) < 0 or rows < ends[-1]:
        raise ValueError(f"expected lengths >= 0 that fit {rows} rows, got {list(lengths)}")
    return np.array([*ends, rows])


def _filled(lengths, bucket):
    """As ints, and in a bucket with empty sequences at the end."""
    lengths = tuple(map(operator.index, lengths))
    sequences, longest = bucket or (len(lengths), max(lengths, default=0))
    if len(lengths) > sequences or max(lengths, default=0) > longest:
        limit = f"at most {sequences} sequences, none longer than {longest}"
        raise ValueError(f"expected {limit}, got {list(lengths)}: choose a larger bucket")
    return lengths + (0,) * (sequences - len(lengths))


def _spans(ends, key_ends, same, bucket):
    """The three lists of spans, as tensors."""
    pieces = np.array((ends[:-2], ends[1:-1], key_ends[:-2], key_ends[1:-1])).T
    length = np.maximum(pieces[:, 1] - pieces[:, 0], pieces[:, 3] - pieces[:, 2])
    pieces = pieces[(-length).argsort(kind="stable")]
    n_long = np.count_nonzero(length > SHORT)
    long, short = pieces[:n_long], pieces[n_long : np.count_nonzero(length)]
    begin, end, key_begin, key_end = *ends[-2:].tolist(), *key_ends[-2:].tolist()  # of slack rows
    slack = (begin, end, key_begin, key_begin), (begin, begin, key_begin, key_end)
    room = {} if bucket is None else _room(end, key_end, same, *bucket)
    any_long = n_long > 0 if bucket is None else bucket[1] > SHORT
    if any_long:  # where a kernel is launched anyway
        long = np.concatenate((long, slack))
    else:
        slack = [p for p in slack if p[0] < p[1] or p[2] < p[3]]
        short = np.concatenate((short, slack)) if slack else short
    # Under a causal mask the last queries see most keys, the first keys are seen by most.
    return {
        "short": _listed(short, 0, room.get("short", 0)),
        "long": _listed(*_cut(long, long[:, 1] - long[:, 0], True), room.get("long", 0)),
        "long_keys": _listed(*_cut(long, long[:, 3] - long[:, 2], False), room.get("long_keys", 0)),
    }


def _cut(pieces, rows, last_first):
    """(n, 4) pieces of `rows` cut every SPAN: each part's piece, and its first row in it."""
    if not len(pieces):
        return pieces, 0
    parts = (rows + SPAN - 1) // SPAN
    of = np.arange(len(parts)).repeat(parts)
    at = np.arange(len(of)) - (parts.cumsum() - parts)[of]
    return pieces[of], SPAN * (parts[of] - 1 - at if last_first else at)


def _listed(pieces, first, room):
    """(spans, 5) int32, with spans of no rows up to `room`."""
    n = len(pieces)
    spans = np.zeros((max(n, room), 5), np.int32)
    if n:
        spans[:n, 0], spans[:n, 1:] = first, pieces
    return torch.from_numpy(spans)


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
