"""Bias, dropout, residual and LayerNorm: all that stands between one matmul and the next.

Math        x is the product of a matmul, `bias` its bias, r the residual stream; C columns:
                s = r + dropout(x + bias)
                y = (s - mean) * rstd * weight + norm_bias,   rstd = 1 / sqrt(var + eps)
            Backward, with ds the gradient that reaches s from elsewhere (pre-norm models use s
            again) and h = (s - mean) * rstd:
                g  = dy * weight
                dr = ds + rstd * (g - mean_C(g) - h * mean_C(g * h))
                dx = dropout(dr),   dbias = sum_T dx
                dweight = sum_T dy * h,   dnorm_bias = sum_T dy

Traffic     T rows, C columns, e bytes each. Forward reads x, r and writes s, y: 4*T*C*e. Backward
            reads dy, s (and ds) and writes dx, dr: 4*T*C*e, or 5 with ds.

Numerics    Statistics in fp32, whatever the dtype of x.
Source      Ba et al. 2016, arXiv:1607.06450; post-norm as in BERT, pre-norm as in GPT-2.
"""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """The parameters of a LayerNorm over C columns."""

    weight: Tensor  # (C,)
    bias: Tensor    # (C,)
    eps: float      # added to the variance


def add_norm_ref(
    x: Tensor, residual: Tensor, norm: Norm, bias: Tensor | None = None,
    keep: Tensor | None = None, p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of `x`.

    Args:
        x: (T, C) float.
        residual: (T, C).
        norm: weight and bias (C,), eps.
        bias: (C,), of the matmul that made `x`.
        keep: (T, C) bool: elements of x + bias that stay.
        p: the probability that `keep` was drawn with.

    Returns:
        (y, s): the normed sum and the sum, (T, C) each.
    """
    x = x if bias is None else x + bias
    x = x if keep is None else x * keep / (1 - p)
    s = residual + x
    centred = s - s.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias, s


def check_add_norm(x: Tensor, residual: Tensor, norm: Norm) -> None:
    """Raises ValueError when shapes disagree."""
    if x.ndim != 2 or residual.shape != x.shape or norm.weight.shape != x.shape[1:]:
        shapes = f"{tuple(x.shape)}, {tuple(residual.shape)}, {tuple(norm.weight.shape)}"
        raise ValueError(f"expected x (T, C), residual (T, C) and norm (C,), got {shapes}")
