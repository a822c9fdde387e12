"""The last projection and its cross-entropy in one: logits are never there as a whole.

Math        N listed rows of x, each with a target t_n and a scale s_n; W has V rows, c is a bias:
                z_n  = W x_n + c                 loss = sum_n s_n * (log sum_v exp(z_nv) - z_nt)
                g_nv = s_n * (softmax(z_n)_v - [v == t_n])
                dx_n = sum_v g_nv W_v            dW_v = sum_n g_nv x_n          dc_v = sum_n g_nv
            The loss is a sum with weights, so what comes from above is one number: 1, where a mean
            is put into s. Gradients are therefore made in the forward pass, while logits are at
            hand: three products of 2*N*C*V flops each; making logits again would be a fourth.

Chunks      Rows are taken in chunks, of which one fits in the workspace:

                gather rows -> logits -> loss, in place -> dx of the chunk -> add to dW and dc
                  x_c (n, C)   (n, V)     g over logits      g W                g^T x_c

            A row of logits starts at a multiple of 64 columns, which any V needs for its products
            to run at full speed; the columns between are 0.

Cost        6*N*C*V flops. Of memory the floor is 2*(N*C + V*C) elements in and out; beyond it:
                logits      written, read and overwritten, read twice: in bf16 10*N*V bytes
                dW          of K chunks in fp32: 4*V*C bytes written, then 8*V*C more a chunk,
                            which at 2048 rows is a tenth of what the products take
            Workspace: the logits of a chunk; of several chunks dW in fp32, too, unless it is the
            gradient itself. A bias is a pass, two more where V is no multiple of 64.

Numerics    Logits and g have the dtype of x, losses and sums fp32. dW is added up in fp32 over all
            chunks and rounded once, so results do not depend on chunks but for the order of fp32
            additions. Rows of W beyond the vocabulary (padding) take part in products: their
            logits count as -inf and their g is 0.
Source      Hsu et al. 2024, arXiv:2410.10989; Wijmans et al. 2024, arXiv:2411.09009.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cross_entropy import IGNORE_INDEX, cross_entropy, cross_entropy_, cross_entropy_ref
from .launch import Launch, can_launch
from .target_report import TargetReport

WORKSPACE_MIB = 512.0
LEAST_ROWS = 2048  # of a chunk: with fewer, dW is read and written too often
BLOCK = 1024  # elements a program moves at a time, eight a thread
TILE = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": True}
PROGRAMS = 1056  # of the kernel that scales: eight for each SM of an H200
IGNORE = tl.constexpr(IGNORE_INDEX)

# ---------------------------------------------------------------- definition


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None,
    row_scale: Tensor | None = None, bias: Tensor | None = None, vocab: int | None = None,
) -> Tensor:
    """The definition. Projections are in the dtype of `x`, the loss in fp32 (fp64 for fp64).

    Args:
        x: (T, C) float.
        weight: (V, C) float, bias: (V,) float; cast to the dtype of `x`.
        targets: (N,) int64 in [0, vocab), or IGNORE_INDEX: such an entry adds nothing.
        rows: (N,) int64 in [0, T): the row of each target; default: all T rows.
        row_scale: (N,) or () float; default 1.
        vocab: how many rows of `weight` are classes; default: all V.

    Returns:
        () sum of row_scale * loss, float32 (float64 for float64 x).
    """
    counts = targets != IGNORE_INDEX
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    logits = x[rows[counts]] @ weight[:vocab].to(x.dtype).T
    logits = logits if bias is None else logits + bias[:vocab].to(x.dtype)
    loss = cross_entropy_ref(logits, targets[counts])
    return loss.sum() if row_scale is None else (loss * row_scale.expand(len(rows))[counts]).sum()


def check_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None,
    row_scale: Tensor | None = None, bias: Tensor | None = None, vocab: int | None = None,
) -> None:
    """Raises ValueError when shapes, dtypes or devices do not fit."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"expected x (T, C) and weight (V, C), got {shapes}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"expected weight in {x.dtype} or fp32, got {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({len(weight)},), got {tuple(bias.shape)}")
    if not 0 < (len(weight) if vocab is None else vocab) <= len(weight):
        raise ValueError(f"expected vocab in [1, {len(weight)}], got {vocab}")
    n = x.shape[:1] if rows is None else rows.shape
    if len(n) != 1 or targets.shape != n:
        listed = "x" if rows is None else "rows (N,)"
        shapes = f"{tuple(targets.shape)} for {tuple(n)}"
        raise ValueError(f"expected a target for each of {listed}, got {shapes}")
    for name, index in (("targets", targets), ("rows", rows)):
        if index is not None and index.dtype != torch.int64:
            raise ValueError(f"expected {name} in int64, got {index.dtype}: call .long()")
    if row_scale is not None and row_scale.shape not in ((), targets.shape):
        shapes = f"({len(targets)},) or (), got {tuple(row_scale.shape)}"
        raise ValueError(f"expected row_scale {shapes}")
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError("expected row_scale without gradient, it gets none: .detach()")
    others = {"weight": weight, "targets": targets, "rows": rows, "row_scale": row_scale}
    for name, tensor in (others | {"bias": bias}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"expected {name} on {x.device}, got {tensor.device}")


