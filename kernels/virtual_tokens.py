"""Virtual tokens: trained vectors at the head of every sequence, which no text has.

Layout      P virtual rows v go before each of B sequences, the same ones before all:

                x         a b c | d e f g h | . .          T = 10, lengths (3, 5), two slack rows
                virtual   v w                              P = 2
                result    v w a b c | v w d e f g h | . .  T2 rows

            Indices say where everything comes from and goes to, so that both directions are
            gathers, and the gradient of v is a sum over sequences in their order: no atomics.

                source    (T2,)    row of x, or T + j for virtual row j
                place     (T,)     where a row of x has gone
                rows      (B * P,) where the virtual ones are, one sequence after the other

            An empty sequence has its virtual rows too, so that the sizes follow from T and B.

Prompt      The virtual rows are vectors before the first layer: queries, keys and values in all.
Prefix      They are keys and values of a layer, and no queries: `layout` has T rows of queries and
            T2 of keys. No row of any product is spent on them.

Source      Lester et al. 2021, arXiv:2104.08691 (prompt); Li and Liang 2021, arXiv:2101.00190
            (prefix).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Layout


@dataclass(frozen=True, eq=False)
class Virtual:
    """Where the virtual tokens of a batch stand. Make one with `Virtual.pack`."""

    count: int      # P
    layout: Layout  # with the virtual rows; of a prefix they are keys alone
    source: Tensor  # (T2,) int64
    place: Tensor   # (T,) int64
    rows: Tensor    # (B * P,) int64

    @staticmethod
    def pack(
        layout: Layout, count: int, keys_only: bool = False, bucket: bool = False
    ) -> "Virtual":
        """The layout of the same sequences with `count` virtual tokens before each.

        Args:
            layout: of T rows, on the host or elsewhere; its lengths are on the host.
            keys_only: they are keys and values, as of a prefix, and no queries.
            bucket: shapes depend on those of `layout` alone, see `Layout.pack`.

        Returns:
            Tensors on the host.
        """
        T, B, P = layout.rows, len(layout.lengths), count
        total = -(-(T + B * P) // 16) * 16
        lengths = np.array(layout.lengths, np.int64)
        longer = tuple((lengths + P).tolist())
        begins = np.cumsum(lengths + P) - (lengths + P)
        rows = (begins[:, None] + np.arange(P)).ravel()
        place = np.arange(T) + P * B  # of slack rows
        place[: lengths.sum()] = np.arange(lengths.sum()) + P * (1 + np.arange(B).repeat(lengths))
        source = np.full(total, T)
        source[place], source[rows] = np.arange(T), T + np.tile(np.arange(P), B)
        room = (B, layout.longest + P) if bucket else None
        if keys_only:
            wide = Layout.pack(layout.lengths, T, longer, total, room)
        else:
            wide = Layout.pack(longer, total, bucket=room)
        return Virtual(P, wide, *map(torch.from_numpy, (source, place, rows)))

    def to(self, device: torch.device | str) -> "Virtual":
        """The same with its tensors on `device`."""
        moved = (x.to(device) for x in (self.source, self.place, self.rows))
        return Virtual(self.count, self.layout.to(device), *moved)

    def gather(self, x: Tensor, virtual: Tensor) -> Tensor:
        """x (T, ...) and the virtual rows (P, ...) -> (T2, ...). No gradient is kept."""
        return torch.cat([x, virtual]).index_select(0, self.source)

    def with_prefix(self, qkv: Tensor, prefix: Tensor) -> Tensor:
        """qkv (T, H + 2 * Hk, D) with the prefix's keys and values (P, 2 * Hk, D) as rows before
        each sequence, whose queries are 0: what `attention` of those rows gives all others."""
        queries = prefix.new_zeros(len(prefix), qkv.shape[1] - prefix.shape[1], prefix.shape[2])
        return self.gather(qkv, torch.cat([queries, prefix], 1))

    def add_up(self, grad: Tensor) -> Tensor:
        """The gradient of the virtual rows (P, ...) from that of all rows (T2, ...)."""
        each = grad.index_select(0, self.rows)
        return each.view(-1, self.count, *grad.shape[1:]).sum(0)


def key_of(key: Tensor, virtual: Virtual, layout: Layout) -> Tensor:
    """The dropout key (T2,) of all rows from that of the real ones (T,).

    A virtual row's lies where no position does, at 2^31 + P * the position that its sequence begins
    at, so each of a step is named once; see `dropout.py`.
    """
    P, none = virtual.count, key.new_zeros(len(layout.first))  # where all sequences are empty
    begin = key.index_select(0, layout.first) if len(key) else none
    low = (begin & 0xFFFFFFFF) * P + 2**31
    own = ((begin >> 32 << 32) + low)[:, None] + torch.arange(P, device=key.device)
    wide = key.new_zeros(len(virtual.source))
    return wide.index_copy(0, virtual.place, key).index_copy(0, virtual.rows, own.flatten())


def put_virtual_ref(x: Tensor, virtual: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The definition: x (T, ...) with virtual (P, ...) before each sequence; slack rows last."""
    parts = x.split([*lengths, len(x) - sum(lengths)])
    return torch.cat([part for each in parts[:-1] for part in (virtual, each)] + [parts[-1]])


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, virtual: Tensor, where: Virtual) -> Tensor:
        ctx.where = where
        return where.gather(x, virtual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        where, (need_x, need_virtual, _) = ctx.where, ctx.needs_input_grad
        dx = grad.index_select(0, where.place) if need_x else None
        return dx, where.add_up(grad) if need_virtual else None, None


def put_virtual(x: Tensor, virtual: Tensor, where: Virtual) -> Tensor:
    """x (T, C) with virtual (P, C) before each sequence, (T2, C): see `put_virtual_ref`, which has
    no slack rows of its own.

    Raises:
        ValueError: the shapes do not fit.
    """
    if len(x) != len(where.place) or virtual.shape != (where.count, *x.shape[1:]):
        wanted = f"({len(where.place)}, C) and ({where.count}, C)"
        raise ValueError(f"expected {wanted}, got {tuple(x.shape)} and {tuple(virtual.shape)}")
    return _Put.apply(x, virtual, where)
