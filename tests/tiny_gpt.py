"""A GPT of a few lines over the operations of a table: what pre-norm blocks ask of them.

Radford et al. 2019: every block norms its input, and the sum goes on beside it. T packed tokens, C
wide, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.batch import Batch
from minift.layers import MLP, Attention, Embedding, LayerNorm, Linear, linear, matmul, norm
from minift.ops import Draw, Ops


@dataclass(frozen=True)
class Sizes:
    vocab: int
    positions: int
    dim: int
    n_layer: int
    n_head: int
    p: float = 0.1  # of every dropout
    labels: int = 2


class TinyGPT(nn.Module):
    """Logits of each sequence from its last token."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        C = sizes.dim
        self.sizes = sizes
        self.word, self.position = Embedding(sizes.vocab, C), Embedding(sizes.positions, C)
        self.attention = nn.ModuleList(Attention(C, 1e-5) for _ in range(sizes.n_layer))
        self.mlp = nn.ModuleList(MLP(C, 4 * C, 1e-5) for _ in range(sizes.n_layer))
        self.norm = LayerNorm(C, 1e-5)
        self.head = Linear(C, sizes.labels)

    def forward(
        self, batch: Batch, ops: Ops, dtype: torch.dtype, draw: Draw | None, _: bool = False
    ) -> Tensor:
        s, layout = self.sizes, batch.layout
        columns = max(s.dim, layout.longest)
        drop = draw and ops.draw_dropout(draw, batch.key, columns, 1 + 3 * s.n_layer, s.n_head)

        def at(site):
            return drop and drop.at(site, s.p)

        tables = self.word.weight, self.position.weight
        ids, order = (batch.tokens, batch.positions), batch.order and batch.order.pick(0, 1)
        x = ops.embed(ids, tables, None, dtype, at(0), order)
        h, x = ops.add_norm(x, None, norm(self.attention[0].norm))
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            site = 1 + 3 * i
            qkv = linear(h, attention.qkv).view(len(h), 3 * s.n_head, -1)
            o = ops.attention(qkv, layout, s.n_head, causal=True, dropout=at(site)).flatten(1)
            o, bias = matmul(o, attention.out), attention.out.bias
            h, x = ops.add_norm(o, x, norm(mlp.norm), bias, at(site + 1))
            h = ops.bias_gelu(matmul(h, mlp.up), mlp.up.bias, "gelu_tanh")
            last = i + 1 == s.n_layer
            following = self.norm if last else self.attention[i + 1].norm
            h, x = ops.add_norm(
                matmul(h, mlp.down), x, norm(following), mlp.down.bias, at(site + 2)
            )
        return linear(h.index_select(0, layout.last), self.head)
