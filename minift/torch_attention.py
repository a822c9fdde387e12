"""Attention in torch, as fast as it goes on a CPU; `minift.kernels.attention` holds its definition.

Sequences of like length share one batched product, on a padded rectangle (heads, n, L, D). What a
group needs stays in the cache if the group is done with before the next one comes: beyond it, a
pass over memory costs more than the arithmetic. Rows come into a rectangle and go back by a gather
of D numbers at a time: a copy that permutes and converts takes three times as long.
"""

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.attention import check_attention
from .kernels.dropout import Dropout, threshold
from .kernels.layout import Group, Layout


@functools.lru_cache(maxsize=2)  # the layers of a step share them, forward and backward
def _places(layout: Layout, heads: int) -> list[tuple[Tensor, Tensor]]:
    """(cells, rows) of each group: which row of x (T * heads, D) each row of the rectangle
    (heads * n * L, D) is, padding being the first of its sequence; and where in the rectangle each
    row of the group is."""
    head, places = torch.arange(heads, device=layout.cu_seqlens.device), []
    for group in layout.groups:
        size, gather, scatter = group.n * group.length, group.gather, group.scatter
        if gather is None:
            gather = scatter = torch.arange(size, device=head.device)
        cells = head[:, None] + (group.start + gather) * heads
        places.append((cells.flatten(), (scatter[:, None] + head * size).flatten()))
    return places


@functools.lru_cache(maxsize=1)
def _words(layout: Layout, rows: Tensor, columns: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(factor, rest) of each group, (n * L * L,) int32: the words of a head, whose own is u, are
    u * (r0 * x + r2) + (r1 * x + r3) = u * factor + rest. All layers share them: rows and columns
    of a Dropout are never written to."""
    words = []
    for group in layout.groups:
        n, L = group.n, group.length
        r = rows[group.start : group.stop]
        r = r if group.gather is None else r.index_select(0, group.gather)
        r = r.T.contiguous().view(4, n, L, 1)
        factor, rest = (r[:2] * columns[:L]).add_(r[2:]).flatten(1)  # int32 wraps
        words.append((factor, rest ^ -(2**31)))  # turns an unsigned compare signed
    return words


def _rectangle(x: Tensor, cells: Tensor, group: Group) -> Tensor:
    """(T, heads, D) -> (heads * n, L, D)."""
    D = x.shape[-1]
    return x.reshape(-1, D).index_select(0, cells).view(-1, group.length, D)


def _write_rows(out: Tensor, x: Tensor, rows: Tensor, group: Group) -> None:
    """The inverse: (heads * n, L, D) into the rows of `out` (T, heads, D)."""
    D = x.shape[-1]
    out = out[group.start : group.stop].view(-1, D)
    torch.index_select(x.to(out.dtype).view(-1, D), 0, rows, out=out)


def _wide(x: Tensor) -> Tensor:
    """fp32 or fp64: on a CPU softmax and small products are slower in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(x: Tensor, group: Group, n_head: int, n_key: int) -> list[Tensor]:
    """(heads * n, L, D) -> q, k, v (H * n, L, D); keys that heads share are repeated."""
    q, *keys = x.split([group.n * heads for heads in (n_head, n_key, n_key)])
    if n_key == n_head:
        return [q, *keys]
    keys = (x.view(n_key, group.n, *x.shape[1:]) for x in keys)
    return [q, *(x.repeat_interleave(n_head // n_key, 0).view_as(q) for x in keys)]


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


def _dropped(probs: Tensor, dropout: Dropout, factor: Tensor, rest: Tensor) -> Tensor:
    """The probabilities (H * n, L, L) that stay, 0 where one goes: not divided by 1 - p."""
    words = torch.addcmul(rest, factor, dropout.places[dropout.site][:, None])
    # 1 or 0, in place: to compare into another dtype takes many times as long.
    keep = words.ge_(threshold(dropout.p)).view(probs.shape)
    if probs.dtype != torch.float32:
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
        saved, places, ends = [], _places(layout, heads), _places(layout, n_head)
        words = _words(layout, dropout.rows, dropout.columns) if dropout else ()
        for i, group in enumerate(layout.groups):
            x = _wide(_rectangle(qkv, places[i][0], group))
            q, k, v = _heads(x, group, n_head, n_key)
            probs = dropped = _probabilities(_product(q, k.mT, scale), group, causal)
            if dropout is not None:
                dropped = _dropped(probs, dropout, *words[i])
            _write_rows(out, _product(dropped, v, kept), ends[i][1], group)
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
        places, ends = _places(layout, heads), _places(layout, n_head)
        for i, group in enumerate(layout.groups):
            x, probs, dropped = ctx.saved_tensors[3 * i : 3 * i + 3]
            q, k, v = _heads(x, group, n_head, n_key)
            do = _wide(_rectangle(dout, ends[i][0], group))
            if group.real is not None:  # a padded query has no gradient
                do = (do.view(n_head, -1, D) * group.real.view(-1, 1)).view_as(do)
            ds = _product(do, v.mT, kept).mul_(dropped)  # P * dP: dropped holds P, or 0 where dP is
            ds.addcmul_(probs, ds.sum(-1, keepdim=True), value=-1)
            dx = do.new_empty(x.shape)
            dq, dk, dv = dx.split([group.n * count for count in (n_head, n_key, n_key)])
            _product(ds, k, scale, out=dq)
            for out, a, b, factor in ((dk, ds, q, scale), (dv, dropped, do, kept)):
                if n_key == n_head:
                    _product(a.mT, b, factor, out=out)
                else:
                    each = _product(a.mT, b, factor).view(n_key, n_head // n_key, -1)
                    torch.sum(each, 1, out=out.view(n_key, -1))
            _write_rows(dqkv, dx, places[i][1], group)
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
