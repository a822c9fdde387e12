"""Dropout masks as a function of where an element stands, never of a stream.

Math        An element has a row (an example and a position in it), a column, and a place in the
            model (a site and a head). Philox names each of them once a step, multiply-adds do the
            rest:

                r0, r1, r2, r3 = Philox(seed; position, example, step, ROW)      four words a row
                u              = Philox(seed; head, site, step, PLACE)           a word a place
                x              = Philox(seed; column, 0, step, COLUMN)           a word a column
                a, b           = r0 * u + r1,   r2 * u + r3                      mod 2^32
                word           = a * x + b                                       mod 2^32
                keep           = word >= p * 2^32;   kept values are divided by 1 - p

            r is uniform, so a word is, and so is the pair of words of two elements of a row, but
            for as many low bits as the difference of their columns (or places) ends in zeros: a
            few, of 32. Rows are independent. The kept fraction is exact to 2^-32. An element costs
            a multiply-add and a compare; Philox, 10 rounds, runs once a step for T rows.

Why         The mask of a token depends on nothing beside it: not on the batch it is packed into,
            on accumulation, ranks, tiles, or on how often a run was stopped and resumed. Forward
            and backward compute the same bits again, or keep them, as they like.

Traffic     16 bytes a row, 4 a column, read by whatever kernel drops. No mask need be stored.

Source      Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
            Multiply-add hashing: Dietzfelbinger et al. 1997, "A reliable randomized algorithm for
            the closest-pair problem"; over several words: Lemire & Kaser 2014, arXiv:1202.4961.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROW, PLACE, COLUMN = 0, 1, 2  # last counter word: what is named


class Draw(NamedTuple):
    """What names all masks of a step, besides the rows."""

    seed: Tensor  # () int64
    step: Tensor  # () int64 in [0, 2**32): the optimizer step


@dataclass(frozen=True, eq=False)
class Dropout:
    """How one place in the model drops. Made for a step by `draw_dropout`, moved with `at`."""

    p: float         # probability of being dropped, in [0, 1)
    site: int        # which dropout of the model this is
    rows: Tensor     # (T, 4) int32: r0 to r3 of each row
    columns: Tensor  # (N,) int32: x of each column; a place uses the first of them
    places: Tensor   # (sites, heads) int32: u of each place

    def at(self, site: int, p: float, rows: Tensor | None = None) -> "Dropout | None":
        """This dropout at another site; `rows` (M,) int64 picks rows. None when `p` is 0."""
        picked = self.rows if rows is None else self.rows.index_select(0, rows)
        return replace(self, p=p, site=site, rows=picked) if p else None


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10 in int64 arithmetic.

    Args:
        seed: () int64; its low and high words are the key.
        counter: (4, N) int64, words in [0, 2**32).

    Returns:
        (4, N) int64, words in [0, 2**32).
    """
    multiplier = torch.tensor([[0xD2511F53], [0xCD9E8D57]], device=counter.device)
    weyl = torch.tensor([[0x9E3779B9], [0xBB67AE85]], device=counter.device)
    key = torch.stack((seed, seed >> 32))[:, None] & WORD
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        product = even * multiplier  # wraps past 2**63; both halves are right all the same
        even, odd = ((product >> 32) & WORD).flip(0) ^ odd ^ key, (product & WORD).flip(0)
        key = (key + weyl) & WORD
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def draw_dropout(draw: Draw, key: Tensor, columns: int, sites: int, heads: int) -> Dropout:
    """The words of all rows, columns and places of a step.

    Args:
        draw: seed and step.
        key: (T,) int64: number of the example in its step << 32 | position in its sequence.
        columns: as many as the widest place has: channels, or positions of keys.
        sites, heads: how many places the model has.

    Returns:
        A Dropout with p = 0, to be moved with `at`.
    """
    column, place = (torch.arange(n, device=key.device) for n in (columns, sites * heads))
    parts = (
        (key & WORD, key >> 32, ROW),
        (place % heads, place // heads, PLACE),
        (column, torch.zeros_like(column), COLUMN),
    )
    low, high = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    kind = torch.cat([torch.full_like(part[0], part[2]) for part in parts])
    words = philox(draw.seed, torch.stack((low, high, draw.step.expand(len(low)), kind)))
    rows, places, x = words.to(torch.int32).split([len(key), sites * heads, columns], dim=1)
    return Dropout(0.0, 0, rows.T.contiguous(), x[0], places[0].view(sites, heads))


def row_words(dropout: Dropout) -> tuple[Tensor, Tensor]:
    """(a, b) of the header at this dropout's site: (T, heads) int32 each, wrapped."""
    u, r = dropout.places[dropout.site], dropout.rows[:, :, None]
    return r[:, 0] * u + r[:, 1], r[:, 2] * u + r[:, 3]


def threshold(p: float) -> int:
    """The smallest kept word, moved to int32: `word - 2**31 >= threshold` in signed arithmetic."""
    return min(round(p * 2**32), WORD) - 2**31


def dropout_keep(dropout: Dropout, columns: int) -> Tensor:
    """The mask itself, for tests and definitions: (T, heads, columns) bool, True where it stays.

    A place without heads is head 0 of its site.
    """
    a, b = (w.long()[..., None] for w in row_words(dropout))
    words = (a * dropout.columns[:columns].long() + b) & WORD
    return words >= round(dropout.p * 2**32)


def dropout_ref(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """The definition: x (T, C) where `keep` (T, C) is True, over 1 - p; 0 elsewhere."""
    return x if keep is None else x * keep / (1 - p)
