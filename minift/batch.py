"""Examples, and the packed batches they are put together to. There is no padding anywhere.

    tokens     101 2023 102 | 101 2054 1037 3185 102       (T,)  sequences end to end
    positions    0    1   2 |   0    1    2    3   4       (T,)
    layout     cu_seqlens (0, 3, 8), first (0, 3), ...     every index an operation needs
    targets         1       |          0                   (B,)  one a sequence, or (B, K), or
               101         2054 1037 3185 102              (N,)  of the tokens at rows `at`
    at              1           4    5    6   7            (N,)

All tensors of a batch lie in one piece of memory, so that one copy moves it, and training batches
of one `shape` lie there alike. A training batch has as many sequences as any other: to a short one
empty sequences are added, without a target.

Which examples form a step is a function of (seed, epoch, step), so a run that resumes needs no
random state. An example's number in its step travels in `key`, for dropout.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops import IGNORE_INDEX, EmbedOrder, Layout, Virtual


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids with their answer: one sequence, or several that share a place in a batch."""

    tokens: Sequence[int]
    types: Sequence[int]  # 0 for the first text, 1 for the second; (): all 0
    # A label's number, or one for each token, -100: none; or numbers to come near, as a float or
    # an array (K,) of float32 or uint8.
    target: int | float | Sequence[int]
    cut: bool = False  # the text was longer
    lengths: tuple[int, ...] = ()  # of its sequences; (): it is one


