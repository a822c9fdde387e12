"""What BERT and GPT share. Parameters are fp32 masters; each matmul casts its own to the dtype of
its input, the one cast a step. Biases go where the fused operations want them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batch import Batch, VirtualTokens
from .config import ModelConfig
from .ops import Draw, Dropout, Layout, Norm, Ops, Virtual, key_of

# Torch's own Linear, Embedding and LayerNorm draw random weights from the global generator when
# they are made. These hold storage and nothing else: a file or `init_weights` fills it.


class Linear(nn.Module):
    """weight (n_out, n_in) and, if it has one, bias (n_out,)."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.lora: nn.Module | None = None  # see `minift.adapters.LoRA`


class Projection(Linear):
    """A Linear whose bias is added by the operation that follows the product, in fp32."""

    gain = 1.0  # on the deviation of random weights


class Embedding(nn.Module):
    """weight (rows + padding, dim); the rows of the padding stand for nothing and are 0."""

    def __init__(self, rows: int, dim: int, padding: int = 0):
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(rows + padding, dim))


class LayerNorm(nn.Module):
    """weight and bias (dim,)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps


def linear(
    x: Tensor,
    layer: Linear,
    ops: Ops | None = None,
    dropout: Dropout | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """x W^T + b in the dtype of `x`, and what its LoRA adds, if it has one.

    Args:
        ops, dropout: for a LoRA that drops: the table, and the step's dropout.
        rows: (N,) which rows of the batch those of `x` are; None: all.
    """
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return _product(x, layer, bias, ops, dropout, rows)


def matmul(
    x: Tensor,
    layer: Projection,
    ops: Ops | None = None,
    dropout: Dropout | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """x W^T: the operation that follows adds the bias. See `linear`."""
    return _product(x, layer, None, ops, dropout, rows)


def _product(x, layer, bias, *drops):
    weight = layer.weight.to(x.dtype)
    return F.linear(x, weight, bias) if layer.lora is None else layer.lora(x, weight, bias, *drops)


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


class Projected(NamedTuple):
    """Logits x W^T + bias that are not multiplied out: the loss does that, a piece at a time."""

    x: Tensor  # (N, C)
    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    vocab: int  # rows of the weight that are tokens, from the first

    def logits(self) -> Tensor:
        """(N, vocab) in the dtype of `x`."""
        weight, bias = self.weight[: self.vocab].to(self.x.dtype), self.bias
        return F.linear(self.x, weight, None if bias is None else bias.to(self.x.dtype))


class Past(NamedTuple):
    """What a layer sees before its first row."""

    prefix: Tensor  # (P, 2H, D)
    virtual: Virtual


class Body(nn.Module):
    """Tokens to hidden states: what a head stands on."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.prompt: nn.Module | None = None  # see `minift.adapters.Prompt`
        self.prefix: nn.Module | None = None  # see `minift.adapters.Prefix`
        # Places of dropouts: the embeddings', three a block, a head's two; and their columns.
        self.sites, self.columns = 3 + 3 * config.n_layer, config.dim

    @property
    def virtual(self) -> VirtualTokens | None:
        """What stands before every sequence."""
        if self.prompt is not None:
            return VirtualTokens(self.prompt.count, False)
        return self.prefix and VirtualTokens(self.prefix.count, True)

    @property
    def room(self) -> int:
        """Tokens of the longest text."""
        return self.config.max_len - (self.virtual.count if self.virtual else 0)

    def seen(self, batch: Batch) -> Batch:
        """The batch as layers see it: a prompt's rows are among the others, which have moved.
        Tokens, positions and types stay those of the texts."""
        where, virtual = batch.virtual, self.virtual
        if virtual is None or virtual.keys_only or batch.continues:
            return batch
        if where is not None and where.layout is batch.layout:
            return batch
        where = where or Virtual.pack(batch.layout, *virtual).to(batch.tokens.device)
        at = where.place if batch.at is None else where.place.index_select(0, batch.at)
        key = key_of(batch.key, where, batch.layout)
        return replace(batch, layout=where.layout, key=key, at=at, virtual=where)

    def shift(self, batch: Batch) -> int:
        """Positions before the first token's."""
        return self.virtual.count if self.virtual and not batch.continues else 0

    def past(self, batch: Batch, dtype: torch.dtype) -> list[Past | None]:
        """Of each layer."""
        if self.prefix is None or batch.continues:
            return [None] * self.config.n_layer
        where = batch.virtual or Virtual.pack(batch.layout, *self.virtual).to(batch.tokens.device)
        return [Past(keys, where) for keys in self.prefix(dtype)]

    def draw(self, draw: Draw | None, batch: Batch, ops: Ops) -> Dropout | None:
        """The dropout of a step, for a batch as layers see it."""
        if draw is None:
            return None
        columns = max(self.columns, batch.layout.longest + self.shift(batch))
        return ops.draw_dropout(draw, batch.key, columns, self.sites, self.config.n_head)


