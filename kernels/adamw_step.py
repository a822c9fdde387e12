"""The three kernels of a step of AdamW, over the table of `param_table`.

Launches    sum      a program SPAN chunks: their sum of squares  only to clip
            scalars  one program: norm, step counts, and the eight numbers that the update of
                     each parameter needs, computed once instead of in every program
            update   a program a chunk: w, m, v and the rounded weight

            One launch of each whatever the dtypes: a program branches on that of its parameter. A
            full chunk at addresses that are multiples of 16 moves in 128 bits; another is masked.

Traffic     Bytes a parameter; w is what the model computes with, M its fp32 master.
                fp32         read w g m v   16   write w m v    12   28
                bf16, fp16   read M g m v   14   write M m v w  14   28
                sum          read g          4 or 2
            The tables are 80 + 32 bytes a tensor and 4 bytes a chunk of BLOCK elements.

Numerics    fp32 arithmetic, moments and master. Moments move by the difference,
            m + (1 - b1) * (g - m), since 1 - b2 is exact to 6e-8 of itself and b2 is not; decay
            and step are subtracted from w at once. What depends on k is computed in fp64: fp32
            would lose four digits of 1 - b2^k. Sums of squares: fp32 in a chunk, fp64 over
            chunks, in an order that is always the same. A square overflows past 1.8e19.

Math and source: adamw.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .param_table import (
    BF16,
    BLOCK,
    COLUMNS,
    FIRST,
    FP32,
    GRAD,
    GROUP,
    KIND,
    MASTER,
    MEAN,
    NUMEL,
    SPAN,
    SQUARE,
    STEP,
    WEIGHT,
    ParamTable,
)

# The row of a group, in fp64.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
WEIGHT_DECAY = tl.constexpr(4)
SIGN = tl.constexpr(5)  # -1: maximize
GROUP_COLUMNS = tl.constexpr(6)

# The row of a parameter that the update reads, in fp32.
SCALE = tl.constexpr(0)       # of the gradient: sign * clip coefficient
GAIN1 = tl.constexpr(1)       # 1 - b1
GAIN2 = tl.constexpr(2)       # 1 - b2
RATE = tl.constexpr(3)        # lr / (1 - b1^k)
ROOT = tl.constexpr(4)        # 1 / sqrt(1 - b2^k)
EPSILON = tl.constexpr(5)
DECAY = tl.constexpr(6)       # lr * weight decay: 1 - it would round the decay of a small lr away
SKIP = tl.constexpr(7)        # 1: leave the parameter as it is
SCALARS = tl.constexpr(8)

SUMS, PARAMS = 4096, 512  # partial sums, and parameters, that the one program takes at a time
WIDE = {"num_warps": 8, "enable_fp_fusion": True}    # 8 elements a thread
SMALL = {"num_warps": 16, "enable_fp_fusion": True}  # one program: as many loads at once as it can

# ------------------------------------------------------------------- kernels


@triton.jit
def _load(address, start, n, DTYPE: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p = address.to(tl.pointer_type(DTYPE))
    if FULL:  # the promise is on the pointer: on the integer it would be forgotten
        x = tl.load(tl.multiple_of(p, 16) + start + i)
    else:
        x = tl.load(p + start + i, mask=i < n, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(address, start, n, x, DTYPE: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p = address.to(tl.pointer_type(DTYPE))
    if FULL:
        tl.store(tl.multiple_of(p, 16) + start + i, x.to(DTYPE))
    else:
        tl.store(p + start + i, x.to(DTYPE), mask=i < n)


@triton.jit
def _squares(address, start, n, FULL: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
             COUNT: tl.constexpr):
    """The sum of squares of COUNT blocks that follow each other."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(COUNT):
        g = _load(address, start + k * BLOCK, n - k * BLOCK, DTYPE, FULL, BLOCK)
        total += g * g
    return tl.sum(total)


@triton.jit
def _squares_of(kind, address, start, n, FULL: tl.constexpr, BLOCK: tl.constexpr,
                COUNT: tl.constexpr):
    if kind == FP32:
        total = _squares(address, start, n, FULL, tl.float32, BLOCK, COUNT)
    elif kind == BF16:
        total = _squares(address, start, n, FULL, tl.bfloat16, BLOCK, COUNT)
    else:
        total = _squares(address, start, n, FULL, tl.float16, BLOCK, COUNT)
    return total


@triton.jit
def _chunk(owners_ptr, table_ptr, chunk, BLOCK: tl.constexpr):
    """Of the gradient of a chunk: dtype, address, first element, elements from there on."""
    row = table_ptr + tl.load(owners_ptr + chunk).to(tl.int64) * COLUMNS
    start = (chunk - tl.load(row + FIRST)) * BLOCK
    return tl.load(row + KIND), tl.load(row + GRAD), start, tl.load(row + NUMEL) - start


