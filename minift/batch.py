"""Examples, and the packed batches they are put together to. There is no padding anywhere.

    tokens     101 2023 102 | 101 2054 1037 3185 102       (T,)  sequences end to end
    positions    0    1   2 |   0    1    2    3   4       (T,)
    layout     cu_seqlens (0, 3, 8), first (0, 3), ...     every index an operation needs
    targets         1       |          0                   (B,)

Which examples form a step is a function of (seed, epoch, step), so a run that resumes needs no
random state. An example's number in its step travels in `key`, for dropout.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .ops import EmbedOrder, Layout


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of token ids with its answer."""

    tokens: Sequence[int]
    types: Sequence[int]  # 0 for the first text, 1 for the second
    target: int  # number of the label; -100: none
    cut: bool = False  # the text was longer


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences packed on T rows, shortest first; slack rows at the end belong to none."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in every sequence
    types: Tensor  # (T,) int64
    key: Tensor  # (T,) int64: number of the example in its step << 32 | position
    layout: Layout
    targets: Tensor  # (B,) int64
    rows: tuple[int, ...]  # (B,) which examples of the data these are
    order: EmbedOrder | None = None  # by tokens, positions, types, and one type for all; to train

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; copies do not wait."""
        names = ("tokens", "positions", "types", "key", "layout", "targets")
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in names if n != "layout"}
        order = self.order and self.order.to(device)
        return replace(self, layout=self.layout.to(device), order=order, **moved)


def bucket(tokens: int) -> int:
    """Rows for so many tokens: few different numbers, since a matmul of a new shape costs oneDNN
    4 to 15 ms on a CPU (measured), and a GPU a captured graph."""
    step = 64 if tokens > 256 else 16
    return -(-tokens // step) * step


def collate(
    examples: Sequence[Example], rows: Sequence[int], first: int = 0, train: bool = False
) -> Batch:
    """Packs `examples[row] for row in rows`.

    Args:
        examples: the data.
        rows: which of them, in the step's order.
        first: number in the step of the first row: how many micro-batches before this one held.
        train: the batch is given the order that the gradient of the embeddings is added up in.
    """
    by_length = sorted(range(len(rows)), key=lambda i: len(examples[rows[i]].tokens))  # stable
    chosen = [examples[rows[i]] for i in by_length]
    lengths = [len(e.tokens) for e in chosen]
    T = bucket(sum(lengths))

    def packed(parts):
        x = np.zeros(T, np.int64)
        np.concatenate([np.asarray(part, np.int64) for part in parts], out=x[: sum(lengths)])
        return torch.from_numpy(x)

    number = packed([np.full(n, first + i) for n, i in zip(lengths, by_length, strict=True)])
    positions = packed([np.arange(n) for n in lengths])
    tokens, types = packed([e.tokens for e in chosen]), packed([e.types for e in chosen])
    one_type = torch.zeros_like(types)
    return Batch(
        tokens=tokens,
        positions=positions,
        types=types,
        key=(number << 32) + positions,
        layout=Layout.pack(lengths, T),
        targets=torch.tensor([e.target for e in chosen]),
        rows=tuple(rows[i] for i in by_length),
        order=EmbedOrder.sort((tokens, positions, types, one_type)) if train else None,
    )


@dataclass(frozen=True)
class Batches:
    """The training batches of `examples`: which rows form step k of epoch e."""

    examples: Sequence[Example]
    batch_size: int  # sequences in a micro-batch
    accumulation: int = 1  # micro-batches in a step
    seed: int = 0

    def __len__(self) -> int:
        """Optimizer steps in an epoch; the last may be short."""
        return math.ceil(len(self.examples) / (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> np.ndarray:
        """(N,) a permutation of the examples, a function of (seed, epoch)."""
        # The epoch is the highest word of the counter: the streams of two epochs never meet.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch]))
        return generator.permutation(len(self.examples))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step of an epoch, from step `start` on."""
        order = self.order(epoch).tolist()
        size = self.batch_size * self.accumulation
        for k in range(start, len(self)):
            rows = order[k * size : (k + 1) * size]
            yield [
                collate(self.examples, rows[i : i + self.batch_size], first=i, train=True)
                for i in range(0, len(rows), self.batch_size)
            ]


def evaluation_batches(examples: Sequence[Example], tokens: int = 4096) -> Iterator[Batch]:
    """All examples, those of like length together, at most `tokens` in a batch (or one example)."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    begin = total = 0
    for end, i in enumerate(order):
        total += len(examples[i].tokens)
        if total > tokens and end > begin:
            yield collate(examples, order[begin:end])
            begin, total = end, len(examples[i].tokens)
    if order:
        yield collate(examples, order[begin:])
