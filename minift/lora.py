"""LoRA: what a frozen product adds up to with two thin ones, W x + s B A x.

Hu et al. 2021, arXiv:2106.09685: A (r, n_in) is random, B (n_out, r) starts at 0, s = alpha / r.
A projection that is several side by side (queries, keys and values) has an A and a B for each of
those that are adapted; all A are one product, and each B adds to its own columns in place.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layers import Linear
from .ops import Dropout, Ops


class Part(NamedTuple):
    """The columns of a projection's result that an A and a B add to."""

    begin: int
    end: int


class LoRA(nn.Module):
    """Stands in a Linear as its `lora`.

    a       (parts * r, n_in)
    b       (width of the part, r) for each part
    """

    def __init__(self, n_in: int, parts: Sequence[Part], r: int, scale: float):
        """
        Args:
            n_in: columns of the weight.
            parts: from the first.
            r: rank, of each.
            scale: s.
        """
        super().__init__()
        self.parts, self.r, self.scale = tuple(parts), r, scale
        self.a = Linear(n_in, len(parts) * r, bias=False)
        self.b = nn.ModuleList(Linear(r, part.end - part.begin, bias=False) for part in parts)
        self.p, self.site = 0.0, 0  # dropout of its input

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """A uniform within 1 / sqrt(n_in), B 0: nothing is added yet."""
        bound = 1 / math.sqrt(self.a.weight.shape[1])
        self.a.weight.uniform_(-bound, bound, generator=generator)
        for b in self.b:
            b.weight.zero_()

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ops: Ops | None,
        dropout: Dropout | None,
        rows: Tensor | None,
    ) -> Tensor:
        """(T, n_in) -> (T, n_out): the whole product.

        Args:
            weight, bias: of the Linear, in the dtype of `x`.
            ops, dropout, rows: see `minift.layers.linear`.
        """
        a, bs = self.a.weight.to(x.dtype), [b.weight.to(x.dtype) for b in self.b]
        drop = dropout and dropout.at(self.site, self.p, rows)
        dropped = None if drop is None else ops.drop(x, drop)
        if torch.is_grad_enabled():
            return _LowRank.apply(x, dropped, weight, bias, a, self, *bs)
        y = F.linear(x, weight, bias)
        each = F.linear(x if dropped is None else dropped, a).split(self.r, 1)
        for (begin, end), t, b in zip(self.parts, each, bs, strict=True):
            y[:, begin:end].add_(F.linear(t, b), alpha=self.scale)
        return y

    @torch.no_grad()
    def delta(self) -> Tensor:
        """(n_out, n_in) float64: what it adds to the weight; parts that are not adapted have 0."""
        n_in, n_out = self.a.weight.shape[1], self.parts[-1].end
        whole = torch.zeros(n_out, n_in, dtype=torch.float64, device=self.a.weight.device)
        for (begin, end), a, b in zip(self.parts, self.a.weight.split(self.r), self.b, strict=True):
            whole[begin:end] = self.scale * (b.weight.double() @ a.double())
        return whole


class _LowRank(torch.autograd.Function):
    """By hand, because autograd would write what B makes and add it in a pass of its own, and so
    the gradient of x: here both are added by the products."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, lora: LoRA, *bs) -> Tensor:
        read = x if dropped is None else dropped
        y, t = F.linear(x, weight, bias), F.linear(read, a)
        for (begin, end), t_i, b in zip(lora.parts, t.split(lora.r, 1), bs, strict=True):
            y[:, begin:end].addmm_(t_i, b.T, alpha=lora.scale)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, read, weight, a, t, *bs)
        ctx.lora, ctx.drops = lora, dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, read, weight, a, t, *bs = ctx.saved_tensors
        lora, needs = ctx.lora, ctx.needs_input_grad
        dt, dbs = torch.empty_like(t), []
        each = dt.split(lora.r, 1), t.split(lora.r, 1), bs, needs[6:]
        for (begin, end), dt_i, t_i, b, learns in zip(lora.parts, *each, strict=True):
            part = dy[:, begin:end]
            dt_i.copy_(part @ b).mul_(lora.scale)
            dbs.append((part.T @ t_i).mul_(lora.scale) if learns else None)
        da = dt.T @ read if needs[4] else None
        dx = dy @ weight if needs[0] else None
        ddropped = dt @ a if ctx.drops and needs[1] else None
        if needs[0] and not ctx.drops:
            dx.addmm_(dt, a)
        dweight = dy.T @ x if needs[2] else None
        dbias = dy.sum(0) if needs[3] else None
        return dx, ddropped, dweight, dbias, da, None, *dbs
