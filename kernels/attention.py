"""Attention over packed sequences of different lengths. The gradient is in attention_backward.py.

Math        For every sequence and head:
                P = softmax(Q K^T / sqrt(D) + mask, rows),   O = dropout(P) V

Layout      Sequences are laid end to end on one token axis; nothing is padded. The product of the
            q, k, v projection is read as it lies: heads of q, then of k, then of v.
                qkv          (T, H + 2 * Hk, D)     H query heads, Hk key heads; Hk divides H
                out          (T, H, D)              rows of no sequence are 0

Tiling      Lengths 3 and 5, tiles of 2 x 2, causal. '#' computed, '/' computed under a mask, '.'
            never visited: tiles above the diagonal and between sequences cost nothing.

                          keys  0 1 2 | 3 4 5 6 7
                        0,1     / / . | . . . . .      a tile of queries
                queries 2       # # / | . . . . .      a tile
                        ------------- + ---------
                        3,4     . . . | / / . . .      a tile
                        5,6     . . . | # # / / .      a tile
                        7       . . . | # # # # /      a tile

            Work stands in a list of spans, made when the batch was (layout.py). A program does a
            tile of a long sequence, or all tiles of a short one, for one head. The tiles of a
            sequence depend on its own length only.

Softmax     A row q walks over its keys in blocks and cannot know its maximum before the end. With
            s_j = q . k_j and, for base 2, c = log2(e) / sqrt(D), it keeps for the keys so far
                m = max c s_j,   l = sum 2^(c s_j - m),   acc = sum 2^(c s_j - m) v_j
            and when a block raises the maximum to m', what it has is in too large a unit:
                l   <- l   * 2^(m - m') + sum over the block of 2^(c s_j - m')
                acc <- acc * 2^(m - m') + sum over the block of 2^(c s_j - m') v_j
            At the end O = acc / l, and lse = m + log2(l) is kept, one number a row: the gradient
            makes P again as 2^(c s - lse). The first m is the lowest float and not -inf, so a block
            of masked scores leaves no NaN; a row without keys ends with l = 0, O = 0, lse = inf.
            Dropout takes away from acc, not from l: it comes after the softmax.

Traffic     Forward floor: read Q, K, V and write O once = (2 * H + 2 * Hk) * T * D * e bytes, and
            4 * T * H of lse. Scores never reach memory; that is the whole point. Long sequences
            are bound by arithmetic: 4 * D flop and one exponential a score, of which there are
            H * sum_b L_b^2 (half if causal); at D = 64 the two cost the same on an H100.

Source      Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; Dao 2023, FlashAttention-2,
            arXiv:2307.08691, algorithm 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245;
            dropout on the probabilities as in BERT, arXiv:1810.04805.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_backward import attention_gradient
from .attention_tiles import (
    CASES,
    LOG2E,
    LOWEST,
    aligned,
    declared,
    jit,
    key_range,
    launch,
    load_rows,
    rows_of,
    span_of,
    store_rows,
    strides,
    tile,
)
from .dropout import Dropout, check_dropout, dropout_arguments, place_of, words_of
from .launch import can_launch
from .layout import SPAN, Layout

# ---------------------------------------------------------------- definition


def _probabilities(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """(H, q_len, k_len) of one sequence; a query that sees no key has none."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if causal:  # the last query sees all keys
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + len(k) - len(q))
        scores = scores.masked_fill(hidden, -math.inf)
        return scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0)
    return scores.softmax(-1)


