"""BERT over packed sequences: an encoder of post-norm blocks, a classifier on its first token, and
the head that fills in masked words.

RoBERTa and DistilBERT are the same model with other settings: see families.py. Devlin et al. 2018,
arXiv:1810.04805. T packed tokens, C wide, H heads of D, B sequences.
"""

import torch
from torch import Tensor, nn

from .batch import Batch, check_length
from .config import ModelConfig
from .layers import (
    MLP,
    Attention,
    Body,
    Embedding,
    LayerNorm,
    Linear,
    Past,
    Projected,
    Projection,
    attend,
    linear,
    matmul,
    norm,
    run_block,
    token_dropout,
)
from .ops import Draw, Dropout, Layout, Ops, ops_for, put_virtual

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}  # between the head's two layers


class Embeddings(nn.Module):
    """A row of each table, summed and normed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word = Embedding(config.vocab_size, config.dim)
        self.position = Embedding(config.position_offset + config.max_len, config.dim)
        self.token_type = Embedding(config.n_types, config.dim) if config.n_types else None
        self.norm = LayerNorm(config.dim, config.norm_eps)


class Block(nn.Module):
    """Attention, then MLP; each is added to the residual stream, which is then normed."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config = config
        self.site = 1 + 3 * index  # of its first dropout; 0 is the embeddings'
        self.attention = Attention(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.ffn_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,  # (T, C)
        residual: Tensor,  # (T, C): x once more, so that two gradients are added where both go
        layout: Layout,
        ops: Ops,
        dropout: Dropout | None,
        rows: Tensor | None,  # (N,): only these are needed after attention
        past: Past | None,
    ) -> tuple[Tensor, Tensor]:
        H, p, site = self.config.n_head, self.config.hidden_dropout, self.site
        drop = dropout and dropout.at(site, self.config.attention_dropout)
        qkv = linear(x, self.attention.qkv, ops, dropout).unflatten(1, (3 * H, -1))  # (T, 3H, D)
        o = attend(ops, qkv, layout, past, H, False, drop, rows).flatten(1)  # (T, C), or (N, C)
        residual = residual if rows is None else residual.index_select(0, rows)
        drop = dropout and dropout.at(site + 1, p, rows)
        o = matmul(o, self.attention.out, ops, dropout, rows)
        bias = self.attention.out.bias
        x, residual = ops.add_norm(o, residual, norm(self.attention.norm), bias, drop, post=True)
        h = matmul(x, self.mlp.up, ops, dropout, rows)
        h = ops.bias_gelu(h, self.mlp.up.bias, self.config.activation)  # (T, F)
        drop = dropout and dropout.at(site + 2, p, rows)
        h, bias = matmul(h, self.mlp.down, ops, dropout, rows), self.mlp.down.bias
        return ops.add_norm(h, residual, norm(self.mlp.norm), bias, drop, post=True)


class Bert(Body):
    """Tokens to hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))

    def embed(self, batch: Batch, ops: Ops, dtype: torch.dtype, drop: Dropout | None) -> Tensor:
        """(T, C) the input of the first block, of a batch as layers see it."""
        e, types = self.embeddings, self.config.n_types
        offset = self.config.position_offset + self.shift(batch)
        ids, tables = [batch.tokens, batch.positions], [e.word.weight, e.position.weight]
        lines = [0, 1]  # of batch.order
        if offset:
            ids[1] = ids[1] + offset
        if types:  # a model of one type knows no second text
            ids.append(batch.types if types > 1 else torch.zeros_like(batch.types))
            tables.append(e.token_type.weight)
            lines.append(2 if types > 1 else 3)
        order, own = batch.order and batch.order.pick(*lines), drop if self.prompt is None else None
        x = ops.embed(tuple(ids), tuple(tables), norm(e.norm), dtype, own, order)
        if self.prompt is None:
            return x
        return ops.drop(put_virtual(x, self.prompted(ops).to(dtype), batch.virtual), drop)

    def prompted(self, ops: Ops) -> Tensor:
        """(P, C) the prompt as the input of the first block: it has positions, and the type 0."""
        e, first = self.embeddings, self.config.position_offset
        s = self.prompt() + e.position.weight[first : first + self.prompt.count]
        s = s if e.token_type is None else s + e.token_type.weight[0]
        return ops.add_norm(s, None, norm(e.norm))[0]

    def forward(
        self,
        batch: Batch,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        dropout: Dropout | None = None,
        rows: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Hidden states of the last layer.

        Args:
            batch: T packed tokens on the model's device.
            ops: table of operations; default, the one for the device.
            dtype: of activations and products.
            dropout: this step's, from `draw`; None drops nothing.
            rows: (N,) int64 rows that are wanted: the last layer computes no others.
            checkpointing: keep the input of each layer alone, which backward computes again.

        Returns:
            (T, C), or (N, C) when `rows` is given.

        Raises:
            ValueError: a sequence is longer than the position table.
        """
        config, batch = self.config, self.seen(batch)
        check_length(batch.layout, self.room if self.prefix else config.max_len)
        ops, past = ops or ops_for(batch.tokens.device), self.past(batch, dtype)
        x = self.embed(batch, ops, dtype, dropout and dropout.at(0, config.embedding_dropout))
        residual = x
        for i, block in enumerate(self.layers):
            wanted = rows if i == config.n_layer - 1 else None
            given = x, residual, batch.layout, ops, dropout, wanted, past[i]
            x, residual = run_block(block, checkpointing, *given)
        return x


