"""The gradient of attention; the forward pass and the definition are in attention.py.

Math        Of a query row the forward pass left O and lse = log2 sum_j 2^(c S_ij), where S = Q K^T
            and c = log2(e) / sqrt(D). Z is P after dropout.
                P_ij    = 2^(c S_ij - lse_i)                     no maximum is needed any more
                dV_j    = sum_i Z_ij dO_i
                dP_ij   = dropout(dO_i . V_j)
                delta_i = sum_j P_ij dP_ij = sum_j Z_ij dO_i . V_j = dO_i . O_i
                dS_ij   = P_ij (dP_ij - delta_i)                 the derivative of the softmax
                dQ_i    = sum_j dS_ij K_j / sqrt(D),   dK_j = sum_i dS_ij Q_i / sqrt(D)

Order       Every row of a gradient is the sum of one program, in the order of its loop: no atomics,
            so two runs are equal bit for bit. The price is 7 products in place of 5:

                _dq_kernel     owns queries, walks over keys      S, dP, dQ      and finds delta
                _dkv_kernel    owns keys, walks over queries      S, dV, dP, dK

            The second works on S^T = K Q^T, whose tiles are what dV = Z^T dO and dK = dS^T Q take
            as they are: on Hopper, triton 3.4 to 3.7.0 gets a product wrong of which an operand is
            the transposed result of another (flash-linear-attention, issues 640 and 826). All it
            must know of a query comes in one record, written by the first: lse, delta, and the
            words of its dropout.

            A short sequence is one program for both: the second half finds its tiles in the cache.

Traffic     Floor: Q, K, V, O, dO read and dQ, dK, dV written once, (4 * H + 4 * Hk) * T * D * e
            bytes. Long sequences are bound by arithmetic: 14 * D flop a score.

Source      Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    CASES,
    LOG2E,
    aligned,
    declared,
    jit,
    key_range,
    keys_seen,
    launch,
    load_rows,
    rows_of,
    span_of,
    store_rows,
    strides,
    tile,
)
from .dropout import Dropout, dropout_arguments, place_of, words_of
from .layout import SPAN, Layout


@triton.jit
def _store_record(record_ptr, lse, delta, a, b, i, q_len, FIELDS: tl.constexpr):
    """(lse, delta) of queries i; with dropout (lse, a, delta, b)."""
    if FIELDS == 2:
        at = record_ptr + i[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(at, tl.join(lse, delta), mask=(i < q_len)[:, None])
    else:
        words = tl.join(a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True))
        record = tl.reshape(tl.join(tl.join(lse, delta), words), (i.shape[0], 4))
        at = record_ptr + i[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(at, record, mask=(i < q_len)[:, None])


@triton.jit
def _load_record(record_ptr, i, q_len, FIELDS: tl.constexpr):
    """lse, delta, a and b of queries i; past the last one 0."""
    at = record_ptr + i[:, None] * FIELDS + tl.arange(0, FIELDS)[None, :]
    record = tl.load(at, mask=(i < q_len)[:, None], other=0.0)
    if FIELDS == 2:
        lse, delta = tl.split(record)
        return lse, delta, i, i  # no words
    else:
        statistics, words = tl.split(tl.reshape(record, (i.shape[0], 2, 2)))
        lse, delta = tl.split(statistics)
        a, b = tl.split(words)
        return lse, delta, a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)


@triton.jit
def _dq_tile(
    q, k, v, out, dout, dq, lse_ptr, record_ptr, dropout, first, q_len, k_len,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    words_ptr, place, columns_ptr, threshold, kept = dropout
    i = first + tl.arange(0, BLOCK_M)
    sees, whole, end = key_range(first, q_len, k_len, CAUSAL, BLOCK_M, BLOCK_N)
    q_tile = load_rows(q, first, q_len, BLOCK_M, D)
    do = load_rows(dout, first, q_len, BLOCK_M, D)
    o = load_rows(out, first, q_len, BLOCK_M, D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + i, mask=i < q_len, other=0.0)
    FIELDS: tl.constexpr = 2 if columns_ptr is None else 4
    a, b = i, i  # no words
    if columns_ptr is not None:
        a, b = words_of(words_ptr, place, i, i < q_len)
    _store_record(record_ptr, lse, delta, a, b, i, q_len, FIELDS)
    acc = tl.zeros(q_tile.shape, tl.float32)
    for MASKED in tl.static_range(2):
        for start in range(whole if MASKED else 0, end if MASKED else whole, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k, start, k_len, BLOCK_N, D)
            v_tile = load_rows(v, start, k_len, BLOCK_N, D)
            s = tl.dot(q_tile, tl.trans(k_tile)) * (D**-0.5 * LOG2E)
            if MASKED:
                s = tl.where(j[None, :] < sees[:, None], s, -float("inf"))
            p = tl.exp2(s - lse[:, None])
            dp = tl.dot(do, tl.trans(v_tile))
            if columns_ptr is not None:
                x = tl.load(columns_ptr + j, mask=j < k_len) if MASKED else tl.load(columns_ptr + j)
                word = a[:, None] * x[None, :] + b[:, None]
                dp *= tl.where(word >= threshold, kept, 0.0)
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
    store_rows(dq, acc * D**-0.5, first, q_len, BLOCK_M, D)


@triton.jit
def _dkv_tile(
    q, k, v, dout, dk, dv, record_ptr, q_head, dout_head, record_head,
    columns_ptr, threshold, kept, first, q_len, k_len,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 2 if columns_ptr is None else 4
    j = first + tl.arange(0, BLOCK_N)
    k_tile = load_rows(k, first, k_len, BLOCK_N, D)
    v_tile = load_rows(v, first, k_len, BLOCK_N, D)
    if columns_ptr is not None:
        x = tl.load(columns_ptr + j, mask=j < k_len, other=0)
    dk_acc = tl.zeros(k_tile.shape, tl.float32)
    dv_acc = tl.zeros(k_tile.shape, tl.float32)
    # Queries from `begin` on see some of these keys; from `whole` on all, or are past the end.
    begin, whole = 0, 0
    if CAUSAL:
        blocks = tl.cdiv(q_len, BLOCK_M)
        begin = tl.maximum(first - (k_len - q_len), 0) // BLOCK_M * BLOCK_M
        sees_all = tl.maximum(first + BLOCK_N - 1 - (k_len - q_len), 0)
        whole = tl.minimum(tl.cdiv(sees_all, BLOCK_M), blocks) * BLOCK_M
    for g in range(GROUP):
        group = tl.cast(g, tl.int64)
        q_of = rows_of(q[0], q[1], 0, q_head, group, ALIGNED)
        do_of = rows_of(dout[0], dout[1], 0, dout_head, group, ALIGNED)
        for MASKED in tl.static_range(1 if CAUSAL else 0, -1, -1):
            for start in range(begin if MASKED else whole, whole if MASKED else q_len, BLOCK_M):
                i = start + tl.arange(0, BLOCK_M)
                q_tile = load_rows(q_of, start, q_len, BLOCK_M, D)
                do = load_rows(do_of, start, q_len, BLOCK_M, D)
                lse, delta, a, b = _load_record(
                    record_ptr + group * record_head, i, q_len, FIELDS
                )
                s = tl.dot(k_tile, tl.trans(q_tile)) * (D**-0.5 * LOG2E)
                if MASKED:
                    sees = keys_seen(i, q_len, k_len, CAUSAL)
                    s = tl.where(j[:, None] < sees[None, :], s, -float("inf"))
                p = tl.exp2(s - lse[None, :])
                dp = tl.dot(v_tile, tl.trans(do))
                z = p
                if columns_ptr is not None:
                    word = x[:, None] * a[None, :] + b[None, :]
                    factor = tl.where(word >= threshold, kept, 0.0)
                    z, dp = p * factor, dp * factor
                dv_acc = tl.dot(z.to(do.dtype), do, dv_acc)
                ds = p * (dp - delta[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc)
    store_rows(dk, dk_acc * D**-0.5, first, k_len, BLOCK_N, D)
    store_rows(dv, dv_acc, first, k_len, BLOCK_N, D)


@jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, lse_ptr, record_ptr, spans_ptr,
    words_ptr, places_ptr, columns_ptr, threshold, kept,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, dq_row, dq_head, T, H,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 2 if columns_ptr is None else 4
    program = tl.program_id(0)
    first, q_begin, q_len, k_begin, k_len, head = span_of(spans_ptr, program // SPLIT, H)
    first += program % SPLIT * BLOCK_M
    at = head * T + q_begin
    if words_ptr is not None:
        words_ptr += q_begin * 4
    dropout = words_ptr, place_of(places_ptr, head), columns_ptr, threshold, kept
    if first < q_len:
        _dq_tile(
            rows_of(q_ptr, q_row, q_begin, q_head, head, ALIGNED),
            rows_of(k_ptr, k_row, k_begin, k_head, head // GROUP, ALIGNED),
            rows_of(v_ptr, v_row, k_begin, v_head, head // GROUP, ALIGNED),
            rows_of(out_ptr, H * D, q_begin, D, head, ALIGNED),
            rows_of(dout_ptr, dout_row, q_begin, dout_head, head, ALIGNED),
            rows_of(dq_ptr, dq_row, q_begin, dq_head, head, ALIGNED),
            lse_ptr + at, record_ptr + at * FIELDS,
            dropout, first, q_len, k_len, CAUSAL, D, BLOCK_M, BLOCK_N,
        )


@jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, record_ptr, spans_ptr,
    columns_ptr, threshold, kept,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head,
    dk_row, dk_head, dv_row, dv_head, T, H,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 2 if columns_ptr is None else 4
    program = tl.program_id(0)
    first, q_begin, q_len, k_begin, k_len, head = span_of(spans_ptr, program // SPLIT, H // GROUP)
    first += program % SPLIT * BLOCK_N
    q_first = head * GROUP
    if first < k_len:
        _dkv_tile(
            rows_of(q_ptr, q_row, q_begin, q_head, q_first, ALIGNED),
            rows_of(k_ptr, k_row, k_begin, k_head, head, ALIGNED),
            rows_of(v_ptr, v_row, k_begin, v_head, head, ALIGNED),
            rows_of(dout_ptr, dout_row, q_begin, dout_head, q_first, ALIGNED),
            rows_of(dk_ptr, dk_row, k_begin, dk_head, head, ALIGNED),
            rows_of(dv_ptr, dv_row, k_begin, dv_head, head, ALIGNED),
            record_ptr + (q_first * T + q_begin) * FIELDS,
            q_head, dout_head, tl.cast(T, tl.int64) * FIELDS,
            columns_ptr, threshold, kept, first, q_len, k_len,
            GROUP, CAUSAL, ALIGNED, D, BLOCK_M, BLOCK_N,
        )


@jit
def _short_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr, record_ptr, spans_ptr,
    words_ptr, places_ptr, columns_ptr, threshold, kept,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head,
    dq_row, dq_head, dk_row, dk_head, dv_row, dv_head, T, H,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 2 if columns_ptr is None else 4
    _, q_begin, q_len, k_begin, k_len, head = span_of(spans_ptr, tl.program_id(0), H // GROUP)
    k = rows_of(k_ptr, k_row, k_begin, k_head, head, ALIGNED)
    v = rows_of(v_ptr, v_row, k_begin, v_head, head, ALIGNED)
    if words_ptr is not None:
        words_ptr += q_begin * 4
    for g in range(GROUP):
        h = head * GROUP + g
        at = h * T + q_begin
        dropout = words_ptr, place_of(places_ptr, h), columns_ptr, threshold, kept
        for first in range(0, q_len, BLOCK):
            _dq_tile(
                rows_of(q_ptr, q_row, q_begin, q_head, h, ALIGNED), k, v,
                rows_of(out_ptr, H * D, q_begin, D, h, ALIGNED),
                rows_of(dout_ptr, dout_row, q_begin, dout_head, h, ALIGNED),
                rows_of(dq_ptr, dq_row, q_begin, dq_head, h, ALIGNED),
                lse_ptr + at, record_ptr + at * FIELDS, dropout,
                first, q_len, k_len, CAUSAL, D, BLOCK, BLOCK,
            )
    tl.debug_barrier()  # the records are written: by other threads of this program
    h = head * GROUP
    for first in range(0, k_len, BLOCK):
        _dkv_tile(
            rows_of(q_ptr, q_row, q_begin, q_head, h, ALIGNED), k, v,
            rows_of(dout_ptr, dout_row, q_begin, dout_head, h, ALIGNED),
            rows_of(dk_ptr, dk_row, k_begin, dk_head, head, ALIGNED),
            rows_of(dv_ptr, dv_row, k_begin, dv_head, head, ALIGNED),
            record_ptr + (h * T + q_begin) * FIELDS,
            q_head, dout_head, tl.cast(T, tl.int64) * FIELDS,
            columns_ptr, threshold, kept, first, q_len, k_len,
            GROUP, CAUSAL, ALIGNED, D, BLOCK, BLOCK,
        )


def attention_gradient(
    saved: tuple[Tensor, ...], dout: Tensor, grads: tuple[Tensor, ...], layout: Layout,
    causal: bool, dropout: Dropout | None,
) -> None:
    """Writes dq, dk and dv.

    Args:
        saved: q, k, v, out and lse of the forward pass.
        dout: as out; unit stride along D.
        grads: dq, dk, dv, of the shapes of q, k, v and unit stride along D.
        layout, causal, dropout: as in the forward pass.
    """
    q, k, v, out, lse = saved
    dq, dk, dv = grads
    T, H, D = q.shape
    n_key, words = k.shape[1], dropout_arguments(dropout)
    record = lse.new_empty(H, T, 4 if dropout else 2)
    shape = {"GROUP": H // n_key, "CAUSAL": causal, "D": D}
    shape["ALIGNED"] = aligned(q, k, v, out, dout, *grads)
    tiles = {
        role: _tile(role, D, q.dtype, dropout is not None, causal, H // n_key)
        for role in ("short", "dq", "dkv")
    }
    launch(
        _short_kernel, len(layout.short) * n_key, q, k, v, out, dout, dq, dk, dv, lse, record,
        layout.short, *words, *strides(q, k, v, dout, dq, dk, dv), T, H, **shape, **tiles["short"],
    )
    launch(
        _dq_kernel, len(layout.long) * H * tiles["dq"]["SPLIT"],
        q, k, v, out, dout, dq, lse, record,
        layout.long, *words, *strides(q, k, v, dout, dq), T, H, **shape, **tiles["dq"],
    )
    launch(
        _dkv_kernel, len(layout.long_keys) * n_key * tiles["dkv"]["SPLIT"],
        q, k, v, dout, dk, dv, record, layout.long_keys, *words[2:],
        *strides(q, k, v, dout, dk, dv), T, H, **shape, **tiles["dkv"],
    )


_HALF, _ROOM = {"BLOCK_M": 32}, {"maxnreg": 255}  # before Hopper, or it spills
_TILES = {  # see `tile`; under a causal mask dk, dv have two loops
    "dq": {
        (32, 2): ((64, 64, 4, 3), (64, 64, 4, 3)),
        (64, 2): ((128, 64, 8, 3), (64, 64, 4, 3)),
        (128, 2): ((128, 32, 8, 2), (128, 32, 8, 2)),
        (256, 2): ((32, 32, 4, 2), (32, 32, 4, 2)),
        (32, 4): ((64, 32, 4, 2), (64, 32, 4, 2)),
        (64, 4): ((64, 32, 4, 2), (64, 32, 4, 2)),
        (128, 4): ((32, 32, 4, 2), (32, 32, 4, 2)),
    },
    "dkv": {
        (32, 2): ((64, 64, 4, 2), (64, 64, 4, 2)),
        (64, 2): ((64, 64, 4, 2, None, _HALF), (64, 64, 4, 2, None, _HALF)),
        (128, 2): ((64, 64, 8, 2), (64, 64, 8, 2)),
        (256, 2): ((64, 32, 8, 1), (32, 32, 8, 2)),
        (32, 4): ((32, 64, 4, 2), (32, 64, 4, 2)),
        (64, 4): ((32, 32, 4, 2), (32, 32, 4, 2)),
        (128, 4): ((32, 32, 4, 1), (32, 32, 4, 1)),
    },
    "dkv causal": {
        (32, 2): ((64, 64, 4, 2), (64, 64, 4, 2)),
        (64, 2): ((64, 64, 4, 2), (64, 64, 4, 2)),
        (128, 2): ((32, 64, 8, 2), (32, 64, 8, 2)),
        (256, 2): ((32, 32, 8, 2), (32, 32, 8, 2)),
        (32, 4): ((32, 64, 4, 2), (32, 64, 4, 2)),
        (64, 4): ((32, 32, 4, 2), (32, 32, 4, 2)),
        (128, 4): ((32, 32, 4, 1), (32, 32, 4, 1)),
    },
    "short": {
        (32, 2): ((32, 32, 2, 1), (32, 32, 2, 1, 168)),
        (64, 2): ((32, 32, 4, 1, None, _ROOM), (32, 32, 4, 1)),
        (128, 2): ((32, 32, 4, 1), (32, 32, 4, 1)),
        (256, 2): ((16, 16, 4, 1), (16, 16, 4, 1)),
        (32, 4): ((32, 32, 4, 1), (32, 32, 4, 1)),
        (64, 4): ((32, 32, 4, 1), (32, 32, 4, 1)),
        (128, 4): ((32, 32, 4, 1), (32, 32, 8, 1)),
    },
    # Without a limit the compiler sets its own, for one more program on an SM, and spills.
    "short causal": {
        (32, 2): ((32, 32, 2, 1, 255), (32, 32, 2, 1, 255)),
        (64, 2): ((32, 32, 2, 1, 255), (32, 32, 2, 1, 255)),
        (128, 2): ((32, 32, 4, 1, 255), (32, 32, 4, 1, 255)),
        (256, 2): ((16, 16, 4, 1), (16, 16, 4, 1)),
        (32, 4): ((32, 32, 4, 1), (32, 32, 4, 1)),
        (64, 4): ((32, 32, 4, 1), (32, 32, 4, 1)),
        (128, 4): ((32, 32, 4, 1), (32, 32, 8, 1)),
    },
}


def _tile(role, D, dtype, dropout, causal=False, GROUP=1):
    tiles = _TILES.get(f"{role} causal" if causal else role, _TILES[role])
    options = tile(tiles, D, dtype, dropout)
    if role == "short":
        block, _ = options.pop("BLOCK_M"), options.pop("BLOCK_N")
        return options | {"BLOCK": block}
    # Two loops in a loop, or addresses that take more: half the registers for scores.
    if role == "dkv" and ((causal and GROUP > 1) or D % 16):
        options["BLOCK_M"] //= 2
    return options | {"SPLIT": SPAN // options["BLOCK_M" if role == "dq" else "BLOCK_N"]}


def _launches():
    kernels = {"dq": _dq_kernel, "dkv": _dkv_kernel, "short": _short_kernel}
    for case in CASES:
        facts = case.D, case.dtype, case.dropout, case.causal, case.GROUP
        for role in ["short"] if case.short else ["dq", "dkv"]:
            yield declared(kernels[role], case, _tile(role, *facts))


LAUNCHES = tuple(_launches())
