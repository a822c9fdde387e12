"""Bias and GELU.

Math        z = x + bias
            gelu_erf  (BERT)    y = z * Phi(z),  Phi(z) = (1 + erf(z / sqrt 2)) / 2
                                dy/dz = Phi(z) + z * exp(-z^2 / 2) / sqrt(2 pi)
            gelu_tanh (GPT-2)   y = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
            dbias = sum_T dx

Traffic     T rows, F columns, e bytes: forward 2*T*F*e, backward 3*T*F*e.
Source      Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import math

import torch
from torch import Tensor

KINDS = ("gelu_erf", "gelu_tanh")


def bias_gelu_ref(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The definition, in the dtype of `x`.

    Args:
        x: (T, F) float.
        bias: (F,), of the matmul that made `x`.
        kind: "gelu_erf" or "gelu_tanh".

    Returns:
        (T, F).
    """
    z = x if bias is None else x + bias
    if kind == "gelu_erf":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def check_bias_gelu(x: Tensor, bias: Tensor | None, kind: str) -> None:
    """Raises ValueError on an unknown kind or a bias of another width."""
    if kind not in KINDS:
        raise ValueError(f"expected kind {' or '.join(KINDS)}, got {kind!r}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"expected bias ({x.shape[-1]},), got {tuple(bias.shape)}")
