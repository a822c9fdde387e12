"""Attention in torch, as fast as it goes on a CPU; `minift.kernels.attention` holds its definition.

Sequences of like length share one batched product, on a padded rectangle (heads, n, L, D). What a
group needs stays in the cache if the group is done with before the next one comes: beyond it, a
pass over memory costs more than the arithmetic. Rows come into a rectangle and go back by a gather
of D numbers at a time: a copy that permutes and converts takes three times as long.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.attention import check_attention
from .kernels.dropout import Dropout, threshold
from .kernels.layout import Group, Layout


def _rectangle(x: Tensor, group: Group) -> Tensor:
    """(T, heads, D) -> (heads, n, L, D); padding repeats the first row of its sequence."""
    heads, D = x.shape[1:]
    cells = torch.arange(group.n * group.length, device=x.device)
    rows = group.start + (cells if group.gather is None else group.gather)
    places = torch.arange(heads, device=x.device)[:, None] + rows * heads
    x = x.reshape(-1, D).index_select(0, places.flatten())
    return x.view(heads, group.n, group.length, D)


def _write_rows(out: Tensor, x: Tensor, group: Group) -> None:
    """The inverse: (heads * n, L, D) into the rows of `out` (T, heads, D)."""
    heads, D = out.shape[1:]
    cells = group.n * group.length
    rows = torch.arange(cells, device=x.device) if group.scatter is None else group.scatter
    places = rows[:, None] + torch.arange(heads, device=x.device) * cells
    out = out[group.start : group.stop].view(-1, D)
    torch.index_select(x.to(out.dtype).view(-1, D), 0, places.flatten(), out=out)


def _wide(x: Tensor) -> Tensor:
    """fp32 or fp64: on a CPU softmax and small products are slower in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(x: Tensor, n_head: int, n_key: int) -> list[Tensor]:
    """(H + 2 * Hk, n, L, D) -> q, k, v (H * n, L, D); keys that heads share are repeated."""
    parts = x.split([n_head, n_key, n_key])
    if n_key < n_head:
        parts = parts[0], *(part.repeat_interleave(n_head // n_key, 0) for part in parts[1:])
    return [part.flatten(0, 1) for part in parts]


def _product(a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale * a @ b over the batch, into `out` if given; the scale costs no pass of its own."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)


def _probabilities(scores: Tensor, group: Group, causal: bool) -> Tensor:
    """(H * n, L, L): padded keys, and with `causal` later ones, have 0."""
    n, L = group.n, group.length
    if group.real is not None:
        scores.view(-1, n, L, L).add_(group.real.log()[:, None])  # 0, or -inf on padding
    if causal:
        scores.add_(scores.new_full((L, L), -math.inf).triu_(1))
    return torch.softmax(scores, -1)


def _dropped(probs: Tensor, dropout: Dropout, group: Group) -> Tensor:
    """The probabilities (H * n, L, L) that stay, 0 where one goes: not divided by 1 - p."""
    n, L = group.n, group.length
    # A word is u * (r0 * x + r2) + (r1 * x + r3): only u, of the head, differs between heads.
    r = dropout.rows[group.start : group.stop]
    r = r if group.gather is None else r.index_select(0, group.gather)
    r = r.T.contiguous().view(4, n, L, 1)
    factor, rest = (r[:2] * dropout.columns[:L]).add_(r[2:]).flatten(1)  # int32 wraps
    rest ^= -(2**31)  # turns an unsigned compare signed
    words = torch.addcmul(rest, factor, dropout.places[dropout.site][:, None])
    keep = words.ge_(threshold(dropout.p)).view(probs.shape)  # in place: 1 or 0, made three times
    if probs.dtype != torch.float32:  # as fast as into another dtype
        return keep * probs
    return keep.mul_(probs.view(torch.int32)).view(torch.float32)  # all bits, or none


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, layout: Layout, n_head: int, causal: bool, dropout: Dropout | None):
        T, heads, D = qkv.shape
        n_key = (heads - n_head) // 2
        out = qkv.new_empty(T, n_head, D)
        out[sum(layout.lengths) :] = 0
        scale, kept = 1 / math.sqrt(D), 1 / (1 - dropout.p) if dropout else 1.0
        saved = []
        for group in layout.groups:
            x = _rectangle(qkv, group)
            q, k, v = _heads(_wide(x), n_head, n_key)
            probs = dropped = _probabilities(_product(q, k.mT, scale), group, causal)
            if dropout is not None:
                dropped = _dropped(probs, dropout, group)
            _write_rows(out, _product(dropped, v, kept), group)
            saved += [x, probs, dropped]
        ctx.save_for_backward(*saved)
        ctx.facts = layout, n_head, n_key, scale, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        layout, n_head, n_key, scale, kept = ctx.facts
        T, heads, D = len(dout), n_head + 2 * n_key, dout.shape[2]
        dqkv = dout.new_empty(T, heads, D)
        dqkv[sum(layout.lengths) :] = 0
        for i, group in enumerate(layout.groups):
            x, probs, dropped = ctx.saved_tensors[3 * i : 3 * i + 3]
            q, k, v = _heads(_wide(x), n_head, n_key)
            do = _wide(_rectangle(dout, group))
            if group.real is not None:
                do = do * group.real[..., None]  # a padded query has no gradient
            do = do.flatten(0, 1)
            ds = _product(do, v.mT, kept).mul_(dropped)  # P * dP: dropped holds P, or 0 where dP is
            ds.addcmul_(probs, ds.sum(-1, keepdim=True), value=-1)
            dx = do.new_empty(heads, *x.shape[1:])
            dq, dk, dv = dx.split([n_head, n_key, n_key])
            _product(ds, k, scale, out=dq.flatten(0, 1))
            for out, a, b, factor in ((dk, ds, q, scale), (dv, dropped, do, kept)):
                if n_key == n_head:
                    _product(a.mT, b, factor, out=out.flatten(0, 1))
                else:
                    each = _product(a.mT, b, factor).view(n_key, -1, *out.shape[1:])
                    torch.sum(each, 1, out=out)
            _write_rows(dqkv, dx, group)
        return dqkv, None, None, None, None


def attention(
    qkv: Tensor,
    layout: Layout,
    n_head: int,
    causal: bool = False,
    dropout: Dropout | None = None,
) -> Tensor:
    """See `minift.kernels.attention.attention_ref`: (T, H + 2 * Hk, D) -> (T, H, D)."""
    check_attention(qkv, layout, n_head)
    return _Attention.apply(qkv, layout, n_head, causal, dropout)
