"""The operations in torch, as fast as it goes on a CPU; `minift.kernels` holds their definitions.

Each is held to its definition by the tests; attention has a file of its own. What is done for
speed: dropout is a multiply-add and a compare an element, and masks are made in the dtype of what
they multiply (a bool operand is many times slower).
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.add_norm import Norm, check_add_norm
from .kernels.bias_gelu import check_bias_gelu
from .kernels.cross_entropy import IGNORE_INDEX, check_cross_entropy
from .kernels.dropout import Dropout, row_words, threshold
from .kernels.embed import check_embed
from .kernels.embed_order import EmbedOrder
from .kernels.linear_cross_entropy import (
    WORKSPACE_MIB,
    Job,
    LinearCrossEntropy,
    Parts,
    check_linear_cross_entropy,
)
from .kernels.table_gradients import TableGradients
from .kernels.target_report import TargetReport, bad_target


def _keep(a: Tensor, b: Tensor, x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 where an element stays and 0 where it goes, of shape a * x, in `dtype`."""
    words = (a * x).add_(b - 2**31)  # int32 wraps; minus 2**31 turns an unsigned compare signed
    return torch.ge(words, threshold(p), out=torch.empty(words.shape, dtype=dtype, device=x.device))


class _AddDropped(torch.autograd.Function):
    """residual + x * keep * scale, in one pass. By hand, because autograd would round the scale to
    the dtype of x: in bf16 1 / (1 - 0.1) becomes 0.16 % too small. `addcmul` computes in fp32."""

    @staticmethod
    def forward(ctx, residual: Tensor, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.addcmul(residual, x, keep, value=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        (keep,) = ctx.saved_tensors
        dx = torch.addcmul(dout.new_zeros(()), dout, keep, value=ctx.scale)
        return dout, dx, None, None


def _add_dropped(residual: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    a, b = (words[:, :1] for words in row_words(dropout))
    keep = _keep(a, b, dropout.columns[: x.shape[1]], dropout.p, x.dtype)
    return _AddDropped.apply(residual, x, keep, 1 / (1 - dropout.p))


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """See `minift.kernels.dropout.dropout_ref`: (T, C) -> (T, C). None drops nothing."""
    return x if dropout is None else _add_dropped(x.new_zeros(()), x, dropout)


# ------------------------------------------------------- between the matmuls


class _MixedNorm(torch.autograd.Function):
    """LayerNorm of bf16 rows with fp32 parameters on a CPU. Torch's own backward adds up the
    parameters' gradients in bf16, row by row: after 4096 rows they are 10 % off."""

    @staticmethod
    def forward(ctx, s: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(s, s.shape[1:], weight, bias, eps)
        ctx.save_for_backward(s, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        s, weight, bias, mean, rstd = ctx.saved_tensors
        need_s, need_weight, need_bias, _ = ctx.needs_input_grad
        dy, columns = dy.contiguous(), s.shape[1:]
        ds = dweight = dbias = None
        if need_s:
            ds, _, _ = torch.ops.aten.native_layer_norm_backward(
                dy, s, columns, mean, rstd, weight, bias, [True, False, False]
            )
        if need_weight or need_bias:
            # sum_T dy * h and sum_T dy are the gradients of a batch norm of h with mean 0 and
            # deviation 1, which torch adds up in fp32, both in one pass.
            h = F.layer_norm(s, columns, eps=ctx.eps) if need_weight else s
            zero, one = torch.zeros_like(weight), torch.ones_like(weight)
            _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dy, h, one, None, None, zero, one, True, 0.0, [False, need_weight, need_bias]
            )
        return ds, dweight, dbias, None


def _norm(s: Tensor, norm: Norm) -> Tensor:
    """In the dtype of `s`; torch has no norm with parameters of another dtype on a GPU, and on a
    CPU none but LayerNorm with both of them."""
    weight, bias, eps, rms = norm
    if s.dtype != weight.dtype and s.device.type == "cpu" and bias is not None:
        return _MixedNorm.apply(s, weight, bias, eps)
    wide, columns = s.to(weight.dtype), s.shape[1:]
    if rms:
        return F.rms_norm(wide, columns, weight, eps).to(s.dtype)
    return F.layer_norm(wide, columns, weight, bias, eps).to(s.dtype)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    post: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `minift.kernels.add_norm.add_norm_ref`: the normed sum, and that or the sum, (T, C)."""
    check_add_norm(x, residual, norm, bias)
    x = x if bias is None else x + bias.to(x.dtype)
    if residual is None:
        s = drop(x, dropout)
    else:
        s = residual + x if dropout is None else _add_dropped(residual, x, dropout)
    y = _norm(s, norm)
    return y, y if post else s


def bias_gelu(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """See `minift.kernels.bias_gelu.bias_gelu_ref`: (T, F) -> (T, F)."""
    check_bias_gelu(x, bias, kind)
    x = x if bias is None else x + bias.to(x.dtype)
    return F.gelu(x, approximate="none" if kind == "gelu_erf" else "tanh")


class _KeptRows(torch.autograd.Function):
    """The sum of a row of each table, whose gradients go to memory that is kept."""

    @staticmethod
    def forward(ctx, gradients: TableGradients, ids: tuple[Tensor, ...], *tables: Tensor):
        ctx.facts = gradients, ids
        ctx.save_for_backward(*tables)
        return sum(F.embedding(i, table) for i, table in zip(ids, tables, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, ds: Tensor):
        (gradients, ids), tables = ctx.facts, ctx.saved_tensors
        grads = gradients.take(tables, ctx.needs_input_grad[2:], ids, None)
        for grad, i in zip(grads, ids, strict=True):
            if grad is not None:
                grad.data.index_add_(0, i, ds)  # no writing that `settle` would notice
        return None, None, *grads


def embed(
    ids: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    norm: Norm | None,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
    order: EmbedOrder | None = None,
) -> Tensor:
    """See `minift.kernels.embed.embed_ref`: (T, C) in `dtype`. Of the order only the memory for the
    gradients is used, on a CPU: at T = 800 by 30,522 words of 384 the gradient takes 0.4 ms in
    memory that is kept and 34 ms in new memory. To add up by segments would spare nothing more."""
    check_embed(ids, tables)
    if order is not None and order.gradients is not None and tables[0].device.type == "cpu":
        s = _KeptRows.apply(order.gradients, ids, *tables)
    else:
        s = sum(F.embedding(i, table) for i, table in zip(ids, tables, strict=True))
    y = s if norm is None else _norm(s, norm)
    return drop(y, dropout).to(dtype)


# ------------------------------------------------------- the ends of a step


def _see(target: Tensor, classes: int, ignore_index: int, report: TargetReport | None) -> None:
    """Counts targets. On a CPU, raises ValueError at one that is no class."""
    counts = target != ignore_index
    if target.device.type == "cpu":
        bad = counts & ((target < 0) | (target >= classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise bad_target(row, int(target[row]))
    if report is not None:
        report.words[0] += counts.sum()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    report: TargetReport | None = None,
) -> Tensor:
    """See `minift.kernels.cross_entropy.cross_entropy_ref`: (N,) losses. On a CPU a target that is
    no class raises ValueError at once."""
    check_cross_entropy(logits, target, weight)
    _see(target, logits.shape[1], ignore_index, report)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.to(wide),
        target,
        None if weight is None else weight.to(wide),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )


def _listed(x: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    return x.index_select(0, rows).masked_fill_((targets == IGNORE_INDEX)[:, None], 0)


def _losses(logits: Tensor, targets: Tensor, report: None) -> Tensor:
    losses = []
    for part, t, ignored in _in_cache(logits, targets):
        _, loss = _probabilities(logits[part], t)
        losses.append(loss.masked_fill_(ignored, 0)[:, 0])
    return torch.cat(losses)


def _losses_(logits: Tensor, targets: Tensor, scale: Tensor | None, report: None) -> Tensor:
    """(n,) losses; `logits` become the gradient of their sum, times `scale`."""
    losses = []
    for part, t, ignored in _in_cache(logits, targets):
        dx, loss = _probabilities(logits[part], t)
        losses.append(loss.masked_fill_(ignored, 0)[:, 0])
        dx.scatter_add_(1, t, dx.new_full((), -1).expand(t.shape))
        if scale is not None:
            dx.mul_(scale[part, None])
        if logits.device.type != "cpu" or ignored.any():
            dx.masked_fill_(ignored, 0)
        logits[part] = dx
    return torch.cat(losses)


def _probabilities(logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, V) wide, and (rows, 1) minus the log of those of the targets. Logs of all of them are
    a pass more, which on a CPU is only made where a target's probability may underflow."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.device.type == "cpu":
        p = logits.softmax(-1, dtype=wide)
        p_t = p.gather(1, t)
        if not (p_t < 1e-30).any():
            return p, p_t.log_().neg_()
    logp = logits.log_softmax(-1, dtype=wide)
    loss = logp.gather(1, t).neg_()
    return logp.exp_(), loss


def _in_cache(logits: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(where, targets, ignored) of a few rows in turn, which on a CPU are still in the cache when
    they are wanted again; the last two (rows, 1)."""
    N, V = logits.shape
    step = max(1, IN_CACHE // V) if logits.device.type == "cpu" else max(N, 1)
    for start in range(0, max(N, 1), step):
        part = slice(start, min(N, start + step))
        ignored = (targets[part] == IGNORE_INDEX)[:, None]
        yield part, targets[part, None].masked_fill(ignored, 0), ignored


def _scale_(grads: list[Tensor | None], scale: Tensor) -> None:
    if scale.device.type == "cpu" and scale == 1:
        return
    for grad in grads:
        if grad is not None:
            grad.mul_(scale)  # computes in fp32


IN_CACHE = 1 << 18  # logits: 1 MB in fp32
LINEAR_CROSS_ENTROPY = Parts(
    gather=_listed,
    scatter_=lambda dx, dx_c, rows, _: dx.index_add_(0, rows, dx_c),  # of an ignored target: 0
    loss=_losses,
    loss_=_losses_,
    scale_=_scale_,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    vocab: int | None = None,
    report: TargetReport | None = None,
    workspace_mib: float = WORKSPACE_MIB,
) -> Tensor:
    """See `minift.kernels.linear_cross_entropy.linear_cross_entropy_ref`: () fp32. Gradients are
    made in the forward pass and handed out once. On a CPU a target that is no class raises
    ValueError at once."""
    check_linear_cross_entropy(x, weight, targets, rows, row_scale, bias, vocab)
    _see(targets, vocab or len(weight), IGNORE_INDEX, report)
    job = Job(LINEAR_CROSS_ENTROPY, targets, rows, row_scale, vocab, None, workspace_mib)
    return LinearCrossEntropy.apply(x, weight, bias, job)


def _total_norm(grads: list[Tensor]) -> Tensor:
    """() of all of them together. On a CPU a dot product is twice as fast as torch's norm."""
    if not grads or grads[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(grads)
    flat = [g.reshape(-1) for g in grads]
    return torch.stack([x.dot(x) for x in flat]).sum().sqrt()


def clip_in_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.optim.Optimizer:
    """The same optimizer of torch, whose step clips first, as that of `minift.kernels.adamw` does.

    `grad_norm` is then () fp32, the norm before clipping. On a CPU a step whose norm is not finite
    is not taken: it finds no gradients, and `skipped`, () int64, counts it. A fused optimizer
    clips while it reads the gradients: a pass over memory less.

    Args:
        max_grad_norm: gradients of a larger norm are scaled to it.
    """
    optimizer.skipped = torch.zeros((), dtype=torch.int64)
    fused = optimizer.defaults.get("fused")

    def clip(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = _total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.grad_norm = norm
        if norm.device.type == "cpu" and not norm.isfinite():
            optimizer.skipped += 1
            optimizer.zero_grad()
        elif fused:  # it divides by what torch calls the scale of a loss
            optimizer.grad_scale = ((norm + 1e-6) / max_grad_norm).clamp(min=1).float()
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def adamw(
    groups: list[dict],
    betas: tuple[float, float],
    eps: float,
    max_grad_norm: float,
    masters: Mapping[Tensor, Tensor] | None = None,
) -> torch.optim.Optimizer:
    """torch's fused AdamW over groups with a rate and a decay each; see `clip_in_step`.

    Raises:
        ValueError: there are `masters`: torch would step 16-bit weights without them.
    """
    if masters:
        raise ValueError("expected fp32 parameters: torch's AdamW keeps no masters")
    return clip_in_step(torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True), max_grad_norm)
