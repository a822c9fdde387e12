"""What BERT and GPT share. Parameters are fp32 masters; each matmul casts its own to the dtype of
its input, the one cast a step. Biases go where the fused operations want them."""

from collections.abc import Iterator
from contextlib import contextmanager

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


class Projection(Linear):
    """A Linear whose bias is added by the operation that follows the product, in fp32."""


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


def matmul(x: Tensor, layer: Projection) -> Tensor:
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
        self.out = Projection(dim, dim)
        self.norm = LayerNorm(dim, eps)


class MLP(nn.Module):
    """The two projections around the activation."""

    def __init__(self, dim: int, ffn_dim: int, eps: float):
        super().__init__()
        self.up = Projection(dim, ffn_dim)
        self.down = Projection(ffn_dim, dim)
        self.norm = LayerNorm(dim, eps)


class Shadows:
    """What products multiply with, in their dtype: cast once, then kept up to date by an optimizer
    that steps the fp32 masters and rounds them in the same pass. A step differentiates these
    leaves, so its gradients are of their dtype too, and no cast stands between two products.

        leaves     name -> 16-bit weight
        masters    name -> the model's own parameter

    A parameter that several layers share has one leaf; one that an embedding holds too has none.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model = model
        places: dict[Tensor, list[tuple[nn.Module, str]]] = {}  # of each parameter
        for layer in model.modules():
            for part, p in layer.named_parameters(recurse=False):
                places.setdefault(p, []).append((layer, part))
        self.masters = {
            name: p
            for name, p in model.named_parameters()
            if all(_is_cast(*place) for place in places[p])
        }
        self.leaves = {
            name: p.detach().to(dtype).requires_grad_(p.requires_grad)
            for name, p in self.masters.items()
        }
        self._swaps = [
            (layer._parameters, part, self.leaves[name], p)
            for name, p in self.masters.items()
            for layer, part in places[p]
        ]
        self._versions = self._current()

    def _current(self):
        return [p._version for p in self.masters.values()]

    def refresh(self) -> None:
        """Casts again if somebody other than the optimizer, whose kernel leaves versions alone, has
        written to a master. What is written to `p.data` has no version and is not seen."""
        versions = self._current()
        if versions != self._versions:
            with torch.no_grad():
                torch._foreach_copy_(list(self.leaves.values()), list(self.masters.values()))
            self._versions = versions

    @contextmanager
    def standing(self) -> Iterator[None]:
        """The leaves stand in the model in this block: for the forward pass, and for a backward
        pass that computes blocks again."""
        # torch.func.functional_call takes 1.5 ms for a BERT of 12 layers, to look up every name
        # and look for ties; this takes 0.03 ms.
        for parameters, part, leaf, _ in self._swaps:
            parameters[part] = leaf
        try:
            yield
        finally:
            for parameters, part, _, master in self._swaps:
                parameters[part] = master


def _is_cast(layer: nn.Module, part: str) -> bool:
    """Whether a product casts it; fused operations want fp32."""
    return isinstance(layer, Linear) and (part == "weight" or not isinstance(layer, Projection))


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
