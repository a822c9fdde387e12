"""Softmax cross-entropy over V classes, a loss for each row.

Math        One row x of V logits with target t, class weights w, smoothing e:
                lse  = log sum_v exp(x_v),   logp_v = x_v - lse
                c_v  = (1 - e) * w_t * [v == t] + e / V * w_v
                loss = -sum_v c_v * logp_v
                dx_v = dloss * (exp(logp_v) * sum_k c_k - c_v)
            A row whose target is `ignore_index` has loss 0 and gradient 0. The mean that torch
            reports divides the sum of losses by the sum of w_t: dividing is the caller's, who may
            accumulate over several batches first.

Traffic     N rows, V columns, e bytes per logit. Floor: every operand moves once.
                cross_entropy     forward N*V*e, backward 2*N*V*e
                cross_entropy_    2*N*V*e together: 1.65 GB of bf16 at N=8192, V=50257

Tiling      One program walks a row. A row of an odd V or stride starts and ends anywhere between
            two 16-byte boundaries, and an access is 128 bits wide only on them, so a row is cut:

                x_ptr   head                   body                    V
                  |  edge  | unit | unit | unit | ... | unit |  edge  |
                           ^ first 16-byte boundary     last ^

            A unit is 16 bytes, and a lane's in each step of LANES units: what depends on a unit is
            done once for 8 columns of bf16. The two edges together are one small masked tile.
            cross_entropy_ walks a row twice, for the sum of exponentials and for the gradient:
            rows in flight fit in the L2 cache, so memory is read once. At 4.8 TB/s it has some 25
            instructions a column, of which the two walks take 18.

Numerics    fp32 arithmetic and fp32 loss, whatever the dtype of the logits, for |x| < 2.3e38.
            Maxima start at the lowest float, not at -inf: a lane of -inf alone leaves no NaN.
Source      Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax);
            Szegedy et al. 2015, arXiv:1512.00567, section 7 (label smoothing).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Launch, can_launch
from .target_report import TargetReport

IGNORE_INDEX = -100
L2_BYTES = 40 << 20  # what rows in flight may fill: an H100 or H200 has 50 MB
LOG2E, LOWEST = tl.constexpr(1.4426950408889634), tl.constexpr(-3.4028234e38)
# 1 / LOG2E, of LOG2E as fp32 has it, in two parts: a maximum comes back as it was
LN2, LN2_REST = tl.constexpr(0.693147182464599609375), tl.constexpr(7.348693061e-9)

# ---------------------------------------------------------------- definition


def cross_entropy_ref(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The definition, in the dtype of `logits` or fp32, whichever is wider.

    Args:
        logits: (N, V) float.
        target: (N,) int64 in [0, V), or ignore_index.
        weight: (V,) class weights; default 1.
        label_smoothing: e in [0, 1].
        ignore_index: a target that does not count.

    Returns:
        (N,) losses in nats, float32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = logits - logits.logsumexp(-1, keepdim=True)
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight
    t = target.masked_fill(target == ignore_index, 0)
    nll = -weight[t] * logp.gather(1, t[:, None])[:, 0]
    loss = (1 - label_smoothing) * nll
    if label_smoothing:  # 0 * inf, where a class is masked by -inf, is not 0
        loss = loss - label_smoothing * (weight * logp).mean(-1)
    return torch.where(target == ignore_index, 0.0, loss)


def check_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
    """Raises ValueError when shapes, dtypes or devices do not fit."""
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise ValueError(f"expected logits (N, V) and target (N,), got {shapes}")
    if target.dtype != torch.int64:
        raise ValueError(f"expected an int64 target, got {target.dtype}: call .long()")
    if weight is not None and weight.shape != logits.shape[1:]:
        raise ValueError(f"expected weight ({logits.shape[1]},), got {tuple(weight.shape)}")
    for name, x in (("target", target), ("weight", weight)):
        if x is not None and x.device != logits.device:
            raise ValueError(f"expected {name} on {logits.device}, got {x.device}")


# ------------------------------------------------------------------- kernels


@triton.jit
def _cut(x_ptr, V, UNIT: tl.constexpr):
    """Where a row's body begins and how many units it has; the columns at its edges, and which of
    them exist. A unit is what lies between two 16-byte boundaries."""
    past = (x_ptr.to(tl.int64) % 16).to(tl.int32) * UNIT // 16  # columns since the last boundary
    head = tl.minimum((UNIT - past) % UNIT, V)
    units = (V - head) // UNIT
    e = tl.arange(0, 2 * UNIT)
    edge = tl.where(e < UNIT, e, head + units * UNIT + e - UNIT)
    return head, units, edge, edge < tl.where(e < UNIT, head, V)


@triton.jit
def _exp2(x, m):
    """2^(x / ln 2 - m), rounded once before the power: an error of m would be one of the result."""
    return tl.exp2(tl.fma(x, LOG2E, -m))


@triton.jit
def _weight(weight_ptr, v, mask):
    if weight_ptr is None:
        return 1.0
    else:
        return tl.load(weight_ptr + v, mask=mask, other=0.0)


@triton.jit
def _row(target_ptr, options, report_ptr, row, stride, ignore, V):
    """The target of a row, whether it counts, whether it is a class, and the coefficients: c_v is
    keep * [v == t] + spread * w_v, and `total` is the sum of them."""
    weight_ptr, weight_sum_ptr, smoothing = options
    target = tl.load(target_ptr + row * stride)
    counts = target != ignore
    is_class = (target >= 0) & (target < V)
    keep = 1.0 * _weight(weight_ptr, target, is_class)
    spread = 0.0
    total = keep
    if smoothing is not None:
        keep *= 1.0 - smoothing
        spread = smoothing / V
        total = keep + smoothing
        if weight_sum_ptr is not None:
            total = keep + spread * tl.load(weight_sum_ptr)
    if report_ptr is not None:
        tl.atomic_add(report_ptr, 1, mask=counts & is_class, sem="relaxed")
        word = ((row + 1) << 32) | (target & 0xFFFFFFFF)
        tl.atomic_max(report_ptr + 1, word, mask=counts & (is_class == 0), sem="relaxed")
    return target, counts, is_class, keep, spread, total


@triton.jit
def _loss(x_ptr, options, of_row, V, LANES: tl.constexpr):
    """Walks a row once: its loss, its maximum m in units of ln 2, and its sum of 2^(x / ln 2 - m).
    An ignored row is not read. A lane keeps a maximum and a sum of its own to the end of the row,
    so that nothing is exchanged in the loop, and has its next unit under way.
    The loss, sum c_v (lse - x_v), is total * (lse - x_t) - spread * sum w_v (x_v - x_t)."""
    UNIT: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    weight_ptr, _, smoothing = options
    target, counts, is_class, _, spread, total = of_row
    x_t = tl.load(x_ptr + target, mask=counts & is_class, other=float("nan")).to(tl.float32)
    head, units, edge, at_edge = _cut(x_ptr, tl.where(counts, V, 0), UNIT)
    body_ptr = tl.multiple_of(x_ptr + head, 16)
    lane = tl.arange(0, LANES)
    i = lane[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    m = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    wx = tl.zeros((LANES,), tl.float32)  # sum of w * (x - x_t)
    ahead = tl.load(body_ptr + i, mask=(lane < units)[:, None])
    for start in range(0, units, LANES):
        inside = start + lane < units
        x = ahead.to(tl.float32)
        next_ptr = body_ptr + (start + LANES) * UNIT
        ahead = tl.load(next_ptr + i, mask=(start + LANES + lane < units)[:, None])
        m_new = tl.where(inside, tl.maximum(m, tl.max(x, 1) * LOG2E), m)
        sum_new = s * tl.exp2(m - m_new) + tl.sum(_exp2(x, m_new[:, None]), 1)
        s = tl.where(inside, sum_new, s)
        m = m_new
        if smoothing is not None:
            w = _weight(weight_ptr, head + start * UNIT + i, inside[:, None])
            wx += tl.where(inside, tl.sum(w * (x - x_t), 1), 0.0)
    x = tl.load(x_ptr + edge, mask=at_edge, other=-float("inf")).to(tl.float32)
    m_all = tl.maximum(tl.max(m, 0), tl.max(x, 0) * LOG2E)
    exps = tl.sum(s * tl.exp2(m - m_all), 0) + tl.sum(_exp2(x, m_all), 0)
    loss = total * (tl.fma(m_all, LN2, -x_t) + (m_all * LN2_REST + tl.log(exps)))
    if smoothing is not None:
        w = _weight(weight_ptr, edge, at_edge)
        wx_edge = tl.where(at_edge, w * (x - x_t), 0.0)
        loss -= spread * (tl.sum(wx, 0) + tl.sum(wx_edge, 0))
    return tl.where(counts, loss, 0.0), tl.where(counts, m_all, 0.0), tl.where(counts, exps, 1.0)


@triton.jit
def _gradient(x_ptr, dx_ptr, options, of_row, m, exps, scale, V, LANES: tl.constexpr):
    """Walks a row once and writes its gradient. `dx_ptr` is as far past a boundary as `x_ptr`. Of
    an ignored row nothing is read and scale is 0; of one without a class scale is NaN."""
    UNIT: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    weight_ptr, _, smoothing = options
    target, counts, is_class, keep, spread, total = of_row
    scale = tl.where(counts, tl.where(is_class, scale, float("nan")), 0.0)
    a = scale * total / exps
    head, units, edge, at_edge = _cut(x_ptr, V, UNIT)
    x_body = tl.multiple_of(x_ptr + head, 16)
    dx_body = tl.multiple_of(dx_ptr + head, 16)
    # The target's unit is compared once a unit, its column once a row: an element is not.
    j = tl.arange(0, UNIT)
    at_target = tl.where(j == (target - head) % UNIT, scale * keep, 0.0)[None, :]
    t_unit = tl.where(target >= head, (target - head) // UNIT, -1)
    for start in range(0, units, LANES):
        u = start + tl.arange(0, LANES)
        i = u[:, None] * UNIT + j[None, :]
        inside = (u < units)[:, None]
        x = tl.load(x_body + i, mask=inside & counts, other=0.0).to(tl.float32)
        dx = a * _exp2(x, m) - tl.where(u == t_unit, 1.0, 0.0)[:, None] * at_target
        if smoothing is not None:
            dx -= scale * spread * _weight(weight_ptr, head + i, inside)
        tl.store(dx_body + i, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    x = tl.load(x_ptr + edge, mask=at_edge & counts, other=0.0).to(tl.float32)
    dx = a * _exp2(x, m) - tl.where(edge == target, scale * keep, 0.0)
    if smoothing is not None:
        dx -= scale * spread * _weight(weight_ptr, edge, at_edge)
    tl.store(dx_ptr + edge, dx.to(dx_ptr.dtype.element_ty), mask=at_edge)


# Neither sizes nor addresses choose the code: one binary for a dtype and a set of options.
jit = triton.jit(
    do_not_specialize="stride target_stride scale_stride ignore N V smoothing".split(),
    do_not_specialize_on_alignment=(
        "logits_ptr target_ptr weight_ptr weight_sum_ptr report_ptr loss_ptr m_ptr exps_ptr "
        "scale_ptr dlogits_ptr"
    ).split(),
)


@jit
def _loss_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, report_ptr,  # (N, V) (N,) (V,) () (2,)
    loss_ptr, m_ptr, exps_ptr,                                       # (N,) fp32
    stride, target_stride, smoothing, ignore, V,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * V passes 2**31 at 42,731 rows of GPT-2
    options = (weight_ptr, weight_sum_ptr, smoothing)
    of_row = _row(target_ptr, options, report_ptr, row, target_stride, ignore, V)
    loss, m, exps = _loss(logits_ptr + row * stride, options, of_row, V, LANES)
    tl.store(loss_ptr + row, loss)
    tl.store(m_ptr + row, m)
    tl.store(exps_ptr + row, exps)


@jit
def _gradient_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, m_ptr, exps_ptr, scale_ptr, dlogits_ptr,
    stride, target_stride, scale_stride, smoothing, ignore, V,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    options = (weight_ptr, weight_sum_ptr, smoothing)
    of_row = _row(target_ptr, options, None, row, target_stride, ignore, V)
    scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
    _gradient(
        logits_ptr + row * stride, dlogits_ptr + row * stride, options, of_row,
        tl.load(m_ptr + row), tl.load(exps_ptr + row), scale, V, LANES,
    )


@jit
def _in_place_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, report_ptr, scale_ptr, loss_ptr,
    stride, target_stride, scale_stride, smoothing, ignore, N, V,
    LANES: tl.constexpr,
):
    options = (weight_ptr, weight_sum_ptr, smoothing)
    for i in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        of_row = _row(target_ptr, options, report_ptr, row, target_stride, ignore, V)
        x_ptr = logits_ptr + row * stride
        loss, m, exps = _loss(x_ptr, options, of_row, V, LANES)
        tl.store(loss_ptr + row, loss)
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        tl.debug_barrier()  # every thread has read the row, x_t too, before any writes to it
        _gradient(x_ptr, x_ptr, options, of_row, m, exps, scale, V, LANES)


# ------------------------------------------------------------------ autograd


def _tile(V: int) -> dict[str, int]:
    """Few columns need few threads. Over a vocabulary a thread has two units, 32 bytes, under way:
    64 registers, so that four programs fit on an SM."""
    lanes, warps = (32, 1) if V <= 512 else (256, 4) if V <= 8192 else (512, 8)
    return {"LANES": lanes, "num_warps": warps, "enable_fp_fusion": True}


def _check_kernel(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    check_cross_entropy(logits, target, weight)
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected logits in fp32, fp16 or bf16, got {logits.dtype}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"expected unit stride along V, got {logits.stride()}: call .contiguous()")
    if not can_launch(logits.device):
        raise ValueError(f"expected logits on a GPU, got {logits.device}")


def _class_weights(weight: Tensor | None, smoothing: float) -> tuple[Tensor | None, Tensor | None]:
    """fp32 and dense; their sum is needed only with smoothing."""
    if weight is None:
        return None, None
    weight = weight.detach().float().contiguous()
    return weight, weight.sum() if smoothing else None


def _empty_like(x: Tensor) -> Tensor:
    """The strides of x, and as far past a 16-byte boundary: rows of both are cut alike."""
    past = x.data_ptr() % 16 // x.element_size()
    N, V = x.shape
    flat = x.new_empty(past + max(0, N - 1) * x.stride(0) + V)
    return flat.as_strided(x.shape, x.stride(), past)


def _launch(row_kernel, programs: int, logits: Tensor, target: Tensor, weight, *args):
    if programs:
        with torch.cuda.device_of(logits):
            row_kernel[(programs,)](logits, target, weight, *args, **_tile(logits.shape[1]))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, smoothing, ignore, report):
        N, V = logits.shape
        weights = _class_weights(weight, smoothing)
        loss, *statistics = logits.new_empty(3, N, dtype=torch.float32)
        ctx.facts = logits.stride(0), target.stride(0), smoothing or None, ignore, V
        words = report.words if report else None
        _launch(_loss_kernel, N, logits, target, *weights, words, loss, *statistics, *ctx.facts)
        ctx.save_for_backward(logits, target, *weights, *statistics)  # the softmax is made again
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, *others = ctx.saved_tensors
        stride, target_stride, *facts = ctx.facts
        dlogits = _empty_like(logits)
        _launch(
            _gradient_kernel, len(logits), logits, *others, dloss, dlogits,
            stride, target_stride, dloss.stride(0), *facts,
        )
        return dlogits, None, None, None, None, None


# -------------------------------------------------------------------- public


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX, report: TargetReport | None = None,
) -> Tensor:
    """The loss of each row. Reducing is the caller's: `loss.sum() / number_of_targets`.

    Args:
        logits: (N, V) fp32, fp16 or bf16 with unit stride along V; only read.
        target: (N,) int64 in [0, V), or ignore_index. Else loss and gradient of its row are NaN.
        weight: (V,) class weights; default 1. They have no gradient.
        label_smoothing: in [0, 1].
        ignore_index: any integer; a row with this target has loss 0 and gradient 0.
        report: counts targets, and knows the one out of range.

    Returns:
        (N,) float32, in nats.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    _check_kernel(logits, target, weight)
    return _CrossEntropy.apply(logits, target, weight, label_smoothing, ignore_index, report)