def attention_kv_ref(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False,
    keep: Tensor | None = None, p: float = 0.0,
) -> Tensor:
    """The definition: one dense softmax a sequence, in the dtype of `q`.

    Args:
        q: (T, H, D) float.
        k, v: (Tk, Hk, D); query head h uses key head h // (H / Hk).
        layout: where the sequences lie, of T rows of queries and Tk of keys.
        causal: the last query of a sequence sees all its keys, the one before it one less, ...
        keep: (T, H, L) bool, L at least the most keys: probabilities that stay. A row is a query,
            a column the position of a key in its sequence.
        p: the probability that `keep` was drawn with.

    Returns:
        (T, H, D).
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out, start, k_start = [], 0, 0
    for length, k_length in zip(layout.lengths, layout.key_lengths, strict=True):
        rows, keys = slice(start, start + length), slice(k_start, k_start + k_length)
        probs = _probabilities(q[rows], k[keys], causal)
        if keep is not None:
            probs = probs * keep[rows, :, :k_length].transpose(0, 1) / (1 - p)
        out.append(torch.einsum("hij,jhd->ihd", probs, v[keys]))
        start, k_start = start + length, k_start + k_length
    return torch.cat([*out, torch.zeros_like(q[start:])])


def attention_ref(
    qkv: Tensor, layout: Layout, n_head: int, *, causal: bool = False,
    keep: Tensor | None = None, p: float = 0.0,
) -> Tensor:
    """The definition where q, k and v come packed: qkv (T, H + 2 * Hk, D), H = n_head, to
    (T, H, D). See `attention_kv_ref`."""
    return attention_kv_ref(*split_heads(qkv, n_head), layout, causal=causal, keep=keep, p=p)


def attention_probs(
    qkv: Tensor, layout: Layout, n_head: int, *, causal: bool = False,
    heads: tuple[int, ...] | None = None,
) -> list[Tensor]:
    """What each token looks at: the probabilities, made again. To look at, not to train with.

    Args:
        qkv, layout, n_head, causal: as in `attention`.
        heads: which of the n_head; default all.

    Returns:
        For each sequence (len(heads), L, L) fp32: row i is the distribution of query i over keys.

    Raises:
        ValueError: as `attention`; or a head that is not there.
    """
    check_attention(qkv, layout, n_head)
    heads = tuple(range(n_head)) if heads is None else tuple(heads)
    if not all(0 <= h < n_head for h in heads):
        raise ValueError(f"expected heads in 0 to {n_head - 1}, got {list(heads)}")
    q, k, _ = split_heads(qkv.detach().float(), n_head)
    q, k = q[:, heads], k[:, [h // (n_head // k.shape[1]) for h in heads]]
    parts = zip(*(x[: sum(layout.lengths)].split(layout.lengths) for x in (q, k)), strict=True)
    return [_probabilities(q, k, causal) for q, k in parts]


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Views q (T, H, D), k and v (T, Hk, D)."""
    n_key = (qkv.shape[1] - n_head) // 2
    return qkv.split([n_head, n_key, n_key], dim=1)


def check_attention(qkv: Tensor, layout: Layout, n_head: int) -> None:
    """Raises ValueError when `qkv` does not fit the layout or the head count."""
    if qkv.ndim != 3 or qkv.shape[0] != layout.rows:
        wanted = f"qkv ({layout.rows}, H + 2 * Hk, D), heads of q, then of k, then of v"
        raise ValueError(f"expected {wanted}, got {tuple(qkv.shape)}")
    n_key, odd = divmod(qkv.shape[1] - n_head, 2)
    if n_head < 1 or odd or n_key < 1 or n_head % n_key:
        raise ValueError(f"expected H + 2 * Hk heads, Hk dividing H = {n_head}, got {qkv.shape[1]}")
    if layout.key_rows != layout.rows or layout.key_lengths != layout.lengths:
        raise ValueError("expected a layout whose keys are its queries: use attention_kv")


def check_attention_kv(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    """Raises ValueError when q, k and v do not fit the layout or each other."""
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"expected q (T, H, D), k and v (Tk, Hk, D), got {shapes}")
    if (len(q), len(k)) != (layout.rows, layout.key_rows):
        rows = f"{layout.rows} rows of q and {layout.key_rows} of k and v"
        raise ValueError(f"expected {rows}, got {len(q)} and {len(k)}")
    if min(q.shape[1], k.shape[1]) < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"expected Hk dividing H, got H = {q.shape[1]}, Hk = {k.shape[1]}")


# ------------------------------------------------------------------- kernels