class VirtualTokens(NamedTuple):
    """What a model puts before every sequence."""

    count: int
    keys_only: bool  # keys and values of a prefix, that are no rows of the batch


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences packed on T rows, shortest first; slack rows at the end belong to none."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in every sequence
    types: Tensor  # (T,) int64
    key: Tensor  # (T,) int64: number of the example in its step << 32 | position
    # (B,), (N,) or (T,) int64, where there is none IGNORE_INDEX; or (B,) or (B, K) fp32, then NaN.
    targets: Tensor
    at: Tensor | None  # (N,) int64: rows of the targets; None: targets of sequences, or of all rows
    layout: Layout
    order: EmbedOrder | None  # by tokens, positions, types, and one type for all; to train
    rows: tuple[int, ...]  # of each sequence, which example of the data; of empty ones none
    memory: Tensor  # (bytes,) uint8: where all tensors lie
    virtual: Virtual | None = None  # where the model's virtual tokens stand; None: it finds out
    continues: bool = False  # its tokens follow what a cache holds, virtual ones too

    @property
    def shape(self) -> tuple[int, ...]:
        """Batches of one shape have tensors of the same sizes at the same places in `memory`."""
        layout = self.layout
        spans = map(len, (layout.short, layout.long, layout.long_keys))
        listed = -1 if self.at is None else len(self.at)
        sizes = layout.rows, len(layout.lengths), *self.targets.shape, listed, layout.longest
        where = self.virtual and self.virtual.layout
        extra = (where.short, where.long, where.long_keys) if where else ()
        return *sizes, *spans, int(self.order is not None), *map(len, extra)

    def within(self, memory: Tensor) -> "Batch":
        """The same batch with its tensors in `memory`, which holds its bytes or soon will.

        Args:
            memory: as that of a batch of the same shape, on any device.

        Raises:
            ValueError: the size is another.
        """
        if memory.dtype != torch.uint8 or memory.shape != self.memory.shape:
            expected, found = (f"{tuple(x.shape)} {x.dtype}" for x in (self.memory, memory))
            raise ValueError(f"expected memory {expected}, got {found}")
        return _within(memory, _tensors(self), self)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, by one copy; one of pinned memory does not wait."""
        memory = self.memory.to(device, non_blocking=True)
        return self if memory is self.memory else self.within(memory)

    def pinned(self) -> "Batch":
        """The same batch in pinned memory of the host; only where there is a GPU."""
        return self.within(self.memory.pin_memory())


DENSE = 0.9  # share of tokens with a target above which listing them spares nothing
WIDE = np.dtype(np.float32), np.dtype(np.uint8)  # of targets that are several numbers
OWN = "tokens", "positions", "types", "key", "targets", "at"
OF_LAYOUT = "first", "last", "cu_seqlens", "short", "long", "long_keys"
OF_VIRTUAL = "source", "place", "rows"


def _tensors(batch):
    """All that a batch is made of, in the order of its memory."""
    parts = [(batch, OWN), (batch.layout, OF_LAYOUT)]
    parts += [(batch.order, ["words"])] if batch.order else []
    if batch.virtual:
        parts += [(batch.virtual.layout, OF_LAYOUT), (batch.virtual, OF_VIRTUAL)]
    found = [getattr(of, name) for of, names in parts for name in names]
    return [x for x in found if x is not None]


def _within(memory, like, batch):
    """The batch whose tensors, of the sizes of `like`, follow each other in memory."""
    kinds = torch.int64, torch.int32, torch.float32
    flat = {str(kind).removeprefix("torch."): memory.view(kind) for kind in kinds}
    places = accumulate((_room(x) for x in like), initial=memory.storage_offset())
    views = (
        flat[str(x.dtype).removeprefix("torch.")].as_strided(
            x.shape, (*x.shape[1:], 1), at // x.itemsize
        )
        for at, x in zip(places, like, strict=False)
    )
    names = [name for name in OWN if name != "at" or batch.at is not None]
    own, of_layout = (dict(zip(part, views, strict=False)) for part in (names, OF_LAYOUT))
    order, virtual = batch.order and replace(batch.order, words=next(views)), batch.virtual
    layout = replace(batch.layout, **of_layout)
    if virtual:
        wide, rest = (dict(zip(part, views, strict=False)) for part in (OF_LAYOUT, OF_VIRTUAL))
        virtual = replace(virtual, layout=replace(virtual.layout, **wide), **rest)
    return replace(batch, **own, layout=layout, order=order, memory=memory, virtual=virtual)


def _room(x: Tensor | np.ndarray) -> int:
    """Bytes of a tensor, in whole units of 16: kernels know of pointers that they are aligned."""
    return -(-x.nbytes // 16) * 16


def bucket(tokens: int, parts: int = 16) -> int:
    """Rows for so many tokens, at most 1 in 16 more, in steps of a 16th of the power of two below;
    or of another part of it.

    Few different numbers: a matmul of a new shape costs oneDNN 4 to 15 ms on a CPU (measured), and
    a GPU a captured graph. All are multiples of 16, as tensor cores like them.
    """
    step = max(16, (1 << max(tokens, 1).bit_length() - 1) // parts)
    return -(-tokens // step) * step


def collate(
    examples: Sequence[Example],
    rows: Sequence[int],
    first: int = 0,
    train: bool = False,
    sequences: int = 0,
    virtual: VirtualTokens | None = None,
) -> Batch:
    """Packs `examples[row] for row in rows`.

    Args:
        examples: the data.
        rows: which of them, in the step's order.
        first: number in the step of the first row: how many micro-batches before this one held.
        train: the batch gets the order that the gradient of the embeddings is added up in, and a
            shape that few batches differ in.
        sequences: to train, the batch is filled up to so many with empty ones.
        virtual: what the model puts before every sequence; a model that is not told of finds its
            places by itself, which waits for a GPU.
    """
    chosen = [examples[row] for row in rows]
    # Which example, where in it, and how long: sequences of a batch, the shortest first.
    pieces = [(i, *piece) for i, example in enumerate(chosen) for piece in _pieces(example)]
    pieces.sort(key=lambda piece: piece[2])
    of, begins, lengths = zip(*pieces, strict=True) if pieces else ((), (), ())
    total, count = sum(lengths), len(pieces)
    T, longest = bucket(total), 1 << (max([64, *lengths]) - 1).bit_length()
    room = max(sequences, count if count == len(rows) else 1 << (count - 1).bit_length())
    layout = Layout.pack(lengths, T, bucket=(room, longest) if train else None)

    ids = np.zeros((5, T), np.int64)
    tokens, positions, types, _, key = ids
    tokens[:total] = _joined([_part(chosen[i].tokens, b, n) for i, b, n in pieces])
    if chosen and len(chosen[0].types):
        types[:total] = _joined([_part(chosen[i].types, b, n) for i, b, n in pieces])
    place = np.arange(total)
    begin, start = np.array(begins, np.int64), layout.first.numpy()[:count]
    positions[:total] = place - start.repeat(lengths)
    number = np.array(of, np.int64) + first
    key[:total] = ((number << 32) + begin - start).repeat(lengths) + place
    targets, at = _targets(chosen, pieces, T, len(layout.lengths))

    order = EmbedOrder.sort(torch.from_numpy(ids[:4])) if train else None
    where = Virtual.pack(layout, *virtual, bucket=train) if virtual else None
    numbers = tuple(rows[i] for i in of)
    own = [torch.from_numpy(x) for x in (tokens, positions, types, key, targets)]
    at = None if at is None else torch.from_numpy(at)
    batch = Batch(*own, at, layout, order, numbers, own[0], where)
    tensors = _tensors(batch)
    parts = ((x.numpy(), bytes(_room(x) - x.nbytes)) for x in tensors)
    memory = bytearray().join([part for pair in parts for part in pair])
    return _within(torch.frombuffer(memory, dtype=torch.uint8), tensors, batch)


def _pieces(example: Example) -> list[tuple[int, int]]:
    """Begin and length of each sequence in it."""
    if not example.lengths:
        return [(0, len(example.tokens))]
    return list(zip(accumulate(example.lengths, initial=0), example.lengths, strict=False))


def _part(values: Sequence[int], begin: int, length: int) -> Sequence[int]:
    return values if len(values) == length else values[begin : begin + length]


def _targets(chosen, pieces, T, sequences):
    """Targets, and the rows that they are listed for; where most rows have one, all are there."""
    if not chosen or isinstance(chosen[0].target, int):
        targets = np.full(sequences, IGNORE_INDEX, np.int64)
        targets[: len(pieces)] = [chosen[i].target for i, *_ in pieces]
        return targets, None
    if isinstance(chosen[0].target, float) or getattr(chosen[0].target, "dtype", None) in WIDE:
        found = np.array([chosen[i].target for i, *_ in pieces], np.float32)
        targets = np.full((sequences, *found.shape[1:]), np.nan, np.float32)
        targets[: len(pieces)] = found
        return targets, None
    wide = np.full(T, IGNORE_INDEX, np.int64)
    joined = _joined([_part(chosen[i].target, b, n) for i, b, n in pieces])
    wide[: len(joined)] = joined
    at = np.flatnonzero(wide != IGNORE_INDEX)
    if len(at) > DENSE * len(joined):
        return wide, None
    room = bucket(len(at), 8)  # beside the number of rows: few of both, fewer pairs
    targets, rows = np.full(room, IGNORE_INDEX, np.int64), np.zeros(room, np.int64)
    targets[: len(at)], rows[: len(at)] = wide[at], at
    return targets, rows


def _joined(parts):
    """One after the other: `encode` makes arrays, which are ten times as fast as lists."""
    if parts and all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    kinds = {getattr(part, "typecode", "") for part in parts}
    if len(kinds) == 1 and kinds != {""}:
        return np.frombuffer(b"".join(parts), kinds.pop())
    return np.fromiter(chain.from_iterable(parts), np.int64)


def check_length(layout: Layout, most: int) -> None:
    """Raises ValueError when a sequence is longer than a model's position table."""
    if layout.max_length > most:
        raise ValueError(f"expected at most {most} tokens, got {layout.max_length}: cut the text")


