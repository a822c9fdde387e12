"""The gradients of add_norm, in one pass over the rows. The math is in the header of add_norm.py.

Tiling      At most PROGRAMS programs walk the rows. A program has a tile of them in registers, the
            next tile under way (but for ds, which is wanted last), and its sums of columns, fp32,
            until its rows are done: it then writes a row of partial sums, and one small launch adds
            them up (column_sums.py). The weight and the columns' words come from the L1 cache again
            for each tile.
            768 columns of bf16, a row a warp: 24 columns a lane, some 240 registers. Wider rows
            take more warps a row, not more registers; past 4096 columns some are spilled. On sm_90
            21 instructions an element, 27 with dropout, where 8 or 10 bytes of it leave time for
            50 or 60.

Numerics    h is made again from s as it was rounded, all else is in fp32. A row's dx and dr depend
            on that row alone; sums are added in an order that depends on T alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import PROGRAMS, column_sums
from .dropout import Dropout, dropout_arguments, keeps, place_of, words_of
from .launch import Launch
from .row_tiles import load_chunk, load_rows, row_tile, store_chunk, total


@triton.jit
def _store_sums(ptr, x, i, C: tl.constexpr, CHUNK: tl.constexpr):
    """Where there is a pointer: a program's sums of columns i to i + CHUNK."""
    if ptr is not None:
        c = i + tl.arange(0, CHUNK)
        tl.store(ptr + tl.program_id(0) * C + c, tl.sum(x, 0), mask=c < C)


@triton.jit(
    do_not_specialize=["T", "threshold"],
    do_not_specialize_on_alignment=(
        "mean_ptr rstd_ptr places_ptr dweight_ptr dnorm_bias_ptr dbias_ptr"
    ).split(),
)
def _add_norm_backward_kernel(
    dy_ptr, dy2_ptr, ds_ptr, s_ptr, mean_ptr, rstd_ptr,  # (T, C) four times, (T,) fp32 twice
    weight_ptr, rows_ptr, places_ptr, columns_ptr,       # (C,), words of dropout
    dx_ptr, dr_ptr,                                      # (T, C)
    dweight_ptr, dnorm_bias_ptr, dbias_ptr,              # (programs, C) fp32
    T, threshold, kept,
    C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):
    """What is not there is not read, what is not wanted is not written; dx is None where it is dr.
    Without `mean_ptr` it is an RMSNorm."""
    N: tl.constexpr = (C + CHUNK - 1) // CHUNK
    every = tl.zeros((ROWS, 1), tl.int32)
    zero = tl.zeros((ROWS, CHUNK), tl.float32)
    dweight = ()
    dnorm_bias = ()
    dbias = ()
    for _ in tl.static_range(N):
        dweight += (zero,)
        dnorm_bias += (zero,)
        dbias += (zero,)
    if rows_ptr is not None:
        place = place_of(places_ptr, 0)
    step = tl.num_programs(0) * ROWS
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    s_next = load_rows(s_ptr, t * C, t < T, C, CHUNK)
    dy_next = load_rows(dy_ptr, t * C, t < T, C, CHUNK)
    dy2_next = load_rows(dy2_ptr, t * C, t < T, C, CHUNK)
    for _ in range(tl.program_id(0) * ROWS, T, step):
        row = t * C
        exists = t < T
        s, dys, dy2s = s_next, dy_next, dy2_next
        dss = load_rows(ds_ptr, row, exists, C, CHUNK)  # wanted last, and registers are few
        s_next = load_rows(s_ptr, (t + step) * C, t + step < T, C, CHUNK)
        dy_next = load_rows(dy_ptr, (t + step) * C, t + step < T, C, CHUNK)
        dy2_next = load_rows(dy2_ptr, (t + step) * C, t + step < T, C, CHUNK)
        rstd = tl.load(rstd_ptr + t, mask=exists, other=0.0)
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + t, mask=exists, other=0.0)
        g = ()
        h = ()
        gh = ()
        weight_sums = ()
        bias_sums = ()
        for j in tl.static_range(N):
            dy = dys[j].to(tl.float32) if dy_ptr is not None else zero
            if dy2_ptr is not None:
                dy += dy2s[j].to(tl.float32)
            v = (s[j].to(tl.float32) - mean) * rstd
            weight_sums += (dweight[j] + dy * v,)
            bias_sums += (dnorm_bias[j] + dy,)
            dy *= load_chunk(weight_ptr, every, j * CHUNK, C, CHUNK)
            g += (dy,)
            h += (v,)
            gh += (dy * v,)
        dweight, dnorm_bias = weight_sums, bias_sums
        gh_mean = total(gh) * (1.0 / C)
        g_mean = 0.0
        if mean_ptr is not None:
            g_mean = total(g) * (1.0 / C)
        if rows_ptr is not None:
            a, b = words_of(rows_ptr, place, t, exists)
        bias_sums = ()
        for j in tl.static_range(N):
            d = (g[j] - g_mean - h[j] * gh_mean) * rstd
            if ds_ptr is not None:
                d += dss[j].to(tl.float32)
            store_chunk(dr_ptr, row, d, exists, j * CHUNK, C, CHUNK)
            if rows_ptr is not None:
                word = load_chunk(columns_ptr, every, j * CHUNK, C, CHUNK)
                d *= tl.where(keeps(a, b, word, threshold), kept, 0.0)
            store_chunk(dx_ptr, row, d, exists, j * CHUNK, C, CHUNK)
            bias_sums += (dbias[j] + d,)
        dbias = bias_sums
        t += step
    for j in tl.static_range(N):
        _store_sums(dweight_ptr, dweight[j], j * CHUNK, C, CHUNK)
        _store_sums(dnorm_bias_ptr, dnorm_bias[j], j * CHUNK, C, CHUNK)
        _store_sums(dbias_ptr, dbias[j], j * CHUNK, C, CHUNK)


