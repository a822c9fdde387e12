"""What BERT and GPT share. Parameters are fp32 masters; each matmul casts its own to the dtype of
its input, the one cast a step. Biases go where the fused operations want them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import Norm

# Torch's own Linear, Embedding and LayerNorm draw random weights from the global generator when
# they are made. These hold storage and nothing else: a file or `init_weights` fills it.


class Linear(nn.Module):
    """weight (n_out, n_in) and bias (n_out,)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))


class Embedding(nn.Module):
    """weight (rows, dim)."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))


class LayerNorm(nn.Module):
    """weight and bias (dim,)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps


def linear(x: Tensor, layer: Linear) -> Tensor:
    """x W^T + b in the dtype of `x`."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def matmul(x: Tensor, layer: Linear) -> Tensor:
    """x W^T: the operation that follows adds the bias."""
    return F.linear(x, layer.weight.to(x.dtype))


def norm(layer: LayerNorm) -> Norm:
    """The parameters of a LayerNorm, as the operations take them."""
    return Norm(layer.weight, layer.bias, layer.eps)


class Attention(nn.Module):
    """The two projections around attention."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.norm = LayerNorm(dim, eps)


class MLP(nn.Module):
    """The two projections around the activation."""

    def __init__(self, dim: int, ffn_dim: int, eps: float):
        super().__init__()
        self.up = Linear(dim, ffn_dim)
        self.down = Linear(ffn_dim, dim)
        self.norm = LayerNorm(dim, eps)


@torch.no_grad()
def init_weights(module: nn.Module, std: float, seed: int) -> None:
    """Random weights as BERT's: normal(0, std) matrices, zero biases, unit norms.

    A function of `seed`: torch's global generator is neither read nor moved.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, Linear | Embedding):
            layer.weight.normal_(0, std, generator=generator)
        if isinstance(layer, LayerNorm):
            layer.weight.fill_(1)
        if isinstance(layer, Linear | LayerNorm):
            layer.bias.zero_()