# ------------------------------------------------------------------- kernels


# The row count never chooses the code. C and the stride do: on their divisors rests the width of
# an access. So do addresses, but for those of lists, which begin at any entry.
jit_rows = triton.jit(
    do_not_specialize=["T"], do_not_specialize_on_alignment=["rows_ptr", "targets_ptr"]
)


@jit_rows
def _gather_kernel(
    x_ptr, rows_ptr, targets_ptr, out_ptr,  # (T, C) (N,) (N,) (N, C)
    stride, C, T,
    BLOCK: tl.constexpr,
):
    """A listed row; of an ignored target zeros, whatever its row holds: 0 * NaN would be NaN in
    dW. A row that does not exist is NaN."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + n)
    counts = tl.load(targets_ptr + n) != IGNORE
    exists = (row >= 0) & (row < T)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + c, mask=(c < C) & counts & exists, other=0.0)
        x = tl.where(counts & (exists == 0), float("nan"), x)
        tl.store(out_ptr + n * C + c, x.to(out_ptr.dtype.element_ty), mask=c < C)


@jit_rows
def _scatter_kernel(
    dx_c_ptr, rows_ptr, targets_ptr, dx_ptr,  # (N, C) (N,) (N,) (T, C)
    C, T,
    BLOCK: tl.constexpr,
):
    """The inverse. An ignored target writes nothing: another entry may list its row."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + n)
    counts = tl.load(targets_ptr + n) != IGNORE
    written = counts & (row >= 0) & (row < T)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dx = tl.load(dx_c_ptr + n * C + c, mask=(c < C) & written)
        tl.store(dx_ptr + row * C + c, dx, mask=(c < C) & written)


@triton.jit
def _times(x_ptr, scale, n, BLOCK: tl.constexpr):
    """n elements, each times a scale, in place; None is left. A whole block has no mask, which
    would narrow its accesses."""
    if x_ptr is not None:
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            start = tl.cast(block, tl.int64) * BLOCK
            i = start + tl.arange(0, BLOCK)
            if start + BLOCK <= n:
                x = tl.load(x_ptr + i).to(tl.float32) * scale
                tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty))
            else:
                x = tl.load(x_ptr + i, mask=i < n).to(tl.float32) * scale
                tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty), mask=i < n)
    return scale


