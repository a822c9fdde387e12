"""Weights as products without a backward pass want them: cast once, and on a CPU laid out once.

A step of decoding reads every weight for a row or a few, and on a CPU most of its time goes there.
oneDNN and MKL lay a plain weight out anew in every product, as much work as a product of so few
rows. Measured on a Xeon with AMX, for GPT-2 small's products, against plain weights: bf16 takes
0.65 to 0.8 of the time with 1 to 16 rows, fp32 0.75 with 16. In fp32 a single row is best served by
weights that lie transposed: 0.8 of the time. Prompts have more rows, and take plain weights.

Evaluation multiplies thousands of rows with a weight. There the layout alone spares little, but a
laid out weight adds its bias while it multiplies: see `RowWeights`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Shadows

FEW = 4  # rows from which on a weight in fp32 is laid out for each call
MANY = 4096  # of a batch that is evaluated; fewer are multiplied as fast with this layout


class Packed:
    """A weight (n_out, n_in) in oneDNN's layout; to F.linear it is a weight like any other. One
    that has a bias adds it, where F.linear is given none."""

    def __init__(self, weight: Tensor, rows: int, bias: Tensor | None = None):
        self._weight, self._bias = torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias

    def to(self, dtype: torch.dtype) -> "Packed":
        return self  # it is cast already

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Tensor:
        if function is not F.linear:
            return NotImplemented
        x, weight, bias = (*args, None)[:3]
        bias = weight._bias if bias is None else bias
        return torch.ops.mkldnn._linear_pointwise(x, weight._weight, bias, "none", [], "")


class StepWeights(Shadows):
    """A model's weights for steps, as they are now: who trains on makes them anew.

    standing    in the model, for a step
    table       (V, C) of the last product
    """

    def __init__(self, model: nn.Module, table: nn.Parameter, dtype: torch.dtype, rows: int):
        """
        Args:
            model: whose parameters stay as they are.
            table: the one that its last product multiplies with, where an embedding holds it too.
            dtype: of activations and products.
            rows: of a step, as a rule.
        """
        super().__init__(model, dtype)
        self.dtype, self.table = dtype, lay_out(table.detach().to(dtype), rows)
        self._laid_out = [
            (parameters, part, lay_out(leaf, rows) if leaf.ndim == 2 else leaf, master)
            for parameters, part, leaf, master in self._swaps
        ]

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The laid out weights stand in the model in this block."""
        plain, self._swaps = self._swaps, self._laid_out
        try:
            with self.standing():
                yield
        finally:
            self._swaps = plain


class RowWeights(Shadows):
    """A model's weights for batches of many rows, as they are now. On a CPU each is laid out and
    adds the bias of its layer, which then has none: no operation makes a pass over memory for it,
    and in bf16 it is added before the product is rounded, not after."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model, dtype)
        if next(model.parameters()).device.type == "cpu" and can_pack(dtype):
            self._swaps = [*self._packed(dtype)]

    def _packed(self, dtype):
        packed = [parameters for parameters, part, *_ in self._swaps if part == "weight"]
        for parameters, part, leaf, master in self._swaps:
            if part == "weight":
                bias = parameters.get("bias")
                own = None if bias is None else bias.detach().to(dtype)
                yield parameters, part, Packed(leaf.detach(), MANY, own), master
                if bias is not None:
                    yield parameters, "bias", None, bias
            elif not any(parameters is other for other in packed):
                yield parameters, part, leaf, master


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In this block the model's products find their weights in `dtype`, laid out for them, and
    nothing is kept for a backward pass."""
    with torch.inference_mode(), RowWeights(model, dtype).standing():
        yield


def lay_out(weight: Tensor, rows: int) -> Tensor | Packed:
    """The weight, for products of so many rows; as it is, where no layout is better."""
    if weight.device.type != "cpu":
        return weight
    if weight.dtype == torch.float32 and rows == 1:
        return weight.detach().T.contiguous().T
    return Packed(weight.detach(), rows) if can_pack(weight.dtype) else weight


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and has products of this dtype."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())
