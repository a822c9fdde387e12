"""Which rows of a batch have the same id: how the gradient of a table is added up.

Order       The T rows of a batch, those of one id side by side, each id's as they come. The n rows
            of an id are a segment, which is cut every PIECE rows: into what depends on n and on
            nothing beside it. Of 7 ids, if PIECE were 2:

                row        0 1 2 3 4 5 6        rows       4 | 1 5 | 0 2 : 3 6
                id         7 3 7 7 0 3 7        pieces     0   1     3     5   7

            A piece is one program's to sum. A segment of one piece is done then; the sums of a long
            segment, of several, wait in slots until they are added up. Piece j of a segment that
            begins at place `begin` has slot 2 * (begin // PIECE + j) + (j == 0), and no other has:
            of PIECE places in a row, no more than one begins a long segment, and no more than one
            begins another piece of one.

Memory      Of each tensor of ids a line of int32 words, as many as T alone decides, so that a
            captured step finds the lists of any batch in the same places:

                1                    how many pieces there are
                T                    rows
                2 * cdiv(T, PIECE)   begin and end of the long segment that begins in those PIECE
                                     places; 0, 0: none does
                T + 1                of each piece 4 * begin + 2 * (it is of a long segment) + (it
                                     is the first of its segment); then 4 * T

It is made on the host, when a batch is put together: no kernel sorts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 64  # rows


@dataclass(frozen=True, eq=False)
class EmbedOrder:
    """The order of T rows by each of N tensors of ids. Make one with `EmbedOrder.sort`."""

    words: Tensor           # (N, W) int32: their lines
    rows: int               # T
    lines: tuple[int, ...]  # which of them, one for each table
    gradients: Any = None  # TableGradients, memory that the gradients go to; None: new memory

    @staticmethod
    def sort(ids: Tensor | Sequence[Tensor]) -> "EmbedOrder":
        """The order by each of `ids`, (T,) int64, on the host: ids on a GPU are waited for."""
        ids = ids if isinstance(ids, Tensor) else torch.stack(tuple(ids))
        N, T = ids.shape
        keys = np.minimum(ids.cpu().numpy(), 2**31 - 1)  # no table has rows beyond
        np.maximum(keys, -1, out=keys)
        keys <<= 32
        keys += np.arange(T)  # all differ: see `Order`
        keys.sort()
        words = np.zeros((N, 2 + 2 * T + 2 * -(-T // PIECE)), np.int32)
        if T:
            _write_lines(words, keys)
        return EmbedOrder(torch.from_numpy(words), T, tuple(range(N)))

    def pick(self, *which: int) -> "EmbedOrder":
        """The order by these of the tensors."""
        return replace(self, lines=tuple(self.lines[i] for i in which))

    def to(self, device: torch.device | str) -> "EmbedOrder":
        """The same order on `device`; a copy of pinned memory does not wait."""
        return replace(self, words=self.words.to(device, non_blocking=True))


def _write_lines(words: np.ndarray, keys: np.ndarray) -> None:
    """From sorted keys (N, T), an id in the high half of each and its row in the low half."""
    N, T = keys.shape
    rows, segments, pieces = words[:, 1 : T + 1], words[:, T + 1 : -T - 1], words[:, -T - 1 :]
    rows[:] = keys  # drops the high half
    keys >>= 32
    marks = np.ones((N, T), np.uint8)  # of each place: the low bits of a piece's word
    np.not_equal(keys[:, 1:], keys[:, :-1], out=marks[:, 1:].view(bool))
    long = marks[:, :-PIECE].view(bool) & (keys[:, PIECE:] == keys[:, :-PIECE])
    for k, begin in zip(*(x.tolist() for x in long.nonzero()), strict=True):
        end = keys[k].searchsorted(keys[k, begin], "right")
        marks[k, begin:end:PIECE] += 2
        at = 2 * (begin // PIECE)
        segments[k, at : at + 2] = begin, end
    pieces[:] = 4 * T
    for k, mark in enumerate(marks):
        begin = mark.nonzero()[0]  # of each piece
        words[k, 0] = len(begin)
        pieces[k, : len(begin)] = 4 * begin + mark[begin]