@triton.jit(
    do_not_specialize=["n_dx", "n_dweight", "n_dbias"], do_not_specialize_on_alignment=["scale_ptr"]
)
def _scale_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, scale_ptr, n_dx, n_dweight, n_dbias, BLOCK: tl.constexpr
):
    """All gradients in place, unless the scale is 1: nobody on the host need know."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        _times(dx_ptr, scale, n_dx, BLOCK)
        _times(dweight_ptr, scale, n_dweight, BLOCK)
        _times(dbias_ptr, scale, n_dbias, BLOCK)


def _gather(x: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """(N, C): listed rows, zeros where the target is ignored."""
    out = x.new_empty(len(rows), x.shape[1])
    sizes = x.stride(0), x.shape[1], len(x)
    if out.numel():
        with torch.cuda.device_of(x):
            _gather_kernel[(len(rows),)](x, rows, targets, out, *sizes, **TILE)
    return out


def _scatter_(dx: Tensor, dx_c: Tensor, rows: Tensor, targets: Tensor) -> None:
    """Rows of `dx` become those of `dx_c` whose target counts."""
    if dx_c.numel():
        with torch.cuda.device_of(dx):
            _scatter_kernel[(len(rows),)](dx_c, rows, targets, dx, *reversed(dx.shape), **TILE)


def _scale_(grads: list[Tensor | None], scale: Tensor) -> None:
    """dx, dW and dc, those that are there, times a scale in device memory."""
    sizes = [0 if g is None else g.numel() for g in grads]
    blocks = max(triton.cdiv(n, BLOCK) for n in sizes)
    if blocks:
        with torch.cuda.device_of(scale):
            _scale_kernel[(min(blocks, PROGRAMS),)](*grads, scale, *sizes, **TILE)


# ------------------------------------------------------------------ autograd


@dataclass(frozen=True)
class Parts:
    """What differs between the kernels and torch."""

    gather: Callable  # (x, rows, targets) -> listed rows, zeros where the target is ignored
    scatter_: Callable  # (dx, dx_c, rows, targets): rows of dx become those of dx_c that count
    loss: Callable  # (logits, targets, report) -> (n,) losses
    loss_: Callable  # (logits, targets, scale, report) -> (n,) losses; logits become gradients
    scale_: Callable  # ([dx, dW, dc], scale): in place


KERNELS = Parts(
    _gather,
    _scatter_,
    lambda logits, targets, report: cross_entropy(logits, targets, report=report),
    lambda logits, targets, scale, report: cross_entropy_(
        logits, targets, row_scale=scale, report=report
    ),
    _scale_,
)


@dataclass(frozen=True)
class Job:
    """All that has no gradient."""

    parts: Parts
    targets: Tensor
    rows: Tensor | None
    row_scale: Tensor | None
    vocab: int | None
    report: TargetReport | None
    workspace_mib: float
    grad: bool = field(default_factory=torch.is_grad_enabled)


@dataclass(frozen=True)
class Gradients:
    """Those that are asked for; the others are None."""

    dx: Tensor | None  # (T, C)
    dweight: Tensor | None  # (V, C)
    dbias: Tensor | None  # (V,)

    def add_(self, g: Tensor, x_c: Tensor, w: Tensor, job: Job, part: slice) -> None:
        """What a chunk adds, from the gradient of its logits, g (n, V)."""
        if self.dx is not None and job.rows is None:
            torch.mm(g, w, out=self.dx[part])
        elif self.dx is not None:
            job.parts.scatter_(self.dx, g @ w, job.rows[part], job.targets[part])
        if self.dweight is not None:
            _add_product_(self.dweight, g, x_c, first=part.start == 0)
        if self.dbias is not None:
            self.dbias.add_(g.sum(0, dtype=self.dbias.dtype))


def chunk_rows(N: int, row_bytes: int, beside: int, workspace_mib: float) -> int:
    """How many rows of logits are made at a time: as many as fit, in chunks of like size.

    Args:
        row_bytes: of a row of logits.
        beside: what several chunks need besides their logits, in bytes.
        workspace_mib: the limit. One below the default is kept to the row.
    """
    limit = int(workspace_mib * 2**20)
    most = max((limit - beside) // row_bytes, LEAST_ROWS if workspace_mib >= WORKSPACE_MIB else 1)
    if most >= N or N * row_bytes <= limit:
        return max(N, 1)
    size = triton.cdiv(N, triton.cdiv(N, most))
    return min(triton.cdiv(size, 128) * 128, most)


def _add_product_(total: Tensor, g: Tensor, x: Tensor, first: bool) -> None:
    """total (V, C) += g^T x, in the dtype of `total`. The first product overwrites."""
    out = {"out": total}
    if total.dtype != x.dtype and x.is_cuda:
        out["out_dtype"] = total.dtype
    elif total.dtype != x.dtype:
        # A CPU has no product of bf16 with its result in fp32. Widened, on a core with AMX:
        # 340 ms at 512 x 768 x 50257, 127 ms at 2048 x 384 x 8192. As two products of bf16, a
        # result and what its rounding lost: 657 and 164 ms, and right to 18 bits only. One
        # product of bf16 takes 73 and 70 ms, but how it rounds would depend on the chunks.
        g, x = g.to(total.dtype), x.to(total.dtype)
    (torch.mm if first else partial(torch.addmm, total))(g.T, x, **out)


def _merge(report: TargetReport, seen: Tensor, size: int) -> None:
    """Adds what chunks of `size` targets saw, (chunks, 2); rows count from the first chunk on."""
    first_row = torch.arange(0, len(seen) * size, size, device=seen.device)
    bad = torch.where(seen[:, 1] > 0, seen[:, 1] + (first_row << 32), 0)
    report.words[0] += seen[:, 0].sum()
    report.words[1] = torch.maximum(report.words[1], bad.max())


def _total(losses: Tensor, job: Job) -> Tensor:
    """() sum of row_scale * loss. Where nothing counts the scale may be 1 / 0."""
    if job.row_scale is None:
        return losses.sum()
    weighted = losses * job.row_scale.to(losses.dtype)
    return weighted.masked_fill_(job.targets == IGNORE_INDEX, 0).sum()


def _walk(x, w, bias, size: int, grads: Gradients | None, job: Job) -> Tensor:
    """Takes the chunks in turn, all logits in one buffer: (N,) losses, and `grads` are added up."""
    N, V, classes = len(job.targets), len(w), job.vocab or len(w)
    buffer = x.new_empty(size, triton.cdiv(V, 64) * 64)
    buffer[:, V:] = 0  # on a CPU a product of an odd V in bf16 takes another column, times 0
    scale = None if job.row_scale is None else job.row_scale.expand(N)
    starts = range(0, max(N, 1), size)  # of no targets one chunk, so that sums are written
    project = torch.mm if bias is None else partial(torch.addmm, bias)
    several = job.report is not None and len(starts) > 1
    seen = job.report.words.new_zeros(len(starts), 2) if several else None
    losses = []
    for i, start in enumerate(starts):
        part = slice(start, min(N, start + size))
        targets = job.targets[part]
        report = TargetReport(seen[i]) if several else job.report
        x_c = x[part] if job.rows is None else job.parts.gather(x, job.rows[part], targets)
        logits = buffer[: len(targets), :V]
        project(x_c, w.T, out=logits)
        real = logits[:, :classes]
        if grads is None:
            losses.append(job.parts.loss(real, targets, report))
            continue
        s = None if scale is None else scale[part]
        losses.append(job.parts.loss_(real, targets, s, report))
        logits[:, classes:] = 0
        grads.add_(logits, x_c, w, job, part)
    if several:
        _merge(job.report, seen, size)
    return torch.cat(losses)


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, and handed out once."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Tensor:
        need_x, need_weight, need_bias = (job.grad and n for n in ctx.needs_input_grad[:3])
        N, (V, C), cast = len(job.targets), weight.shape, weight.dtype != x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)  # fp64 is torch's
        beside = V * C * (x.element_size() if cast else 4 * (need_weight and x.dtype != wide))
        row_bytes = triton.cdiv(V, 64) * 64 * x.element_size()
        size = chunk_rows(N, row_bytes, beside, job.workspace_mib)
        sums = x.dtype if size >= N and not cast else wide  # a single product rounds once itself
        grads = Gradients(
            (x.new_empty if job.rows is None else x.new_zeros)(x.shape) if need_x else None,
            x.new_empty(V, C, dtype=sums) if need_weight else None,
            x.new_zeros(V, dtype=wide) if need_bias else None,
        )
        w, c = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        any_grad = need_x or need_weight or need_bias
        losses = _walk(x, w, c, size, grads if any_grad else None, job)
        dweight = None if grads.dweight is None else grads.dweight.to(weight.dtype)
        dbias = None if grads.dbias is None else grads.dbias.to(bias.dtype)
        ctx.grads, ctx.scale_ = [grads.dx, dweight, dbias], job.parts.scale_
        return _total(losses, job)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("expected one backward of linear_cross_entropy: gradients are gone")
        ctx.scale_(grads, dloss)
        return *grads, None


# -------------------------------------------------------------------- public


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None,
    row_scale: Tensor | None = None, bias: Tensor | None = None, *, vocab: int | None = None,
    report: TargetReport | None = None, workspace_mib: float = WORKSPACE_MIB,
) -> Tensor:
    """The sum over listed rows of row_scale * loss(x[row] W^T + bias, target).

    backward may be called once; nothing is saved but the gradients that are asked for. In fp16
    the loss's scale, if it has one, belongs in `row_scale`: logits' gradients are rounded with it.

    Args:
        x: (T, C) fp32, fp16 or bf16 with unit stride along C.
        weight: (V, C) in the dtype of `x`, or fp32 and cast to it.
        targets: (N,) int64 in [0, vocab), or IGNORE_INDEX: loss 0, no gradient. Else the loss is
            NaN.
        rows: (N,) int64 in [0, T), the row of each target; default: all T rows in order. No row
            twice but with an ignored target, as at the end of a list of fixed length. What no
            target of the list that counts stands for may hold anything.
        row_scale: (N,) or () float on the same device; default 1. It has no gradient.
        bias: (V,) float, cast to the dtype of `x`.
        vocab: how many rows of `weight` are classes, from the first; default: all V. The others
            must be finite; they win no probability and have gradient 0.
        report: counts targets, and knows the one out of range.
        workspace_mib: what the logits of a chunk may take, with dW in fp32 where that is not the
            gradient. At the default or above a chunk has 2048 rows or more all the same.

    Returns:
        () float32.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
        RuntimeError: from a second backward.
    """
    check_linear_cross_entropy(x, weight, targets, rows, row_scale, bias, vocab)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected x in fp32, fp16 or bf16, got {x.dtype}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"expected unit stride along C, got {x.stride()}: call .contiguous()")
    if not can_launch(x.device):
        raise ValueError(f"expected x on a GPU, got {x.device}")
    targets, rows = targets.contiguous(), None if rows is None else rows.contiguous()
    job = Job(KERNELS, targets, rows, row_scale, vocab, report, workspace_mib)
    return LinearCrossEntropy.apply(x, weight, bias, job)


def _launches():
    """Every dtype at the width of BERT; gradients of fp32 weights beside bf16 rows."""
    tile = {"BLOCK": TILE["BLOCK"]}
    options = {k: v for k, v in TILE.items() if k not in tile}
    for t in ("bf16", "fp16", "fp32"):
        gather = f"*{t}:16 *i64 *i64 *{t}:16 i32:16 i32:16 i32"
        yield Launch(t, _gather_kernel, gather, tile, options)
        yield Launch(t, _scatter_kernel, f"*{t}:16 *i64 *i64 *{t}:16 i32:16 i32", tile, options)
    for t, w in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
        types = f"*{t}:16 *{w}:16 *{w}:16 *fp32 i32 i32 i32"
        yield Launch(f"{t}, weights {w}", _scale_kernel, types, tile, options)


LAUNCHES = tuple(_launches())
