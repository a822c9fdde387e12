"""The gradient of embed; the forward pass and the definition are in embed.py.

Math        With norm, from mean and rstd of the forward pass, h = (s - mean) * rstd:
                d  = dropout(dy),   g = d * weight
                ds = rstd * (g - mean_C(g) - h * mean_C(g * h))
                dweight = sum_T d * h,   dbias = sum_T d
            Without, ds = d. And dtables[k][i] = sum of ds_t over the rows t with ids[k][t] = i.

Order       No atomics: every row of a gradient is the sum of one program, so two runs are equal bit
            for bit. Which rows have an id was found out when the batch was made (embed_order.py).

                _rows_kernel       a row: gathers s again, writes ds; with norm only
                column_sums        adds up what those programs have of dweight and dbias
                a fill             of the gradients of all tables, with 0; or none, where their
                                   memory is kept: see table_gradients.py
                _pieces_kernel     a piece of the rows of an id: their sum is the gradient's row; in
                                   a long segment it waits in a slot
                _segments_kernel   a long segment: adds up its slots

            Thus a table of two types, T / 2 rows each, is no slower than one of words. All tables
            that are trained are in the same launches. Without norm the pieces are read from dy, and
            dropout is done there.

Traffic     T rows, C columns, K tables of fp32, dy of e bytes. Rows: (e + 4*K + 4)*T*C, 4*K of it
            gathered as in the forward pass. Pieces: 4*K*T*C, or e*K*T*C without norm. And the fill,
            4*R*C for R rows of all tables, if there is one.
            An element costs 28 instructions of the first (768 columns, dropout), 4 of the second.

Numerics    fp32, rounded once. A row with an id that its table does not have has ds = NaN under a
            norm, for the other tables too; the table itself gets nothing from it.
"""

import functools
import inspect

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .dropout import Dropout, dropout_arguments, keeps, place_of, words_of
from .embed_order import PIECE, EmbedOrder
from .launch import Launch, without_nvidia
from .table_gradients import four, zeros

# Counts do not choose the code, nor where ids, orders and the words of dropout begin.
jit = triton.jit(
    do_not_specialize="T R0 R1 R2 R3 threshold".split(),
    do_not_specialize_on_alignment=(
        "ids0_ptr ids1_ptr ids2_ptr ids3_ptr order0_ptr order1_ptr order2_ptr order3_ptr "
        "places_ptr"
    ).split(),
)


@triton.jit
def gather(ids, tables, R, t, c, C: tl.constexpr):
    """The sum of a row of each table, (BLOCK_T, BLOCK_C) fp32; NaN where one has no such row."""
    known = t >= 0
    for k in tl.static_range(4):
        if tables[k] is not None:
            i = tl.load(ids[k] + t)
            inside = (i >= 0) & (i < R[k])
            row = tl.where(inside, i, 0)[:, None]
            x = tl.load(tables[k] + (row * C + c), mask=c < C, other=0.0).to(tl.float32)
            if k == 0:
                s = x
            else:
                s += x
            known = known & inside
    return s + tl.where(known, 0.0, float("nan"))[:, None]


@jit
def _rows_kernel(
    ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr,
    table0_ptr, table1_ptr, table2_ptr, table3_ptr,
    R0, R1, R2, R3,
    weight_ptr, stats_ptr, dy_ptr, ds_ptr, partials_ptr,  # (C,) (2, T), (T, C) twice, (2, P, C)
    words_ptr, places_ptr, columns_ptr, threshold, kept, T, stride,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """ds of rows, and the program's share of dweight and dbias."""
    c = tl.arange(0, BLOCK_C)[None, :]
    ids = (ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr)
    tables = (table0_ptr, table1_ptr, table2_ptr, table3_ptr)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    place = place_of(places_ptr, 0)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < T)[:, None] & (c < C)
        row, safe = t.to(tl.int64)[:, None], tl.minimum(t, T - 1)
        d = tl.load(dy_ptr + (row * stride + c), mask=inside, other=0.0).to(tl.float32)
        if columns_ptr is not None:
            a, b = words_of(words_ptr, place, t, t < T)
            keep = keeps(a[:, None], b[:, None], tl.load(columns_ptr + c, mask=c < C), threshold)
            d = tl.where(keep, d * kept, 0.0)
        s = gather(ids, tables, (R0, R1, R2, R3), safe, c, C)
        rstd = tl.load(stats_ptr + T + safe)[:, None]
        h = tl.where(c < C, (s - tl.load(stats_ptr + safe)[:, None]) * rstd, 0.0)
        if ds_ptr is not None:
            weight = tl.load(weight_ptr + c, mask=c < C, other=0.0)  # from L1: registers are few
            g = d * weight.to(tl.float32)
            ds = rstd * (g - tl.sum(g, 1)[:, None] / C - h * (tl.sum(g * h, 1)[:, None] / C))
            tl.store(ds_ptr + (row * C + c), ds, mask=inside)
        if partials_ptr is not None:
            dweight += tl.sum(d * h, 0)
            dbias += tl.sum(d, 0)
    if partials_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK_C)
        outside = tl.num_programs(0).to(tl.int64) * C
        tl.store(partials_ptr + at, dweight, mask=tl.arange(0, BLOCK_C) < C)
        tl.store(partials_ptr + outside + at, dbias, mask=tl.arange(0, BLOCK_C) < C)