# -------------------------------------------------------------------- launch

CHUNKS = 3  # of a row at most: 24 columns a lane


def launch_backward(
    upstream: tuple[Tensor | None, ...], saved: tuple[Tensor, ...], dropout: Dropout | None,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of add_norm's inputs.

    Args:
        upstream: (T, C) gradients: of y, of y's second use, of s. What is None is 0.
        saved: s (T, C); mean and rstd (T,), no mean for an RMSNorm; weight (C,).
        dropout: that of the forward pass.
        wanted: which of the gradients of x, residual, weight, norm bias and bias to make.

    Returns:
        Those five; None where not wanted. Without dropout x and residual have the same one.
    """
    s, mean, rstd, weight = saved
    T, C = s.shape
    tile, warps = row_tile(C, s.element_size(), CHUNKS)
    programs = min(triton.cdiv(T, tile["ROWS"]), PROGRAMS)
    need_x, need_residual, *need_sums = wanted
    dx = s.new_empty(T, C) if need_x and dropout else None
    dr = s.new_empty(T, C) if need_residual or (need_x and not dropout) else None
    partials = s.new_empty(sum(need_sums), programs, C, dtype=torch.float32)
    each = iter(partials)
    sums = [next(each) if need else None for need in need_sums]
    *words, lowest, kept = dropout_arguments(dropout)
    if T:
        with torch.cuda.device_of(s):
            _add_norm_backward_kernel[(programs,)](
                *(grad if grad is None else grad.contiguous() for grad in upstream),
                s, mean, rstd, weight, *words, dx, dr, *sums, T, lowest, kept, **tile,
                num_warps=warps, enable_fp_fusion=True,
            )
    each = iter(column_sums(partials, weight.dtype))
    sums = [next(each) if need else None for need in need_sums]
    return [dx if dropout else dr if need_x else None, dr if need_residual else None, *sums]


def _launches():
    """As BERT runs it, in every dtype and with frozen parameters; the widths of models; GPT's,
    with and without a residual's gradient; an RMSNorm."""
    dropout = {"rows": "*i32:16", "places": "*i32", "columns": "*i32:16"}
    for dtype, C, off in (
        ("bf16", 768, "ds"), ("fp16", 768, "ds"), ("fp32", 768, "ds"), ("bf16", 384, "ds"),
        ("bf16", 1024, "ds"), ("bf16", 768, "ds dropout dx"), ("bf16", 768, "dy2"),
        ("bf16", 768, "dy2 dropout dx"), ("bf16", 768, "ds dweight dnorm_bias dbias"),
        ("bf16", 768, "dy2 dropout dx mean dnorm_bias dbias"),
    ):  # fmt: skip
        tile, warps = row_tile(C, 4 if dtype == "fp32" else 2, CHUNKS)
        rows = f"*{dtype}:16"
        types = {"dy": rows, "dy2": rows, "ds": rows, "s": rows, "mean": "*fp32", "rstd": "*fp32",
                 "weight": "*fp32:16", **dropout, "dx": rows, "dr": rows, "dweight": "*fp32",
                 "dnorm_bias": "*fp32", "dbias": "*fp32"}  # fmt: skip
        absent = off.replace("dropout", " ".join(dropout)).split()
        constexprs = {f"{name}_ptr": None for name in absent} | tile
        numbers = "i32 i32 fp32"
        if "dropout" in off:
            constexprs |= {"threshold": None, "kept": None}
            numbers = "i32"
        words = [word for name, word in types.items() if name not in absent]
        yield Launch(
            f"{dtype}, C {C}, no {off}", _add_norm_backward_kernel, " ".join([*words, numbers]),
            constexprs, {"num_warps": warps, "enable_fp_fusion": True},
        )


LAUNCHES = tuple(_launches())
