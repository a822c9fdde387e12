"""Attention to a prefix in torch; `minift.kernels.attention_prefix` holds its definition.

As in torch_attention.py sequences of like length share a batched product. Before their own keys
stand those of the prefix, the same in all: P columns more of scores, and no row more of any product
of the model.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.attention_prefix import check_attention_prefix
from .kernels.dropout import Dropout
from .kernels.layout import Group, Layout
from .kernels.virtual_tokens import Virtual
from .torch_attention import (
    LONG,
    dropped_of,
    heads_of,
    places_of,
    product,
    rectangle,
    widened,
    words_of,
    write_rows,
)


class _Facts(NamedTuple):
    """What forward and backward both know."""

    layout: Layout
    n_head: int
    n_key: int
    causal: bool
    dropout: Dropout | None

    @property
    def kept(self) -> float:
        return 1 / (1 - self.dropout.p) if self.dropout else 1.0


def _keys(x: Tensor, prefix: Tensor, group: Group, facts: _Facts) -> tuple[Tensor, Tensor, Tensor]:
    """The rectangle (heads * n, L, D) -> q (H * n, L, D), k and v (H * n, P + L, D)."""
    q, k, v = heads_of(x, group, facts.n_head, facts.n_key)
    own = []
    for part, most in zip(prefix.transpose(0, 1).split(facts.n_key), (k, v), strict=True):
        part = widened(part).repeat_interleave(facts.n_head // facts.n_key, 0)  # (H, P, D)
        wide = part[:, None].expand(-1, group.n, -1, -1).flatten(0, 1)
        own.append(torch.cat([wide, most], 1))
    return q, *own


def _probabilities(q: Tensor, k: Tensor, group: Group, facts: _Facts) -> Tensor:
    """(H * n, L, P + L): padded keys, and later ones under a causal mask, have 0."""
    n, L, P = group.n, group.length, k.shape[1] - q.shape[1]
    scores = product(q, k.mT, 1 / math.sqrt(q.shape[-1]))
    own = scores.view(-1, n, L, P + L)[..., P:]
    if group.real is not None:
        own.add_(group.real.log()[:, None])  # 0, or -inf on padding
    if facts.causal:
        own.add_(scores.new_full((L, L), -math.inf).triu_(1))
    return torch.softmax(scores, -1)


def _made(qkv: Tensor, prefix: Tensor, i: int, facts: _Facts) -> tuple[Tensor, ...]:
    """The rectangle of a group, its probabilities, those that stay, and the values."""
    group, heads = facts.layout.groups[i], facts.n_head + 2 * facts.n_key
    x = widened(rectangle(qkv, places_of(facts.layout, heads)[i][0], group))
    q, k, v = _keys(x, prefix, group, facts)
    probs = dropped = _probabilities(q, k, group, facts)
    if facts.dropout is not None:
        drop = facts.dropout
        words = words_of(facts.layout, drop.rows, drop.columns, len(prefix))
        dropped = dropped_of(probs, drop, *words[i])
    return x, probs, dropped, v


class _AttentionPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, prefix: Tensor, facts: _Facts) -> Tensor:
        T, _, D = qkv.shape
        layout, out = facts.layout, qkv.new_empty(T, facts.n_head, D)
        out[sum(layout.lengths) :] = 0
        # Of longer sequences the probabilities are made again: kept, they would fill the memory.
        saved, keeps = [], layout.max_length <= LONG and any(ctx.needs_input_grad)
        for i, group in enumerate(layout.groups):
            *made, v = _made(qkv, prefix, i, facts)
            o = product(made[2], v, facts.kept)
            write_rows(out, o, places_of(layout, facts.n_head)[i][1], group)
            saved += made if keeps else ()
        ctx.save_for_backward(qkv, prefix, *saved)
        ctx.facts = facts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        qkv, prefix, *saved = ctx.saved_tensors
        facts, dqkv = ctx.facts, qkv.new_empty(qkv.shape)
        layout, heads = facts.layout, qkv.shape[1]
        dqkv[sum(layout.lengths) :] = 0
        dprefix = widened(prefix.new_zeros(heads - facts.n_head, *prefix.shape[::2]))  # (2Hk, P, D)
        for i, group in enumerate(layout.groups):
            made = saved[3 * i : 3 * i + 3] or _made(qkv, prefix, i, facts)[:3]
            do = widened(rectangle(dout, places_of(layout, facts.n_head)[i][0], group))
            if group.real is not None:  # a padded query has no gradient
                do = (do.view(facts.n_head, -1, do.shape[2]) * group.real.view(-1, 1)).view_as(do)
            dx, dp = _group_gradient(made, prefix, do, group, facts)
            write_rows(dqkv, dx, places_of(layout, heads)[i][1], group)
            dprefix += dp
        return dqkv, dprefix.transpose(0, 1).to(prefix.dtype), None


def _group_gradient(made, prefix, do, group, facts) -> tuple[Tensor, Tensor]:
    """Of the rectangle (heads * n, L, D), and of the prefix (2 * Hk, P, D)."""
    x, probs, dropped = made
    q, k, v = _keys(x, prefix, group, facts)
    P, scale = len(prefix), 1 / math.sqrt(q.shape[-1])
    ds = product(do, v.mT, facts.kept).mul_(dropped)  # P * dP: dropped holds P, or 0 where dP is
    ds.addcmul_(probs, ds.sum(-1, keepdim=True), value=-1)
    each = product(ds.mT, q, scale), product(dropped.mT, do, facts.kept)  # (H * n, P + L, D)
    # A key's gradient is the sum over the query heads that share it.
    dk, dv = (d.view(facts.n_key, -1, group.n, *d.shape[1:]).sum(1) for d in each)
    own = (d[:, :, P:].flatten(0, 1) for d in (dk, dv))
    dx = torch.cat([product(ds, k, scale), *own])
    return dx, torch.cat([d[:, :, :P].sum(1) for d in (dk, dv)])


def attention_prefix(
    qkv: Tensor,
    prefix: Tensor,
    layout: Layout,
    n_head: int,
    causal: bool = False,
    dropout: Dropout | None = None,
    virtual: Virtual | None = None,
) -> Tensor:
    """See `minift.kernels.attention_prefix.attention_prefix_ref`: (T, H + 2 * Hk, D) and a prefix
    (P, 2 * Hk, D) -> (T, H, D). `virtual` is not needed here."""
    check_attention_prefix(qkv, prefix, layout, n_head)
    n_key = (qkv.shape[1] - n_head) // 2
    return _AttentionPrefix.apply(qkv, prefix, _Facts(layout, n_head, n_key, causal, dropout))