@triton.jit
def _sum_pieces(
    ids_ptr, order_ptr, dtable_ptr, R, x_ptr, partials_ptr, dropout, T, stride,
    C: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The program's pieces of one table: each one's sum of rows of x."""
    words_ptr, place, columns_ptr, threshold, kept = dropout
    rows_ptr = order_ptr + 1
    pieces_ptr = rows_ptr + T + 2 * tl.cdiv(T, PIECE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if columns_ptr is not None:
        x_word = tl.load(columns_ptr + c, mask=c < C)
    for p in range(tl.program_id(0), tl.load(order_ptr), tl.num_programs(0)):
        word, end = tl.load(pieces_ptr + p), tl.load(pieces_ptr + p + 1) // 4
        begin = word // 4
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(begin, end, BLOCK_R):
            at = start + tl.arange(0, BLOCK_R)
            row = tl.load(rows_ptr + at, mask=at < end, other=0)
            inside = (at < end)[:, None] & (c < C)
            x = tl.load(x_ptr + (row.to(tl.int64)[:, None] * stride + c), mask=inside, other=0.0)
            x = x.to(tl.float32)
            if columns_ptr is not None:
                a, b = words_of(words_ptr, place, row, at < end)
                x = tl.where(keeps(a[:, None], b[:, None], x_word, threshold), x * kept, 0.0)
            total += tl.sum(x, 0)
        i = tl.load(ids_ptr + tl.load(rows_ptr + begin))
        whole, first = word & 2 == 0, word & 1
        known = (i >= 0) & (i < R)
        out_ptr = dtable_ptr + tl.where(known, i, 0) * C
        total_out = total.to(dtable_ptr.dtype.element_ty)
        tl.store(out_ptr + column, total_out, mask=(column < C) & known & whole)
        slot_ptr = partials_ptr + (2 * (begin // PIECE) + first).to(tl.int64) * C
        tl.store(slot_ptr + column, total, mask=(column < C) & (word & 2 != 0))
    return 0


@jit
def _pieces_kernel(
    ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr,
    order0_ptr, order1_ptr, order2_ptr, order3_ptr,
    dtable0_ptr, dtable1_ptr, dtable2_ptr, dtable3_ptr,
    R0, R1, R2, R3,
    x_ptr, partials_ptr, words_ptr, places_ptr, columns_ptr, threshold, kept, T, stride,
    C: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    ids = (ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr)
    orders = (order0_ptr, order1_ptr, order2_ptr, order3_ptr)
    dtables = (dtable0_ptr, dtable1_ptr, dtable2_ptr, dtable3_ptr)
    R = (R0, R1, R2, R3)
    dropout = (words_ptr, place_of(places_ptr, 0), columns_ptr, threshold, kept)
    for k in tl.static_range(4):
        if dtables[k] is not None:  # noqa: SIM102, known to the compiler and not the other
            if tl.program_id(2) == k:
                p_ptr = partials_ptr + k * 2 * tl.cdiv(T, PIECE).to(tl.int64) * C
                _sum_pieces(
                    ids[k], orders[k], dtables[k], R[k], x_ptr, p_ptr, dropout, T, stride,
                    C, PIECE, BLOCK_R, BLOCK_C,
                )


@triton.jit
def _sum_segment(
    ids_ptr, order_ptr, dtable_ptr, R, partials_ptr, T,
    C: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The long segment that begins in the program's PIECE places: its pieces, in order."""
    rows_ptr = order_ptr + 1
    segment_ptr = rows_ptr + T + 2 * tl.program_id(0)
    begin, end = tl.load(segment_ptr), tl.load(segment_ptr + 1)
    if end > 0:
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C,), tl.float32)
        pieces = tl.cdiv(end - begin, PIECE)
        for start in range(0, pieces, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            slot = (2 * (begin // PIECE + j) + (j == 0)).to(tl.int64)
            inside = (j < pieces)[:, None] & (c < C)[None, :]
            at = slot[:, None] * C + c[None, :]
            total += tl.sum(tl.load(partials_ptr + at, mask=inside, other=0.0), 0)
        i = tl.load(ids_ptr + tl.load(rows_ptr + begin))
        known = (i >= 0) & (i < R)
        out_ptr = dtable_ptr + tl.where(known, i, 0) * C
        tl.store(out_ptr + c, total.to(dtable_ptr.dtype.element_ty), mask=(c < C) & known)
    return 0


@jit
def _segments_kernel(
    ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr,
    order0_ptr, order1_ptr, order2_ptr, order3_ptr,
    dtable0_ptr, dtable1_ptr, dtable2_ptr, dtable3_ptr,
    R0, R1, R2, R3,
    partials_ptr, T,
    C: tl.constexpr, PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    ids = (ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr)
    orders = (order0_ptr, order1_ptr, order2_ptr, order3_ptr)
    dtables = (dtable0_ptr, dtable1_ptr, dtable2_ptr, dtable3_ptr)
    R = (R0, R1, R2, R3)
    for k in tl.static_range(4):
        if dtables[k] is not None:  # noqa: SIM102, known to the compiler and not the other
            if tl.program_id(2) == k:
                p_ptr = partials_ptr + k * 2 * tl.cdiv(T, PIECE).to(tl.int64) * C
                _sum_segment(
                    ids[k], orders[k], dtables[k], R[k], p_ptr, T, C, PIECE, BLOCK_R, BLOCK_C
                )


# ------------------------------------------------------------------- launching


@functools.cache  # triton's own arithmetic takes microseconds a call
def row_tile(C: int) -> dict[str, int]:
    """A warp for each 1,024 columns: a lane has 32 elements of a row under way, of each table.
    Of narrow rows it has several."""
    block = max(32, triton.next_power_of_2(C))
    tile = {"BLOCK_T": max(1, 256 // block), "BLOCK_C": block}
    return tile | {"num_warps": max(1, block // 1024), "enable_fp_fusion": True}


@functools.cache
def _rows_tile(C: int) -> dict[str, int]:
    """With a limit of registers where ptxas would set a lower one and spill."""
    tile = row_tile(C) | ({"maxnreg": 255} if row_tile(C)["num_warps"] == 1 else {})
    return without_nvidia(tile) if torch.version.hip else tile


PIECES = {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 1, "enable_fp_fusion": True}
SEGMENTS = {"BLOCK_R": 32, "BLOCK_C": 128, "num_warps": 4, "enable_fp_fusion": True}
WARPS = 1056  # that write partials of dweight and dbias: 8 on each multiprocessor of an H200
PROGRAMS = 1024  # that share the pieces of a table


def check_order(order: EmbedOrder | None, ids: tuple[Tensor, ...]) -> None:
    """Raises ValueError when it is not one of so many rows and tables, on their device."""
    if order is None:
        return
    T, K = len(ids[0]), len(ids)
    if (order.rows, len(order.lines)) != (T, K) or order.words.device != ids[0].device:
        got = f"{len(order.lines)} of {order.rows} rows on {order.words.device}"
        raise ValueError(f"expected an order of {K} x {T} ids on {ids[0].device}, got {got}")


def _rows(dy, ids, tables, weight, stats, dropout, need_tables, need_norm):
    """ds (T, C) and the sums (2, C) of dweight and dbias, both fp32; None where not needed."""
    T, C = dy.shape
    tile = _rows_tile(C)
    ds = dy.new_empty(T, C, dtype=torch.float32) if need_tables else None
    programs = min(triton.cdiv(T, 8), WARPS // tile["num_warps"])
    partials = dy.new_empty(2, programs, C, dtype=torch.float32) if need_norm else None
    if T:
        _rows_kernel[(programs,)](
            *four(ids), *four(tables), *four([len(x) for x in tables]), weight, stats, dy, ds,
            partials, *dropout_arguments(dropout), T, dy.stride(0), C, **tile,
        )
    return ds, column_sums(partials, weight.dtype) if need_norm else None


def _tables(x, ids, dtables, dropout, order):
    """Adds up the rows of x (T, C) by id, into those of `dtables` that are not None."""
    (T, C), live = x.shape, [k for k, d in enumerate(dtables) if d is not None]
    lines = [order.words[order.lines[k]] for k in live]
    dtables = [dtables[k] for k in live]
    ids, rows = [ids[k] for k in live], [len(d) for d in dtables]
    shared = *four(ids), *four(lines), *four(dtables), *four(rows)
    blocks = triton.cdiv(T, PIECE)
    partials = x.new_empty(len(live), 2 * blocks, C, dtype=torch.float32)
    _pieces_kernel[(min(T, PROGRAMS), triton.cdiv(C, PIECES["BLOCK_C"]), len(live))](
        *shared, x, partials, *dropout_arguments(dropout), T, x.stride(0), C, PIECE, **PIECES
    )
    if T > PIECE:  # or no segment is longer than a piece
        _segments_kernel[(blocks, triton.cdiv(C, SEGMENTS["BLOCK_C"]), len(live))](
            *shared, partials, T, C, PIECE, **SEGMENTS
        )


def embed_gradient(
    dy: Tensor, ids: tuple[Tensor, ...], tables: tuple[Tensor, ...], needed: tuple[bool, ...],
    weight: Tensor | None, stats: Tensor | None, need_norm: bool,
    dropout: Dropout | None, order: EmbedOrder | None,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """What embed's inputs get of dy (T, C).

    Args:
        needed: which of the tables need a gradient.
        weight, stats: of the norm: (C,), and mean and rstd (2, T); None without.
        need_norm: whether its parameters do.
        ids, tables, dropout, order: as embed's.

    Returns:
        dtables, dweight, dbias.
    """
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dnorm = None, None
    with torch.cuda.device_of(dy):
        if weight is not None:
            dy, sums = _rows(dy, ids, tables, weight, stats, dropout, any(needed), need_norm)
            dnorm, dropout = sums if need_norm else dnorm, None
        gradients = order and order.gradients
        if gradients is None:
            dtables = zeros(tables, needed)
        else:
            dtables = gradients.take(tables, needed, ids, order)
        if any(needed) and len(ids[0]):
            order = order or EmbedOrder.sort(ids).to(dy.device)
            _tables(dy, ids, dtables, dropout, order)
    return dtables, *dnorm


# -------------------------------------------------------------------- declared

DROPPED = "words_ptr places_ptr columns_ptr threshold kept "  # None without dropout
_TYPES = {
    **{"ids": "*i64", "order": "*i32", "table": "*fp32:16", "dtable": "*fp32:16", "R": "i32"},
    **{"x_ptr": "*fp32:16", "stride": "i32:16", "T": "i32"},
    **{"y_ptr": "*bf16:16", "dy_ptr": "*bf16:16", "words_ptr": "*i32:16", "places_ptr": "*i32"},
    **{"columns_ptr": "*i32:16", "threshold": "i32", "kept": "fp32", "eps": "fp32"},
}


def declared(kernel, C: int, K: int, absent: str, tile: dict, streams=True, **types) -> Launch:
    """A launch for K tables of C columns. `absent` are arguments that are None; `types` of others
    than usual."""
    parameters, constexprs, found = inspect.signature(kernel.fn).parameters, {}, []
    given = {"C": C, "PIECE": PIECE} | tile
    for name in parameters:
        table = name.removesuffix("_ptr")
        number = int(table[-1]) if table[-1].isdigit() else 0
        if name in absent.split() or number >= K:
            constexprs[name] = None
        elif name in given:
            constexprs[name] = given[name]
        else:
            usual = _TYPES.get(name) or _TYPES.get(table[:-1], "*fp32:16")
            found.append(types.get(name, usual))
    there = {name for name in parameters if constexprs.get(name, 0) is not None}
    label = f"C {C}, {K} tables" + ", norm" * ("weight_ptr" in there)
    label += ", dropout" * ("kept" in there)
    label += "".join(f", no {x[:-4]}" for x in ("ds_ptr", "partials_ptr") if x in absent.split())
    options = {k: v for k, v in tile.items() if k not in parameters}
    return Launch(label, kernel, " ".join(found), constexprs, options, streams)


def _launches():
    for C, absent in ((768, ""), (384, ""), (8192, ""), (768, "ds_ptr"), (768, "partials_ptr")):
        yield declared(_rows_kernel, C, 3, absent, _rows_tile(C))
    yield declared(_pieces_kernel, 768, 3, DROPPED, PIECES)
    yield declared(_pieces_kernel, 768, 2, "", PIECES, x_ptr="*bf16:16")
    yield declared(_segments_kernel, 768, 3, "", SEGMENTS, streams=False)


LAUNCHES = tuple(_launches())