class BertClassifier(nn.Module):
    """Logits of each sequence from its first token: a dense layer, its activation, dropout, head.

    The dense layer is called pooler in all families; only BERT's is pretrained.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.pooler = Linear(config.dim, config.dim)
        self.head = Linear(config.dim, len(config.labels))

    @property
    def head_groups(self) -> tuple[str, ...]:
        """The groups of parameters that belong to the task."""
        return self.config.kind.head_groups

    def forward(
        self,
        batch: Batch,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        draw: Draw | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Logits (B, number of labels) in `dtype`.

        Args:
            batch, ops, dtype, checkpointing: as `Bert.forward`'s.
            draw: seed and step of the dropout, to train; None drops nothing.
        """
        kind, p, site = (
            self.config.kind,
            self.config.classifier_dropout,
            1 + 3 * self.config.n_layer,
        )
        batch, ops = self.bert.seen(batch), ops or ops_for(batch.tokens.device)
        first = batch.layout.first  # of a prompt, its first
        dropout = self.bert.draw(draw, batch, ops)
        x = self.bert(batch, ops, dtype, dropout, first, checkpointing)  # (B, C)
        if kind.drop_first:
            x = ops.drop(x, dropout and dropout.at(site + 1, p, first))
        x = ACTIVATIONS[kind.activation](linear(x, self.pooler))
        x = ops.drop(x, dropout and dropout.at(site, p, first))
        return linear(x, self.head)  # (B, labels)


class BertTokens(nn.Module):
    """Scores of tokens: of each label, or of being the first and the last of a span."""

    head_groups = ("head",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.head = Linear(config.dim, len(config.labels) or 2)

    def forward(
        self,
        batch: Batch,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        draw: Draw | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Logits (N, labels) of the rows `batch.at`, or (T, labels) of all; arguments as
        `BertClassifier`'s."""
        ops, site = ops or ops_for(batch.tokens.device), 1 + 3 * self.config.n_layer
        batch = self.bert.seen(batch)
        dropout = self.bert.draw(draw, batch, ops)
        x = self.bert(batch, ops, dtype, dropout, batch.at, checkpointing)
        x = ops.drop(x, dropout and dropout.at(site, token_dropout(self.config), batch.at))
        return linear(x, self.head)


class MaskedHead(nn.Module):
    """A dense layer, its activation and a norm; the projection is the word table's, with a bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = Projection(config.dim, config.dim)
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class BertMasked(nn.Module):
    """The words that stood at some rows, as logits over the vocabulary."""

    head_groups = ("head",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.head = MaskedHead(config)

    def forward(
        self,
        batch: Batch,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        draw: Draw | None = None,
        checkpointing: bool = False,
    ) -> Projected:
        """Logits of the rows `batch.at`, not multiplied out; arguments as `BertClassifier`'s."""
        config, head, ops = self.config, self.head, ops or ops_for(batch.tokens.device)
        batch = self.bert.seen(batch)
        dropout = self.bert.draw(draw, batch, ops)
        x = self.bert(batch, ops, dtype, dropout, batch.at, checkpointing)  # (N, C)
        kind = config.kind.lm_head.activation or config.activation
        h = ops.bias_gelu(matmul(x, head.dense), head.dense.bias, kind)
        h, _ = ops.add_norm(h, None, norm(head.norm))
        return Projected(h, self.bert.embeddings.word.weight, head.bias, config.vocab_size)
