"""Softmax cross-entropy over V classes, a loss for each row.

Math        One row x of V logits with target t, class weights w, smoothing e:
                lse  = log sum_v exp(x_v),   logp_v = x_v - lse
                c_v  = (1 - e) * w_t * [v == t] + e / V * w_v
                loss = -sum_v c_v * logp_v
                dx_v = dloss * (exp(logp_v) * sum_k c_k - c_v)
            A row whose target is IGNORE_INDEX has loss 0 and gradient 0. The mean that torch
            reports divides the sum of losses by the sum of w_t: dividing is the caller's, who may
            accumulate over several batches first.

Traffic     N rows, V columns, e bytes per logit: forward N*V*e, backward 2*N*V*e.
Numerics    fp32 arithmetic and fp32 loss, whatever the dtype of the logits.
Source      label smoothing: Szegedy et al. 2015, arXiv:1512.00567, section 7.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100


def cross_entropy_ref(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0,
) -> Tensor:
    """The definition, in the dtype of `logits` or fp32, whichever is wider.

    Args:
        logits: (N, V) float.
        target: (N,) int64 in [0, V), or IGNORE_INDEX.
        weight: (V,) class weights; default 1.
        label_smoothing: e in [0, 1].

    Returns:
        (N,) losses in nats, float32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = logits - logits.logsumexp(-1, keepdim=True)
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight
    t = target.masked_fill(target == IGNORE_INDEX, 0)
    nll = -weight[t] * logp.gather(1, t[:, None])[:, 0]
    smooth = -(weight * logp).mean(-1)
    loss = (1 - label_smoothing) * nll + label_smoothing * smooth
    return torch.where(target == IGNORE_INDEX, 0.0, loss)


def check_cross_entropy(logits: Tensor, target: Tensor) -> None:
    """Raises ValueError when shapes or the target's dtype do not fit."""
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise ValueError(f"expected logits (N, V) and target (N,), got {shapes}")
    if target.dtype != torch.int64:
        raise ValueError(f"expected an int64 target, got {target.dtype}: call .long()")
