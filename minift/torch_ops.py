"""The operations in torch, as fast as it goes on a CPU; `minift.kernels` holds their definitions.

Each is held to its definition by the tests. What is done for speed: attention is a few batched
products over sequences of like length, dropout is a multiply-add and a compare an element, and
masks are made in the dtype of what they multiply (a bool operand is many times slower).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.add_norm import Norm, check_add_norm
from .kernels.attention import check_attention
from .kernels.bias_gelu import check_bias_gelu
from .kernels.cross_entropy import IGNORE_INDEX, check_cross_entropy
from .kernels.dropout import Dropout, row_words, threshold
from .kernels.embed import check_embed
from .kernels.layout import Group, Layout
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


# ---------------------------------------------------------------- attention


def _rectangle(x: Tensor, group: Group) -> Tensor:
    """(T, heads, ...) -> (heads, n, L, ...): a view, or a gather with repeats as padding."""
    x = x[group.start : group.stop]
    x = x if group.gather is None else x.index_select(0, group.gather)
    return x.view(group.n, group.length, *x.shape[1:]).movedim(2, 0)


def _write_rows(out: Tensor, x: Tensor, group: Group) -> None:
    """The inverse: (heads * n, L, D) into the rows of `out` (T, heads, D)."""
    x = x.view(-1, group.n, group.length, x.shape[-1]).movedim(0, 2).flatten(0, 1)
    x = x if group.scatter is None else x.index_select(0, group.scatter)
    out[group.start : group.stop] = x


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a @ b over the batch; the scale costs no pass of its own."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _wide(x: Tensor) -> Tensor:
    """fp32 or fp64, dense: on a CPU softmax and small products are slower in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _probabilities(scores: Tensor, group: Group, causal: bool) -> Tensor:
    """(H * n, L, L): padded keys, and with `causal` later ones, have 0."""
    n, L = group.n, group.length
    if group.real is not None:
        mask = torch.zeros_like(group.real).masked_fill_(group.real == 0, -math.inf)
        scores.view(-1, n, L, L).add_(mask[:, None])
    if causal:
        scores.add_(scores.new_full((L, L), -math.inf).triu_(1))
    return scores.softmax(-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, layout: Layout, n_head: int, causal: bool, dropout: Dropout | None):
        T, heads, D = qkv.shape
        n_key = (heads - n_head) // 2
        out = qkv.new_empty(T, n_head, D)
        out[sum(layout.lengths) :] = 0
        words = row_words(dropout) if dropout else ()
        scale, kept = 1 / math.sqrt(D), 1 / (1 - dropout.p) if dropout else 1.0
        saved = []
        for group in layout.groups:
            parts = _wide(_rectangle(qkv, group)).split([n_head, n_key, n_key])
            if n_key < n_head:
                parts = parts[0], *(x.repeat_interleave(n_head // n_key, 0) for x in parts[1:])
            q, k, v = (x.flatten(0, 1) for x in parts)  # (H * n, L, D)
            probs = dropped = _probabilities(_product(q, k.mT, scale), group, causal)
            if dropout is not None:
                a, b = (_rectangle(w, group).flatten(0, 1)[..., None] for w in words)
                keep = _keep(a, b, dropout.columns[: group.length], dropout.p, probs.dtype)
                dropped = keep.mul_(probs)
            _write_rows(out, _product(dropped, v, kept), group)
            saved += [q, k, v, probs, dropped]
        ctx.save_for_backward(*saved)
        ctx.facts = layout, n_head, n_key, scale, kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        layout, n_head, n_key, scale, kept = ctx.facts
        T, _, D = dout.shape
        dqkv = dout.new_empty(T, n_head + 2 * n_key, D)
        dqkv[sum(layout.lengths) :] = 0
        for i, group in enumerate(layout.groups):
            q, k, v, probs, dropped = ctx.saved_tensors[5 * i : 5 * i + 5]
            do = _wide(_rectangle(dout, group))
            if group.real is not None:
                do = do * group.real[..., None]  # a padded query has no gradient
            do = do.flatten(0, 1)
            ds = _product(do, v.mT, kept).mul_(dropped)  # P * dP: dropped holds P, or 0 where dP is
            ds.addcmul_(probs, ds.sum(-1, keepdim=True), value=-1)
            grads = (
                _product(ds, k, scale),
                _product(ds.mT, q, scale),
                _product(dropped.mT, do, kept),
            )
            if n_key < n_head:
                shape = n_key, n_head // n_key, group.n * group.length, D
                grads = grads[0], *(g.view(shape).sum(1).view(-1, *g.shape[1:]) for g in grads[1:])
            _write_rows(dqkv, torch.cat(grads), group)
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


def _layer_norm(s: Tensor, norm: Norm) -> Tensor:
    """In the dtype of `s`; on a GPU torch has no LayerNorm with parameters of another dtype."""
    weight, bias, eps = norm
    if s.dtype != weight.dtype and s.device.type == "cpu":
        return _MixedNorm.apply(s, weight, bias, eps)
    return F.layer_norm(s.to(weight.dtype), s.shape[1:], weight, bias, eps).to(s.dtype)


def add_norm(
    x: Tensor,
    residual: Tensor,
    norm: Norm,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """See `minift.kernels.add_norm.add_norm_ref`: the normed sum and the sum, (T, C) each."""
    check_add_norm(x, residual, norm)
    x = x if bias is None else x + bias.to(x.dtype)
    s = residual + x if dropout is None else _add_dropped(residual, x, dropout)
    return _layer_norm(s, norm), s


def bias_gelu(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """See `minift.kernels.bias_gelu.bias_gelu_ref`: (T, F) -> (T, F)."""
    check_bias_gelu(x, bias, kind)
    x = x if bias is None else x + bias.to(x.dtype)
    return F.gelu(x, approximate="none" if kind == "gelu_erf" else "tanh")


def embed(
    ids: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    norm: Norm | None,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> Tensor:
    """See `minift.kernels.embed.embed_ref`: (T, C) in `dtype`."""
    check_embed(ids, tables)
    s = sum(F.embedding(i, table) for i, table in zip(ids, tables, strict=True))
    y = s if norm is None else F.layer_norm(s, s.shape[1:], norm.weight, norm.bias, norm.eps)
    return drop(y, dropout).to(dtype)


# ------------------------------------------------------- the ends of a step


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
    wide, counts = torch.promote_types(logits.dtype, torch.float32), target != ignore_index
    if target.device.type == "cpu":
        bad = counts & ((target < 0) | (target >= logits.shape[1]))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise bad_target(row, int(target[row]))
    if report is not None:
        report.words[0] += counts.sum()
    return F.cross_entropy(
        logits.to(wide),
        target,
        None if weight is None else weight.to(wide),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )


def clip_in_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.optim.Optimizer:
    """The same optimizer of torch, whose step clips first, as that of `minift.kernels.adamw` does.

    `grad_norm` is then () fp32, the norm before clipping. On a CPU a step whose norm is not finite
    is not taken: it finds no gradients, and `skipped`, () int64, counts it.

    Args:
        max_grad_norm: gradients of a larger norm are scaled to it.
    """
    optimizer.skipped = torch.zeros((), dtype=torch.int64)

    def clip(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.grad_norm = norm
        if norm.device.type == "cpu" and not norm.isfinite():
            optimizer.skipped += 1
            optimizer.zero_grad()

    optimizer.register_step_pre_hook(clip)
    return optimizer


def adamw(
    groups: list[dict], betas: tuple[float, float], eps: float, max_grad_norm: float
) -> torch.optim.Optimizer:
    """torch's fused AdamW over groups with a rate and a decay each; see `clip_in_step`."""
    return clip_in_step(torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True), max_grad_norm)