@torch.no_grad()
def cross_entropy_(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX, row_scale: Tensor | None = None,
    report: TargetReport | None = None,
) -> Tensor:
    """The loss of each row, and `logits` become the gradient of `(row_scale * loss).sum()`.

    With autograd, hand the gradient on:

        loss = cross_entropy_(logits.detach(), target, row_scale=scale)
        logits.backward(logits.detach())

    Args:
        logits: as in `cross_entropy`; rows must not overlap. Overwritten.
        row_scale: (N,) or () float on the same device; default 1.
        target, weight, label_smoothing, ignore_index, report: as in `cross_entropy`.

    Returns:
        (N,) float32, without the scale.

    Raises:
        ValueError: as `cross_entropy`; or `logits` require a gradient or overlap.
    """
    _check_kernel(logits, target, weight)
    N, V = logits.shape
    if logits.requires_grad:
        raise ValueError("expected logits without gradient, to overwrite them: .detach()")
    if N > 1 and logits.stride(0) < V:
        raise ValueError(f"expected rows that do not overlap, got stride {logits.stride(0)} < {V}")
    scale = None if row_scale is None else row_scale.expand(N)
    loss = logits.new_empty(N, dtype=torch.float32)
    rows_in_flight = max(1, L2_BYTES // max(1, V * logits.element_size()))
    _launch(
        _in_place_kernel, min(N, rows_in_flight), logits, target,
        *_class_weights(weight, label_smoothing), report.words if report else None, scale, loss,
        logits.stride(0), target.stride(0), 0 if scale is None else scale.stride(0),
        label_smoothing or None, ignore_index, N, V,
    )
    if not logits.is_inference():  # such a tensor has no version
        torch.autograd.graph.increment_version(logits)
    return loss


def _launches():
    """Every dtype over a vocabulary; in bf16 every size, and every option at once."""
    cases = [("bf16", 50257, ""), ("fp16", 50257, ""), ("fp32", 50257, ""), ("bf16", 2, ""),
             ("bf16", 5000, ""), ("bf16", 50257, ", every option")]  # fmt: skip
    for dtype, V, full in cases:
        tile = _tile(V)
        options = {k: tile.pop(k) for k in ("num_warps", "enable_fp_fusion")}
        w, e, report, scale = ("*fp32 *fp32", "fp32", "*i64", "*fp32") if full else [""] * 4
        off = dict.fromkeys([] if full else ["weight_ptr", "weight_sum_ptr", "smoothing"])
        seen, scaled = ({}, {}) if full else ({"report_ptr": None}, {"scale_ptr": None})
        for kernel, types, const in (
            (_loss_kernel, f"{w} {report} *fp32 *fp32 *fp32 i32 i32 {e} i32 i32", off | seen),
            (_gradient_kernel, f"{w} *fp32 *fp32 *fp32 *{dtype} i32 i32 i32 {e} i32 i32", off),
            (_in_place_kernel, f"{w} {report} {scale} *fp32 i32 i32 i32 {e} i32 i32 i32",
             off | seen | scaled),
        ):  # fmt: skip
            types = " ".join(f"*{dtype} *i64 {types}".split())
            yield Launch(f"{dtype}, V {V}{full}", kernel, types, const | tile, options)


LAUNCHES = tuple(_launches())