@triton.jit(do_not_specialize=["chunks"])
def sum_kernel(
    owners_ptr, table_ptr, partials_ptr,  # (chunks,) int32, (P, COLUMNS) int64, (programs,) fp32
    chunks, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):
    """The sum of squares of SPAN chunks of gradients; 0 where there is no gradient."""
    first = tl.program_id(0) * SPAN
    kind, address, start, n = _chunk(owners_ptr, table_ptr, first, BLOCK)
    total = 0.0
    if (address != 0) & (address % 16 == 0) & (n >= SPAN * BLOCK):  # all of one parameter
        total = _squares_of(kind, address, start, n, True, BLOCK, SPAN)
    else:
        for chunk in range(first, tl.minimum(first + SPAN, chunks)):
            kind, address, start, n = _chunk(owners_ptr, table_ptr, chunk, BLOCK)
            if address != 0:
                total += _squares_of(kind, address, start, n, False, BLOCK, 1)
    tl.store(partials_ptr + tl.program_id(0), total)


@triton.jit
def _norm(partials_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        part = tl.load(partials_ptr + start + i, mask=start + i < count, other=0.0)
        total += part.to(tl.float64)
    return tl.sqrt(tl.sum(total)).to(tl.float32)


@triton.jit
def _power(x, k):
    return tl.exp(k * tl.log(tl.maximum(x, 1e-30)))  # of 0: as good as 0


@triton.jit
def _scalars(table_ptr, groups_ptr, scalars_ptr, start, P, clip, taken, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    inside = i < P
    row = table_ptr + i.to(tl.int64) * COLUMNS
    group = groups_ptr + tl.load(row + GROUP, mask=inside, other=0) * GROUP_COLUMNS
    lr = tl.load(group + LR)
    b1 = tl.load(group + BETA1)
    b2 = tl.load(group + BETA2)
    moves = inside & (tl.load(row + GRAD, mask=inside, other=0) * taken != 0)
    step = tl.load(row + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    k = tl.load(step, mask=moves, other=0.0) + 1.0
    tl.debug_barrier()  # a thread may load what another one stores
    tl.store(step, k, mask=moves)
    k = k.to(tl.float64)
    out = scalars_ptr + i.to(tl.int64) * SCALARS
    tl.store(out + SCALE, (tl.load(group + SIGN) * clip).to(tl.float32), mask=inside)
    tl.store(out + GAIN1, (1.0 - b1).to(tl.float32), mask=inside)
    tl.store(out + GAIN2, (1.0 - b2).to(tl.float32), mask=inside)
    tl.store(out + RATE, (lr / (1.0 - _power(b1, k))).to(tl.float32), mask=inside)
    tl.store(out + ROOT, (1.0 / tl.sqrt(1.0 - _power(b2, k))).to(tl.float32), mask=inside)
    tl.store(out + EPSILON, tl.load(group + EPS).to(tl.float32), mask=inside)
    tl.store(out + DECAY, (lr * tl.load(group + WEIGHT_DECAY)).to(tl.float32), mask=inside)
    tl.store(out + SKIP, tl.where(moves, 0.0, 1.0), mask=inside)


@triton.jit(do_not_specialize=["max_norm", "count", "P"])
def scalars_kernel(
    partials_ptr,                        # (count,) fp32; None: do not clip
    table_ptr, groups_ptr, scalars_ptr,  # (P, COLUMNS) int64, (groups, 6) fp64, (P, 8) fp32;
                                         # None: the norm alone
    norm_ptr, skipped_ptr,               # () fp32, () int64: steps not taken
    max_norm, count, P,
    SUMS: tl.constexpr, PARAMS: tl.constexpr,
):
    """One program: the norm, and what the update needs of each parameter. Step counts move."""
    clip = 1.0
    taken = 1
    if partials_ptr is not None:
        norm = _norm(partials_ptr, count, SUMS)
        tl.store(norm_ptr, norm)
        if scalars_ptr is not None:
            taken = tl.where(norm < float("inf"), 1, 0)  # NaN is not either
            tl.store(skipped_ptr, tl.load(skipped_ptr) + (1 - taken))
            clip = tl.minimum(1.0, max_norm / (norm.to(tl.float64) + 1e-6))
    if scalars_ptr is not None:
        for start in range(0, P, PARAMS):
            _scalars(table_ptr, groups_ptr, scalars_ptr, start, P, clip, taken, PARAMS)


@triton.jit
def _adamw(row, scalars, start, n, DTYPE: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    mean, square = tl.load(row + MEAN), tl.load(row + SQUARE)
    master, weight = tl.load(row + MASTER), tl.load(row + WEIGHT)
    scale, epsilon = tl.load(scalars + SCALE), tl.load(scalars + EPSILON)
    gain1, gain2 = tl.load(scalars + GAIN1), tl.load(scalars + GAIN2)
    rate, root, decay = tl.load(scalars + RATE), tl.load(scalars + ROOT), tl.load(scalars + DECAY)
    # Every load before any store: no store could be proved not to change what is loaded.
    g = _load(tl.load(row + GRAD), start, n, DTYPE, FULL, BLOCK)
    m = _load(mean, start, n, tl.float32, FULL, BLOCK)
    v = _load(square, start, n, tl.float32, FULL, BLOCK)
    w = _load(master, start, n, tl.float32, FULL, BLOCK)
    g *= scale
    m += gain1 * (g - m)
    v += gain2 * (g * g - v)
    w -= decay * w + rate * tl.div_rn(m, tl.sqrt_rn(v) * root + epsilon)
    _store(mean, start, n, m, tl.float32, FULL, BLOCK)
    _store(square, start, n, v, tl.float32, FULL, BLOCK)
    _store(master, start, n, w, tl.float32, FULL, BLOCK)
    if DTYPE != tl.float32:  # noqa: SIM300
        _store(weight, start, n, w, DTYPE, FULL, BLOCK)


@triton.jit
def _update(row, scalars, start, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    addresses = tl.load(row + WEIGHT) | tl.load(row + GRAD) | tl.load(row + MASTER)
    addresses |= tl.load(row + MEAN) | tl.load(row + SQUARE)
    if (n >= BLOCK) & (addresses % 16 == 0):
        _adamw(row, scalars, start, n, DTYPE, True, BLOCK)
    else:  # in parts: masks and their addresses take registers
        PART: tl.constexpr = BLOCK // 8
        for part in range(0, tl.minimum(n, BLOCK), PART):
            _adamw(row, scalars, start + part, n - part, DTYPE, False, PART)


@triton.jit
def update_kernel(
    owners_ptr, table_ptr, scalars_ptr,  # (chunks,) int32, (P, COLUMNS) int64, (P, 8) fp32
    BLOCK: tl.constexpr,
):
    """One chunk of one parameter: moments, master and weight."""
    chunk = tl.program_id(0)
    owner = tl.load(owners_ptr + chunk).to(tl.int64)
    row, scalars = table_ptr + owner * COLUMNS, scalars_ptr + owner * SCALARS
    if tl.load(scalars + SKIP) == 0.0:
        kind = tl.load(row + KIND)
        start = (chunk - tl.load(row + FIRST)) * BLOCK
        n = tl.load(row + NUMEL) - start
        if kind == FP32:
            _update(row, scalars, start, n, tl.float32, BLOCK)
        elif kind == BF16:
            _update(row, scalars, start, n, tl.bfloat16, BLOCK)
        else:
            _update(row, scalars, start, n, tl.float16, BLOCK)


# ------------------------------------------------------------------ launches


def launch_step(
    table: ParamTable, rows: Tensor, groups: Tensor, scalars: Tensor,
    max_norm: float | None, norm: Tensor, skipped: Tensor,
) -> None:
    """One step of all parameters of the table.

    Args:
        rows: (P, COLUMNS) int64: those of `table`, or of a capture.
        groups: (groups, GROUP_COLUMNS) fp64.
        scalars: (P, SCALARS) fp32, to work in.
        max_norm: None: norm and skipped stay as they are.
        norm, skipped: () fp32, () int64.
    """
    clip = max_norm is not None
    if clip:
        _launch_sum(table, rows)
    scalars_kernel[(1,)](
        table.partials if clip else None, rows, groups, scalars,
        norm if clip else None, skipped if clip else None,
        float(max_norm or 0.0), len(table.partials), len(rows), SUMS=SUMS, PARAMS=PARAMS, **SMALL,
    )
    if table.chunks:
        update_kernel[(table.chunks,)](table.owners, rows, scalars, BLOCK=BLOCK, **WIDE)


def launch_norm(table: ParamTable, norm: Tensor) -> None:
    """The norm of all gradients of the table into `norm`, () fp32."""
    if table.chunks:
        _launch_sum(table, table.rows)
        scalars_kernel[(1,)](
            table.partials, None, None, None, norm, None,
            0.0, len(table.partials), 0, SUMS=SUMS, PARAMS=PARAMS, **SMALL,
        )


def _launch_sum(table, rows):
    if table.chunks:
        sum_kernel[(len(table.partials),)](
            table.owners, rows, table.partials, table.chunks, BLOCK=BLOCK, SPAN=SPAN, **WIDE
        )


TABLES = "*i32:16 *i64:16 *fp32:16"
ONE = {"SUMS": SUMS, "PARAMS": PARAMS}
NOT_CLIPPED = ONE | dict.fromkeys(("partials_ptr", "norm_ptr", "skipped_ptr"))
NORM_ALONE = ONE | dict.fromkeys(("table_ptr", "groups_ptr", "scalars_ptr", "skipped_ptr"))
SCALAR_TYPES = {
    "clipped": ("*fp32:16 *i64:16 *fp64:16 *fp32:16 *fp32:16 *i64:16 fp32 i32 i32", ONE),
    "not clipped": ("*i64:16 *fp64:16 *fp32:16 fp32 i32 i32", NOT_CLIPPED),
    "norm alone": ("*fp32:16 *fp32:16 fp32 i32 i32", NORM_ALONE),
}
LAUNCHES = (
    Launch("all dtypes", sum_kernel, f"{TABLES} i32", {"BLOCK": BLOCK, "SPAN": SPAN}, WIDE),
    Launch("all dtypes", update_kernel, TABLES, {"BLOCK": BLOCK}, WIDE),
    *(
        Launch(label, scalars_kernel, types, constexprs, SMALL, streams=False, fp64=True)
        for label, (types, constexprs) in SCALAR_TYPES.items()
    ),
)