def body_of(model: nn.Module) -> Body:
    """What a model's head stands on, or the model if it is that."""
    return next(part for part in model.modules() if isinstance(part, Body))


def attend(
    ops: Ops,
    qkv: Tensor,
    layout: Layout,
    past: Past | None,
    n_head: int,
    causal: bool,
    dropout: Dropout | None,
    rows: Tensor | None = None,
) -> Tensor:
    """(T, 3H, D) -> (T, H, D): attention to the sequence, and to what is before it. With `rows`,
    which nothing causal has, (N, H, D) of those."""
    if past is not None:
        prefix, virtual = past
        out = ops.attention_prefix(qkv, prefix, layout, n_head, causal, dropout, virtual)
        return out if rows is None else out.index_select(0, rows)
    if rows is None:
        return ops.attention(qkv, layout, n_head, causal=causal, dropout=dropout)
    return ops.attention_at(qkv, layout, n_head, rows, dropout)


def run_block(block: nn.Module, checkpointing: bool, *given) -> tuple[Tensor, Tensor]:
    """block(*given). `checkpointing` keeps what is given alone, and backward computes the block
    again: no random state is needed for that, dropout is keyed."""
    if checkpointing:
        return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
    return block(*given)


def token_dropout(config: ModelConfig) -> float:
    """Before a head that labels tokens. As transformers has it: of DistilBERT and GPT-2 as in their
    layers; none before a head that finds spans."""
    if not config.labels:
        return 0.0
    own = config.kind.decoder or config.family == "distilbert"
    return config.hidden_dropout if own else config.classifier_dropout


class Shadows:
    """What products multiply with, in their dtype: cast once, then kept up to date by an optimizer
    that steps the fp32 masters and rounds them in the same pass. A step differentiates these
    leaves, so its gradients are of their dtype too, and no cast stands between two products.

        leaves     name -> 16-bit weight
        masters    name -> the model's own parameter

    A parameter that several layers share has one leaf; one that an embedding holds too has none.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, frozen: bool = False):
        """
        Args:
            dtype: of the leaves.
            frozen: only parameters that are not trained have leaves: those are cast once.
        """
        self.model = model
        places: dict[Tensor, list[tuple[nn.Module, str]]] = {}  # of each parameter
        for layer in model.modules():
            for part, p in layer.named_parameters(recurse=False):
                places.setdefault(p, []).append((layer, part))
        self.masters = {
            name: p
            for name, p in model.named_parameters()
            if all(_is_cast(*place) for place in places[p]) and not (frozen and p.requires_grad)
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
    """Random weights as BERT's and GPT-2's: normal(0, std) matrices, zero biases, unit norms.

    A function of `seed`: torch's global generator is neither read nor moved.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, Linear | Embedding):
            gain = layer.gain if isinstance(layer, Projection) else 1.0
            layer.weight.normal_(0, std * gain, generator=generator)
        if isinstance(layer, Embedding):
            layer.weight[layer.rows :].zero_()
        if isinstance(layer, LayerNorm):
            layer.weight.fill_(1)
        if isinstance(layer, Linear | LayerNorm) and layer.bias is not None:
            layer.bias.zero_()
