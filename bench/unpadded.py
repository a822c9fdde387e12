"""BERT in plain torch over packed sequences: what one can have without kernels of one's own.

The weights are those of minift's model; everything computed with them is torch's. Attention is the
flash kernel that torch ships for packed sequences: with dropout through its aten operator, or
through `torch.nn.attention.varlen`, which has none. On a CPU, where neither runs, it is one
scaled_dot_product_attention for each sequence.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift import Example
from minift.bert import BertClassifier

# q, k, v (T, H, D) each, Packed, probability of dropout -> (T, H, D)
Attention = Callable[[Tensor, Tensor, Tensor, "Packed", float], Tensor]


class Packed(NamedTuple):
    """B texts on T rows; rows beyond them are a text more, whose answer nobody asks for."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    types: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int32, or (B + 2,) with rows beyond
    first: Tensor  # (B,) int64
    targets: Tensor  # (B,) int64
    longest: int  # no sequence is longer

    def tensors(self) -> dict[str, Tensor]:
        """All but `longest`, by name."""
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}


def pack(examples: list[Example], longest: int, multiple: int = 1) -> Packed:
    """Texts end to end.

    Args:
        examples: the texts.
        longest: of the workload; the flash kernel's grid depends on it.
        multiple: T is one of this, for shapes that repeat; above 1 there are rows beyond, always.
    """
    sizes = [len(example.tokens) for example in examples]
    slack = multiple - sum(sizes) % multiple if multiple > 1 else 0

    def column(parts):
        return torch.tensor([x for part in parts for x in part] + [0] * slack)

    ends = torch.tensor([0, *sizes, *([slack] if slack else [])]).cumsum(0)
    return Packed(
        tokens=column(example.tokens for example in examples),
        positions=column(range(size) for size in sizes),
        types=column(example.types for example in examples),
        cu_seqlens=ends.int(),
        first=ends[: len(sizes)].clone(),
        targets=torch.tensor([example.target for example in examples]),
        longest=max(longest, slack),
    )


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """In memory that a GPU reads by itself."""
    return x.pin_memory() if device.type == "cuda" else x


def flash(q: Tensor, k: Tensor, v: Tensor, batch: Packed, p: float) -> Tensor:
    """Torch's flash kernel, with dropout: not public, but what its own nested tensors call."""
    ends, longest = batch.cu_seqlens, batch.longest
    return torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, p, False, False
    )[0]


def varlen(q: Tensor, k: Tensor, v: Tensor, batch: Packed, p: float) -> Tensor:
    """The public function, which has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = batch.cu_seqlens, batch.longest
    return varlen_attn(q, k, v, ends, ends, longest, longest)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, batch: Packed, p: float) -> Tensor:
    """A product for each sequence; for a CPU."""
    sizes = batch.cu_seqlens.diff().tolist()
    parts = [x.transpose(0, 1).split(sizes, dim=1) for x in (q, k, v)]  # (H, L, D) each
    found = [
        F.scaled_dot_product_attention(*(x[None] for x in part), dropout_p=p)[0]
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=1).transpose(0, 1)


class Unpadded(nn.Module):
    """The loss of a batch, () in fp32."""

    def __init__(self, model: BertClassifier, attention: Attention):
        super().__init__()
        self.model, self.attend = model, attention

    def forward(self, batch: Packed) -> Tensor:
        config, e = self.model.config, self.model.bert.embeddings
        p, eps, C = config.hidden_dropout, config.norm_eps, config.dim

        def drop(x, probability=p):
            return F.dropout(x, probability) if probability else x

        def norm(x, layer):
            return F.layer_norm(x, (C,), layer.weight, layer.bias, eps)

        x = F.embedding(batch.tokens, e.word.weight)
        x = x + F.embedding(batch.positions, e.position.weight)
        x = drop(norm(x + F.embedding(batch.types, e.token_type.weight), e.norm))
        for block in self.model.bert.layers:
            attention, mlp = block.attention, block.mlp
            qkv = F.linear(x, attention.qkv.weight, attention.qkv.bias)
            q, k, v = qkv.view(len(x), 3, config.n_head, -1).unbind(1)  # (T, H, D) each
            o = self.attend(q, k, v, batch, config.attention_dropout).reshape(len(x), C)
            o = F.linear(o, attention.out.weight, attention.out.bias)
            x = norm(x + drop(o), attention.norm)
            h = F.gelu(F.linear(x, mlp.up.weight, mlp.up.bias))
            x = norm(x + drop(F.linear(h, mlp.down.weight, mlp.down.bias)), mlp.norm)
        first, pooler, head = x.index_select(0, batch.first), self.model.pooler, self.model.head
        pooled = torch.tanh(F.linear(first, pooler.weight, pooler.bias))
        logits = F.linear(drop(pooled, config.classifier_dropout), head.weight, head.bias)
        return F.cross_entropy(logits.float(), batch.targets)


class Masters:
    """AdamW on fp32 copies of 16-bit weights: casts of all weights and gradients at once, where
    autocast casts each by itself. Weights in fp32 are their own copies.

    Args:
        model: in fp32; cast in place.
        dtype: to train in.
        config: its peak rate, decay and clipping.
        capturable: rates in tensors, for a CUDA graph.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, config, capturable: bool = False):
        self.max_norm, self.half = config.max_grad_norm, dtype != torch.float32
        self.leaves = list(model.parameters())
        self.masters = [p.detach().clone() for p in self.leaves] if self.half else self.leaves
        model.to(dtype)
        self.leaves = list(model.parameters())
        for master in self.masters if self.half else ():
            master.requires_grad_()
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [p for p in self.masters if (p.ndim > 1) == decayed],
             "weight_decay": config.weight_decay * decayed}
            for decayed in (True, False)
        ]  # fmt: skip
        rate = config.learning_rate
        if capturable:
            rate = torch.tensor(rate, device=self.masters[0].device)
        self.optimizer = torch.optim.AdamW(groups, lr=rate, fused=True, capturable=capturable)

    def set_rate(self, rate: float) -> None:
        """Of the step that follows."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    @torch.no_grad()
    def step(self) -> None:
        """Clips and updates; the leaves' gradients stay."""
        if self.half:
            torch._foreach_copy_([p.grad for p in self.masters], [p.grad for p in self.leaves])
        torch.nn.utils.clip_grad_norm_(self.masters, self.max_norm, foreach=True)
        self.optimizer.step()
        if self.half:
            torch._foreach_copy_(self.leaves, self.masters)

    def zero_grad(self) -> None:
        """The leaves' gradients are forgotten."""
        for p in self.leaves:
            p.grad = None
