"""The keys and values of the tokens that a decoder has seen, of one layer.

Layout      A slot is the room of one sequence of up to L tokens, and keeps it until the sequence
            ends. Keys of a head lie end to end: who reads those of one slot and head reads memory
            from end to end, and on a CPU slots and heads are one axis of a batched product.

                k, v         (S, Hk, L, D)

            Nobody reads what lies beyond the tokens of a slot, and a slot that is free needs no
            clearing. How many tokens a slot has is not in here: that is a tensor of its own, which
            all layers share.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout


class KeyValues(NamedTuple):
    """The cache of one layer: what was seen so far, of S sequences with room for L tokens each."""

    k: Tensor  # (S, Hk, L, D)
    v: Tensor  # the same, with the same strides

    @staticmethod
    def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "KeyValues":
        """Of shape (S, Hk, L, D); memory as it comes, for no result depends on it."""
        return KeyValues(*torch.empty(2, *shape, dtype=dtype, device=device))


def fill_(cache: KeyValues, qkv: Tensor, layout: Layout, slots: Sequence[int]) -> None:
    """Keys and values of whole sequences into rows 0 : length of their slots; once a prompt.

    Args:
        cache: is written to.
        qkv: (T, H + 2 * Hk, D), what `attention` had of them.
        layout: where the sequences lie; slack rows are left out.
        slots: of the sequences, in their order; empty ones at the end need none.

    Raises:
        ValueError: a slot is not there or named twice, or has too little room.
    """
    S, Hk, L, D = cache.k.shape
    B = max((b for b, length in enumerate(layout.lengths, 1) if length), default=0)
    if len(slots) < B or len({*slots} & {*range(S)}) != len(slots):
        wanted = f"different slots in 0 to {S - 1} for {B} sequences"
        raise ValueError(f"expected {wanted}, got {list(slots)}")
    if layout.max_length > L:
        raise ValueError(f"expected at most {L} tokens a sequence, got {layout.max_length}")
    if qkv.ndim != 3 or len(qkv) != layout.rows or qkv.shape[1] <= 2 * Hk or qkv.shape[2] != D:
        wanted = f"({layout.rows}, H + 2 * {Hk}, {D})"
        raise ValueError(f"expected qkv {wanted}, got {tuple(qkv.shape)}")
    kv = qkv.detach()[:, -2 * Hk :].transpose(0, 1).split(Hk)
    start = 0
    for slot, length in zip(slots, layout.lengths, strict=False):
        for room, x in zip(cache, kv, strict=True):
            room[slot, :, :length].copy_(x[:, start : start + length])
        start += length
