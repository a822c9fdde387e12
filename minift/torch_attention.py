"""Attention in torch, as fast as it goes on a CPU; `minift.kernels.attention` holds its definition.

Sequences of like length share one batched product, on a padded rectangle (heads, n, L, D). What a
group needs stays in the cache if the group is done with before the next one comes: beyond it, a
pass over memory costs more than the arithmetic. Rows come into a rectangle and go back by a gather
of D numbers at a time: a copy that permutes and converts takes three times as long.

Of long sequences the scores, L x L a head, fit in no cache, and kept for backward they would fill
the memory. Where nothing is dropped torch's own kernel takes them; elsewhere they are made in
pieces and, for backward, made again.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.attention import check_attention
from .kernels.attention_step import check_attention_step
from .kernels.dropout import Dropout, row_words, threshold
from .kernels.key_values import KeyValues
from .kernels.layout import Group, Layout

# Rows of a sequence, measured on one core at D = 64, forward and backward. Causal in bf16 torch's
# kernel is 2.0 times as fast at 1024, as fast at 256, 0.6 times at 128.
LONG = 192
# The same without a backward pass, on an AMD EPYC at D = 32, and causal at D = 64: there torch's
# kernel is as fast at 40, 1.0 to 1.4 times at 48 to 64, 1.2 to 1.7 times at 128 to 192.
LONG_FORWARD = 48
# With dropout pieces are 1.1 to 1.3 times as fast at 1024 if causal, 0.7 times if not. There memory
# is the reason: a layer of 24 heads of 2048 would keep 800 MB.
LONG_DROPPED = 512
BLOCK = 128  # queries of a piece
PIECE = 1 << 17  # scores of a piece: with what is made of them they stay in 2 MB of cache


@functools.lru_cache(maxsize=2)  # the layers of a step share them, forward and backward
def places_of(layout: Layout, heads: int) -> list[tuple[Tensor, Tensor]]:
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
def words_of(
    layout: Layout, rows: Tensor, columns: Tensor, before: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """(factor, rest) of each group, (n * L * (before + L),) int32, where `before` more keys stand
    before a sequence's own: the words of a head, whose own is u, are
    u * (r0 * x + r2) + (r1 * x + r3) = u * factor + rest. All layers share them: rows and columns
    of a Dropout are never written to."""
    words = []
    for group in layout.groups:
        n, L = group.n, group.length
        r = rows[group.start : group.stop]
        r = r if group.gather is None else r.index_select(0, group.gather)
        r = r.T.contiguous().view(4, n, L, 1)
        factor, rest = (r[:2] * columns[: before + L]).add_(r[2:]).flatten(1)  # int32 wraps
        words.append((factor, rest ^ -(2**31)))  # turns an unsigned compare signed
    return words


def rectangle(x: Tensor, cells: Tensor, group: Group) -> Tensor:
    """(T, heads, D) -> (heads * n, L, D)."""
    D = x.shape[-1]
    return x.reshape(-1, D).index_select(0, cells).view(-1, group.length, D)


def write_rows(out: Tensor, x: Tensor, rows: Tensor, group: Group) -> None:
    """The inverse: (heads * n, L, D) into the rows of `out` (T, heads, D)."""
    D = x.shape[-1]
    out = out[group.start : group.stop].view(-1, D)
    torch.index_select(x.to(out.dtype).view(-1, D), 0, rows, out=out)


def widened(x: Tensor) -> Tensor:
    """fp32 or fp64: on a CPU softmax and small products are slower in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def heads_of(x: Tensor, group: Group, n_head: int, n_key: int) -> list[Tensor]:
    """(heads * n, L, D) -> q, k, v (H * n, L, D); keys that heads share are repeated."""
    q, *keys = x.split([group.n * heads for heads in (n_head, n_key, n_key)])
    if n_key == n_head:
        return [q, *keys]
    keys = (x.view(n_key, group.n, *x.shape[1:]) for x in keys)
    return [q, *(x.repeat_interleave(n_head // n_key, 0).view_as(q) for x in keys)]


def product(a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
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


def dropped_of(probs: Tensor, dropout: Dropout, factor: Tensor, rest: Tensor) -> Tensor:
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
        saved, places, ends = [], places_of(layout, heads), places_of(layout, n_head)
        words = words_of(layout, dropout.rows, dropout.columns) if dropout else ()
        for i, group in enumerate(layout.groups):
            x = widened(rectangle(qkv, places[i][0], group))
            q, k, v = heads_of(x, group, n_head, n_key)
            probs = dropped = _probabilities(product(q, k.mT, scale), group, causal)
            if dropout is not None:
                dropped = dropped_of(probs, dropout, *words[i])
            write_rows(out, product(dropped, v, kept), ends[i][1], group)
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
        places, ends = places_of(layout, heads), places_of(layout, n_head)
        for i, group in enumerate(layout.groups):
            x, probs, dropped = ctx.saved_tensors[3 * i : 3 * i + 3]
            q, k, v = heads_of(x, group, n_head, n_key)
            do = widened(rectangle(dout, ends[i][0], group))
            if group.real is not None:  # a padded query has no gradient
                do = (do.view(n_head, -1, D) * group.real.view(-1, 1)).view_as(do)
            ds = product(do, v.mT, kept).mul_(dropped)  # P * dP: dropped holds P, or 0 where dP is
            ds.addcmul_(probs, ds.sum(-1, keepdim=True), value=-1)
            dx = do.new_empty(x.shape)
            dq, dk, dv = dx.split([group.n * count for count in (n_head, n_key, n_key)])
            product(ds, k, scale, out=dq)
            for out, a, b, factor in ((dk, ds, q, scale), (dv, dropped, do, kept)):
                if n_key == n_head:
                    product(a.mT, b, factor, out=out)
                else:
                    each = product(a.mT, b, factor).view(n_key, n_head // n_key, -1)
                    torch.sum(each, 1, out=out.view(n_key, -1))
            write_rows(dqkv, dx, places[i][1], group)
        return dqkv, None, None, None, None


# ------------------------------------------------------------ long sequences


def _undropped(
    qkv: Tensor, layout: Layout, n_head: int, causal: bool, first: bool = False
) -> Tensor:
    """By torch's own kernel, on views where lengths are equal. A causal query sees no padding.
    `first`: of each sequence the first query alone, (B, H, D); no sequence is then empty."""
    T, heads, D = qkv.shape
    n_key, groups, outs = (heads - n_head) // 2, layout.groups, []
    sizes = [group.stop - group.start for group in groups]
    *parts, slack = qkv.split([*sizes, T - sum(sizes)])
    for group, x in zip(groups, parts, strict=True):
        x = x if group.gather is None else x.index_select(0, group.gather)
        x = x.view(group.n, group.length, heads, D).transpose(1, 2)
        q, k, v = x.split([n_head, n_key, n_key], 1)
        q = q[:, :, :1] if first else q
        if n_key != n_head:
            k, v = (x.repeat_interleave(n_head // n_key, 1) for x in (k, v))
        real = None if causal or group.real is None else group.real.log().to(x.dtype)
        real = real if real is None else real[:, None, None]  # 0, or -inf on padding
        out = F.scaled_dot_product_attention(q, k, v, real, is_causal=causal)
        out = out.transpose(1, 2).reshape(-1, n_head, D)
        whole = first or group.scatter is None
        outs.append(out if whole else out.index_select(0, group.scatter))
    return torch.cat(outs if first else [*outs, slack.new_zeros(len(slack), n_head, D)])


@dataclass(frozen=True)
class _Work:
    """A group, taken in pieces: some (head, sequence) pairs, BLOCK of their queries, the keys that
    these see."""

    q: Tensor  # (H * n, L, D), as k and v
    k: Tensor
    v: Tensor
    a: Tensor  # (H * n, L, 1) int32: the words of a row are a * x + b
    b: Tensor
    hidden: Tensor  # causal: (BLOCK, BLOCK), -inf on later keys; else (H * n, 1, L), on padding
    causal: bool
    dropout: Dropout

    @staticmethod
    def of(x: Tensor, group: Group, n_head: int, n_key: int, causal: bool, dropout: Dropout):
        q, k, v = heads_of(x, group, n_head, n_key)
        a, b = (w[group.start : group.stop] for w in row_words(dropout))
        if group.gather is not None:
            a, b = a.index_select(0, group.gather), b.index_select(0, group.gather)
        a, b = (w.T.reshape(-1, group.length, 1) for w in (a, b ^ -(2**31)))  # compared signed
        if causal:
            hidden = q.new_full((BLOCK, BLOCK), -math.inf).triu_(1)
        else:
            real = group.real if group.real is not None else q.new_ones(group.n, group.length)
            hidden = real.log().repeat(n_head, 1)[:, None]
        return _Work(q, k, v, a, b, hidden, causal, dropout)

    def pieces(self) -> Iterator[tuple[slice, slice, int]]:
        """(pairs, queries, end of the keys)"""
        pairs, L, _ = self.q.shape
        for first in range(0, L, BLOCK):
            last = min(L, first + BLOCK)
            end = last if self.causal else L
            count = max(1, PIECE // ((last - first) * end))
            for i in range(0, pairs, count):
                yield slice(i, min(pairs, i + count)), slice(first, last), end

    def probabilities(self, pairs: slice, queries: slice, end: int) -> Tensor:
        q, k = self.q[pairs, queries], self.k[pairs, :end]
        scores = product(q, k.mT, 1 / math.sqrt(q.shape[-1]))
        if self.causal:
            n = q.shape[1]
            scores[..., queries.start :].add_(self.hidden[:n, :n])
        else:
            scores.add_(self.hidden[pairs])
        return torch.softmax(scores, -1, out=scores)

    def keep(self, pairs: slice, queries: slice, end: int) -> Tensor:
        """int32, 1 or 0: see `dropped_of`."""
        words = self.a[pairs, queries] * self.dropout.columns[:end]
        return words.add_(self.b[pairs, queries]).ge_(threshold(self.dropout.p))


def _drop_(x: Tensor, keep: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x.mul_(keep)
    x.view(torch.int32).mul_(keep)  # all bits, or none
    return x


class _LongAttention(torch.autograd.Function):
    """With dropout. Nothing is kept: backward makes the probabilities again."""

    @staticmethod
    def forward(ctx, qkv, layout: Layout, n_head: int, causal: bool, dropout: Dropout):
        T, heads, D = qkv.shape
        n_key, kept = (heads - n_head) // 2, 1 / (1 - dropout.p)
        out = qkv.new_empty(T, n_head, D)
        out[sum(layout.lengths) :] = 0
        places, ends = places_of(layout, heads), places_of(layout, n_head)
        for group, (cells, _), (_, rows) in zip(layout.groups, places, ends, strict=True):
            x = widened(rectangle(qkv, cells, group))
            work = _Work.of(x, group, n_head, n_key, causal, dropout)
            o = torch.empty_like(work.q)
            for pairs, queries, end in work.pieces():
                probs = work.probabilities(pairs, queries, end)
                probs = _drop_(probs, work.keep(pairs, queries, end))
                o[pairs, queries] = product(probs, work.v[pairs, :end], kept)
            write_rows(out, o, rows, group)
        ctx.save_for_backward(qkv)
        ctx.facts = layout, n_head, n_key, causal, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        layout, n_head, n_key, causal, dropout = ctx.facts
        (qkv,) = ctx.saved_tensors
        heads, D = qkv.shape[1:]
        dqkv = dout.new_empty(qkv.shape)
        dqkv[sum(layout.lengths) :] = 0
        places, ends = places_of(layout, heads), places_of(layout, n_head)
        for group, (cells, rows), (queries, _) in zip(layout.groups, places, ends, strict=True):
            work = _Work.of(
                widened(rectangle(qkv, cells, group)), group, n_head, n_key, causal, dropout
            )
            do = widened(rectangle(dout, queries, group))
            if group.real is not None:  # a padded query has no gradient
                do = (do.view(n_head, -1, D) * group.real.view(-1, 1)).view_as(do)
            dq, dk, dv = _long_gradients(work, do)
            if n_key != n_head:
                each = (x.view(n_key, n_head // n_key, -1).sum(1) for x in (dk, dv))
                dk, dv = (x.view(-1, *dq.shape[1:]) for x in each)
            write_rows(dqkv, torch.cat([dq, dk, dv]), rows, group)
        return dqkv, None, None, None, None


def _long_gradients(work: _Work, do: Tensor) -> list[Tensor]:
    """Those of q, k and v, (H * n, L, D) each, from that of the result."""
    dq, dk, dv = (torch.zeros_like(work.q) for _ in range(3))
    scale, kept = 1 / math.sqrt(work.q.shape[-1]), 1 / (1 - work.dropout.p)
    for pairs, queries, end in work.pieces():
        q, k, v = work.q[pairs, queries], work.k[pairs, :end], work.v[pairs, :end]
        upstream = do[pairs, queries]
        probs, keep = (make(pairs, queries, end) for make in (work.probabilities, work.keep))
        dp = _drop_(product(upstream, v.mT, kept), keep)
        ds = torch.ops.aten._softmax_backward_data(dp, probs, -1, dp.dtype)
        dq[pairs, queries] = product(ds, k, scale)
        dk[pairs, :end].baddbmm_(ds.mT, q, alpha=scale)
        dv[pairs, :end].baddbmm_(_drop_(probs, keep).mT, upstream, alpha=kept)
    return [dq, dk, dv]


def attention(
    qkv: Tensor,
    layout: Layout,
    n_head: int,
    causal: bool = False,
    dropout: Dropout | None = None,
) -> Tensor:
    """See `minift.kernels.attention.attention_ref`: (T, H + 2 * Hk, D) -> (T, H, D)."""
    check_attention(qkv, layout, n_head)
    if dropout is None and layout.max_length > (LONG if torch.is_grad_enabled() else LONG_FORWARD):
        return _undropped(qkv, layout, n_head, causal)
    if dropout is not None and layout.max_length > LONG_DROPPED:
        return _LongAttention.apply(qkv, layout, n_head, causal, dropout)
    return _Attention.apply(qkv, layout, n_head, causal, dropout)


def attention_at(
    qkv: Tensor, layout: Layout, n_head: int, rows: Tensor, dropout: Dropout | None = None
) -> Tensor:
    """`attention` at some rows alone: (N, H, D).

    Without a backward pass, of a layout's first rows the other queries are not computed. To train,
    all are: the gradient of a query that nobody reads is 0, but sums of it would be other bits.
    """
    alone = rows is layout.first and dropout is None and min(layout.lengths, default=0) > 0
    if alone and not torch.is_grad_enabled():
        check_attention(qkv, layout, n_head)
        return _undropped(qkv, layout, n_head, False, first=True)
    return attention(qkv, layout, n_head, dropout=dropout).index_select(0, rows)


# ------------------------------------------------------------------ one step of decoding

# What one more call costs, in keys of a slot. Measured on a CPU.
CALL = 64


def _step(q: Tensor, cache: KeyValues, n: int, mask: Tensor | None = None) -> Tensor:
    """q (S, H, D) to the first n keys of each slot -> (S, H, D)."""
    k, v = (x[:, :, :n] for x in cache)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=grouped)
    return out[:, :, 0].contiguous()


def _append(cache: KeyValues, k_new: Tensor, v_new: Tensor, lengths: Tensor, slots: list) -> None:
    """The new keys and values of these slots, each at its length."""
    at = torch.tensor(slots, device=lengths.device)
    if len(slots) < len(lengths):
        k_new, v_new, lengths = k_new[at], v_new[at], lengths[at]
    cache.k[at, :, lengths], cache.v[at, :, lengths] = k_new, v_new


def attention_step_(qkv: Tensor, cache: KeyValues, lengths: Tensor) -> Tensor:
    """See `minift.kernels.attention_step.attention_step_ref`; the cache is written in place.

    Slots share one call, padded to the longest, unless they do better alone. What a slot has
    beyond its end is then read and counts 0; a NaN there would show, and who shows one is done
    again alone. So the lengths of other slots change a result by rounding at most.
    """
    check_attention_step(qkv, cache, lengths)
    S, Hk, L, _ = cache.k.shape
    q, k_new, v_new = qkv.split([qkv.shape[1] - 2 * Hk, Hk, Hk], dim=1)
    known = lengths.tolist()
    counts = {s: n + 1 for s, n in enumerate(known) if 0 <= n < L}
    if counts:
        _append(cache, k_new, v_new, lengths, [*counts])
    longest, total = max(counts.values(), default=0), sum(counts.values())
    if counts and S * longest <= total + CALL * (len(counts) - 1):
        if min(known) == max(known):
            return _step(q, cache, longest)
        mask = torch.arange(longest, device=q.device) <= lengths[:, None]
        out = _step(q, cache, longest, mask[:, None, None])
        sums = out.sum((1, 2)).tolist()
        counts = {s: n for s, n in counts.items() if not math.isfinite(sums[s])}
    else:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for s, n in counts.items():
        own = KeyValues(*(x[s : s + 1] for x in cache))
        out[s] = _step(q[s : s + 1], own, n)[0]
    for s, n in enumerate(known):
        if not 0 <= n < L:
            out[s] = 0 if n < 0 else math.nan
    return out