@triton.jit
def _forward_tile(
    q, k, v, out, lse_ptr, dropout, first, q_len, k_len,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    words_ptr, place, columns_ptr, threshold, kept = dropout
    i = first + tl.arange(0, BLOCK_M)
    sees, whole, end = key_range(first, q_len, k_len, CAUSAL, BLOCK_M, BLOCK_N)
    q_tile = load_rows(q, first, q_len, BLOCK_M, D)
    if columns_ptr is not None:
        a, b = words_of(words_ptr, place, i, i < q_len)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros(q_tile.shape, tl.float32)
    for MASKED in tl.static_range(2):  # first the keys that all rows see
        for start in range(whole if MASKED else 0, end if MASKED else whole, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k, start, k_len, BLOCK_N, D)
            v_tile = load_rows(v, start, k_len, BLOCK_N, D)
            s = tl.dot(q_tile, tl.trans(k_tile))
            if MASKED:
                s = tl.where(j[None, :] < sees[:, None], s, -float("inf"))
            c: tl.constexpr = D**-0.5 * LOG2E
            m_new = tl.maximum(m, tl.max(s, 1) * c)
            p = tl.exp2(s * c - m_new[:, None])
            rescale = tl.exp2(m - m_new)
            l = l * rescale + tl.sum(p, 1)
            if columns_ptr is not None:
                x = tl.load(columns_ptr + j, mask=j < k_len) if MASKED else tl.load(columns_ptr + j)
                word = a[:, None] * x[None, :] + b[:, None]
                # Taken away rather than selected: LLVM moves the cast below into a selection and
                # packs the comparisons into bits, a sixth more instructions in this loop.
                p -= tl.where(word >= threshold, 0.0, p)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None])
            m = m_new
    seen = l != 0
    factor = 1 / tl.where(seen, l, 1)
    if columns_ptr is not None:
        factor *= kept
    store_rows(out, acc * factor[:, None], first, q_len, BLOCK_M, D)
    lse = tl.where(seen, m + tl.log2(tl.where(seen, l, 1)), float("inf"))
    tl.store(lse_ptr + i, lse, mask=i < q_len)


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, spans_ptr,
    words_ptr, places_ptr, columns_ptr, threshold, kept,
    q_row, q_head, k_row, k_head, v_row, v_head, T, H,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """SPLIT programs a span, with a tile of queries each; with SPLIT 0, one for all its tiles."""
    program = tl.program_id(0)
    PARTS: tl.constexpr = SPLIT if SPLIT else 1
    first, q_begin, q_len, k_begin, k_len, head = span_of(spans_ptr, program // PARTS, H)
    if words_ptr is not None:
        words_ptr += q_begin * 4
    dropout = words_ptr, place_of(places_ptr, head), columns_ptr, threshold, kept
    q = rows_of(q_ptr, q_row, q_begin, q_head, head, ALIGNED)
    k = rows_of(k_ptr, k_row, k_begin, k_head, head // GROUP, ALIGNED)
    v = rows_of(v_ptr, v_row, k_begin, v_head, head // GROUP, ALIGNED)
    out = rows_of(out_ptr, H * D, q_begin, D, head, ALIGNED)
    lse_ptr += head * T + q_begin
    if SPLIT:
        first += program % PARTS * BLOCK_M
        if first < q_len:
            _forward_tile(
                q, k, v, out, lse_ptr, dropout, first, q_len, k_len, CAUSAL, D, BLOCK_M, BLOCK_N
            )
    else:
        for start in range(0, q_len, BLOCK_M):
            _forward_tile(
                q, k, v, out, lse_ptr, dropout, start, q_len, k_len, CAUSAL, D, BLOCK_M, BLOCK_N
            )


# ------------------------------------------------------------------ autograd


_LONG = {  # see `tile`
    (32, 2): ((64, 64, 4, 3), (64, 64, 4, 3)),
    (64, 2): ((128, 64, 8, 3), (64, 64, 4, 3, 168, {"BLOCK_N": 32})),
    (128, 2): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (256, 2): ((64, 32, 8, 2), (64, 32, 8, 2)),
    (32, 4): ((64, 64, 4, 2), (64, 32, 4, 2)),
    (64, 4): ((64, 32, 4, 2), (64, 32, 4, 2)),
    (128, 4): ((64, 32, 8, 2), (64, 32, 8, 2)),
}
_SHORT = {
    (32, 2): ((32, 32, 2, 1, 128), (32, 32, 2, 1, 128)),
    (64, 2): ((32, 32, 2, 1), (32, 32, 2, 1, 168, {"maxnreg": 255})),
    (128, 2): ((32, 32, 2, 1), (32, 32, 2, 1)),
    (256, 2): ((32, 32, 4, 1), (32, 32, 4, 1)),
    (32, 4): ((32, 32, 2, 1), (32, 32, 2, 1)),
    (64, 4): ((32, 32, 2, 1), (32, 32, 2, 1)),
    (128, 4): ((32, 32, 4, 1), (32, 32, 4, 1, 255)),
}


def _tile(D, dtype, short, dropout):
    options = tile(_SHORT if short else _LONG, D, dtype, dropout)
    return options | {"SPLIT": 0 if short else SPAN // options["BLOCK_M"]}


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out (T, H, D), and lse (H, T) in units of ln 2."""
    T, H, D = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(H, T, dtype=torch.float32)
    arguments = *dropout_arguments(dropout), *strides(q, k, v), T, H
    shape = {"GROUP": H // k.shape[1], "CAUSAL": causal, "ALIGNED": aligned(q, k, v, out), "D": D}
    for spans, short in ((layout.long, False), (layout.short, True)):
        options = _tile(D, q.dtype, short, dropout is not None)
        grid = len(spans) * H * (options["SPLIT"] or 1)
        launch(_forward_kernel, grid, q, k, v, out, lse, spans, *arguments, **shape, **options)
    return out, lse


def gradient_rows(dout: Tensor) -> Tensor:
    """A gradient as kernels read it; that of a sum or a mean has strides of 0."""
    return dout if dout.stride(2) == 1 and dout.stride(0) <= 2**24 else dout.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, layout, n_head, causal, dropout):
        out, lse = attention_forward(*split_heads(qkv, n_head), layout, causal, dropout)
        ctx.save_for_backward(qkv, out, lse)
        ctx.facts = layout, causal, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse = ctx.saved_tensors
        n_head, dqkv = out.shape[1], qkv.new_empty(qkv.shape)
        saved = (*split_heads(qkv, n_head), out, lse)
        attention_gradient(saved, gradient_rows(dout), split_heads(dqkv, n_head), *ctx.facts)
        return dqkv, None, None, None, None


class _AttentionKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, causal, dropout):
        out, lse = attention_forward(q, k, v, layout, causal, dropout)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.facts = layout, causal, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        grads = tuple(x.new_empty(x.shape) for x in ctx.saved_tensors[:3])
        attention_gradient(ctx.saved_tensors, gradient_rows(dout), grads, *ctx.facts)
        return *grads, None, None, None


# -------------------------------------------------------------------- public


def check_kernel(x: Tensor, layout: Layout) -> None:
    """Raises ValueError when the kernels cannot read `x` (T, heads, D)."""
    D, half = x.shape[2], x.dtype in (torch.float16, torch.bfloat16)
    if not half and x.dtype != torch.float32:
        raise ValueError(f"expected fp32, fp16 or bf16, got {x.dtype}")
    if not 1 <= D <= (256 if half else 128):
        raise ValueError(f"expected heads of at most 256 (fp32: 128), got {D}")
    if x.stride(2) != 1:
        raise ValueError(f"expected unit stride along D, got {x.stride()}: call .contiguous()")
    if x.stride(0) > 2**24:  # within a tile an offset has 32 bits
        raise ValueError(f"expected rows at most 2^24 elements apart, got {x.stride(0)}")
    if not can_launch(x.device):
        raise ValueError(f"expected tensors on a GPU, got {x.device}")
    if layout.cu_seqlens.device != x.device:
        raise ValueError(f"expected a layout on {x.device}: call layout.to")


def attention(
    qkv: Tensor, layout: Layout, n_head: int, causal: bool = False, dropout: Dropout | None = None
) -> Tensor:
    """Attention of a packed projection; nothing is copied on the way in or out.

    Args:
        qkv: (T, H + 2 * Hk, D) fp32, fp16 or bf16: heads of q, then of k, then of v. Unit stride
            along D, any strides of rows and heads. D up to 256, in fp32 to 128; of a multiple of 8,
            16 bytes are read at a time.
        layout: where the sequences lie, on the same device.
        n_head: H, heads of the queries.
        causal: a row sees itself and the rows before it.
        dropout: on the probabilities; None drops nothing.

    Returns:
        (T, H, D) in the dtype of qkv; rows of no sequence are 0.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    check_attention(qkv, layout, n_head)
    check_kernel(qkv, layout)
    check_dropout(dropout, layout.rows, max(layout.key_lengths, default=0), n_head)
    return _Attention.apply(qkv, layout, n_head, causal, dropout)


def attention_kv(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool = False,
    dropout: Dropout | None = None,
) -> Tensor:
    """Attention to keys and values of their own: a cache, a prefix, another text.

    Args:
        q: (T, H, D), as qkv in `attention`.
        k, v: (Tk, Hk, D) in the dtype of q; Hk divides H.
        layout: of T rows of queries and Tk of keys.
        causal: the last query of a sequence sees all its keys, the one before it one less, ...
        dropout: as in `attention`; it has a column for each key of a sequence.

    Returns:
        (T, H, D); rows of no sequence, and of queries that see no key, are 0.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    check_attention_kv(q, k, v, layout)
    for x in (q, k, v):
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"expected k, v in {q.dtype} on {q.device}, got {x.dtype}, {x.device}")
        check_kernel(x, layout)
    check_dropout(dropout, layout.rows, max(layout.key_lengths, default=0), q.shape[1])
    return _AttentionKV.apply(q, k, v, layout, causal, dropout)


LAUNCHES = tuple(
    declared(_forward_kernel, case, _tile(case.D, case.dtype, case.short, case.dropout))
    for case in CASES
)