@dataclass(frozen=True)
class Batches:
    """The training batches of `examples`: which rows form step k of epoch e."""

    examples: Sequence[Example]
    batch_size: int  # sequences in a micro-batch
    accumulation: int = 1  # micro-batches in a step
    seed: int = 0
    # What the examples of an epoch are, if they are not the same in all: as many, a function of it.
    vary: Callable[[int], Sequence[Example]] | None = None
    weights: np.ndarray | None = None  # (N,) above 0: how often each is drawn; None: all once
    virtual: VirtualTokens | None = None  # what the model puts before every sequence

    def __len__(self) -> int:
        """Optimizer steps in an epoch; the last may be short."""
        return math.ceil(len(self.examples) / (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> np.ndarray:
        """(N,) a permutation of the examples, a function of (seed, epoch).

        With weights N draws with replacement by systematic resampling (Kitagawa 1996): one random
        offset for N equal steps through the summed weights, so that an example comes as often as
        expected, rounded up or down, and so does every label, whose examples lie together there.
        """
        # The epoch is the highest word of the counter: the streams of two epochs never meet.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch]))
        count = len(self.examples)
        if self.weights is None:
            return generator.permutation(count)
        # Equal weights side by side, in another order in each epoch: the steps fall elsewhere.
        mixed = generator.permutation(count)
        mixed = mixed[np.argsort(self.weights[mixed], kind="stable")]
        ends = np.cumsum(self.weights[mixed])
        steps = (np.arange(count) + generator.random()) * (ends[-1] / count)
        drawn = mixed[np.minimum(np.searchsorted(ends, steps, side="right"), count - 1)]
        return generator.permutation(drawn)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step of an epoch, from step `start` on."""
        order = self.order(epoch).tolist()
        examples = self.vary(epoch) if self.vary else self.examples
        some, size = self.batch_size, self.batch_size * self.accumulation
        for k in range(start, len(self)):
            rows = order[k * size : (k + 1) * size]
            yield [
                collate(examples, rows[i : i + some], i, True, some, self.virtual)
                for i in range(0, len(rows), some)
            ]

    def buckets(self) -> tuple[int, float]:
        """Of the first epoch: how many numbers of rows its batches have, and the share of all rows
        that belong to no sequence."""
        lengths = np.array(lengths_of(self.examples))[self.order(0)]
        step = self.batch_size * self.accumulation
        begins = [i for k in range(0, len(lengths), step)
                  for i in range(k, min(k + step, len(lengths)), self.batch_size)]  # fmt: skip
        rows = [bucket(int(total)) for total in np.add.reduceat(lengths, begins)]
        return len(set(rows)), 1 - int(lengths.sum()) / sum(rows)


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example; a sequence that makes them on demand may say so by itself."""
    known = getattr(examples, "lengths", None)
    return [len(example.tokens) for example in examples] if known is None else known


def evaluation_batches(examples: Sequence[Example], tokens: int = 4096) -> Iterator[Batch]:
    """All examples, those of like length together, at most `tokens` in a batch (or one example)."""
    lengths = lengths_of(examples)
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    begin = total = 0
    for end, i in enumerate(order):
        total += lengths[i]
        if total > tokens and end > begin:
            yield collate(examples, order[begin:end])
            begin, total = end, lengths[i]
    if order:
        yield collate(examples, order[begin:])
