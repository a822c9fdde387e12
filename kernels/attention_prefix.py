"""Attention to a prefix as well: keys and values that are trained, before those of every sequence.

Math        For every sequence, with the prefix (P keys and values a head, the same for all):
                K' = [K_prefix; K],  V' = [V_prefix; V],   O = dropout(softmax(Q K'^T / sqrt(D))) V'
            Under a causal mask a query sees the whole prefix, and itself and what is before it.

Layout      qkv     (T, H + 2 * Hk, D)    as in attention.py
            prefix  (P, 2 * Hk, D)        heads of keys, then of values
            Keys and values are put together once, on T + B * P rows; the kernels are those of
            attention.py. The gradient of the prefix is a sum over sequences in their order.

Traffic     Beside attention's: K and V are read and written twice more forward (put behind the
            prefix, then gathered) and once more backward; the prefix is small. As rows of the batch
            it would cost a row of every product in the model: at 20 virtual tokens and sentences of
            25, 1.8 times the matmuls.

Source      Li and Liang 2021, arXiv:2101.00190, section 4.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import (
    attention_forward,
    attention_kv_ref,
    check_attention,
    check_kernel,
    gradient_rows,
    split_heads,
)
from .attention_backward import attention_gradient
from .dropout import Dropout, check_dropout
from .layout import Layout
from .virtual_tokens import Virtual, put_virtual_ref


def attention_prefix_ref(
    qkv: Tensor, prefix: Tensor, layout: Layout, n_head: int, *, causal: bool = False,
    keep: Tensor | None = None, p: float = 0.0,
) -> Tensor:
    """The definition: see `attention_kv_ref`, whose keys are here the prefix and then the
    sequence's own.

    Args:
        qkv: (T, H + 2 * Hk, D).
        prefix: (P, 2 * Hk, D): heads of keys, then of values.
        layout: where the sequences lie.
        n_head: H.
        causal: a query sees the prefix, itself, and the rows before it.
        keep: (T, H, P + L) bool: probabilities that stay, as in `attention_kv_ref`.
        p: the probability that `keep` was drawn with.

    Returns:
        (T, H, D).
    """
    lengths, P = layout.lengths, len(prefix)
    k, v = put_virtual_ref(qkv[:, n_head:], prefix, lengths).chunk(2, dim=1)
    longer = [length + P for length in lengths]
    wide = Layout.pack(lengths, layout.rows, longer, len(k))
    return attention_kv_ref(qkv[:, :n_head], k, v, wide, causal=causal, keep=keep, p=p)


def check_attention_prefix(qkv: Tensor, prefix: Tensor, layout: Layout, n_head: int) -> None:
    """Raises ValueError when they do not fit each other."""
    check_attention(qkv, layout, n_head)
    wanted = qkv.shape[1] - n_head, qkv.shape[2]
    if prefix.ndim != 3 or prefix.shape[1:] != wanted or prefix.dtype != qkv.dtype:
        shape, found = f"(P, {wanted[0]}, {wanted[1]})", tuple(prefix.shape)
        raise ValueError(f"expected a prefix {shape} {qkv.dtype}, got {found} {prefix.dtype}")


class _AttentionPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, prefix, n_head, causal, dropout, virtual):
        k, v = virtual.gather(qkv[:, n_head:], prefix).chunk(2, dim=1)
        q, *_ = split_heads(qkv, n_head)
        out, lse = attention_forward(q, k, v, virtual.layout, causal, dropout)
        ctx.save_for_backward(qkv, k, v, out, lse)
        ctx.facts = virtual, causal, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, k, v, out, lse = ctx.saved_tensors
        virtual, causal, dropout = ctx.facts
        n_head, dqkv = out.shape[1], qkv.new_empty(qkv.shape)
        dkv = k.new_empty(len(k), 2 * k.shape[1], k.shape[2])
        saved = qkv[:, :n_head], k, v, out, lse
        grads = dqkv[:, :n_head], *dkv.chunk(2, dim=1)
        attention_gradient(saved, gradient_rows(dout), grads, virtual.layout, causal, dropout)
        dqkv[:, n_head:] = dkv.index_select(0, virtual.place)
        return dqkv, virtual.add_up(dkv), None, None, None, None


def attention_prefix(
    qkv: Tensor, prefix: Tensor, layout: Layout, n_head: int, causal: bool = False,
    dropout: Dropout | None = None, virtual: Virtual | None = None,
) -> Tensor:
    """Attention of a packed projection to a prefix and to its own sequence.

    Args:
        qkv, layout, n_head, causal: as in `attention`.
        prefix: (P, 2 * Hk, D) in the dtype of qkv: heads of keys, then of values.
        dropout: as in `attention`; it has a column for each of the P + L keys.
        virtual: `Virtual.pack(layout, P, keys_only=True)` on the device of qkv; None: it is made
            here, which waits for the host.

    Returns:
        (T, H, D); rows of no sequence are 0.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    check_attention_prefix(qkv, prefix, layout, n_head)
    check_kernel(qkv, layout)
    virtual = virtual or Virtual.pack(layout, len(prefix), keys_only=True).to(qkv.device)
    if virtual.count != len(prefix) or virtual.layout.rows != layout.rows:
        raise ValueError(f"expected virtual tokens for a prefix of {len(prefix)}, got others")
    check_dropout(dropout, layout.rows, max(virtual.layout.key_lengths, default=0), n_head)
    return _AttentionPrefix.apply(qkv, prefix, n_head, causal, dropout, virtual)
