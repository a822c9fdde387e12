"""GPT-2 over packed sequences: a decoder of pre-norm blocks that predicts the next token from the
tokens before it, and a classifier on the last one.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". T packed tokens, C wide,
H heads of D, B sequences, V tokens.
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
    attend,
    linear,
    matmul,
    norm,
    run_block,
    token_dropout,
)
from .ops import Draw, Dropout, Layout, Ops, ops_for, put_virtual

ALIGNED = 64  # rows of the token table are a multiple: products of other widths are slower


class Embeddings(nn.Module):
    """A row of each table, summed. The token table is the last projection too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word = Embedding(config.vocab_size, config.dim, -config.vocab_size % ALIGNED)
        self.position = Embedding(config.max_len, config.dim)


class Block(nn.Module):
    """Attention, then MLP: each reads the normed residual stream and is added to it."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config = config
        self.site = 1 + 3 * index  # of its first dropout; 0 is the embeddings'
        self.attention = Attention(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.ffn_dim, config.norm_eps)
        # What all blocks add to the stream begins as large as what one would.
        self.attention.out.gain = self.mlp.down.gain = (2 * config.n_layer) ** -0.5

    def forward(
        self,
        h: Tensor,  # (T, C) the residual stream, normed
        x: Tensor,  # (T, C) as it is
        layout: Layout,
        ops: Ops,
        dropout: Dropout | None,
        rows: Tensor | None,  # (N,): only these are needed after attention
        past: Past | None,
        following: LayerNorm,  # whoever reads next
    ) -> tuple[Tensor, Tensor]:
        H, p, site = self.config.n_head, self.config.hidden_dropout, self.site
        drop = dropout and dropout.at(site, self.config.attention_dropout)
        qkv = linear(h, self.attention.qkv, ops, dropout).unflatten(1, (3 * H, -1))  # (T, 3H, D)
        o = attend(ops, qkv, layout, past, H, True, drop).flatten(1)  # (T, C)
        if rows is not None:
            o, x = o.index_select(0, rows), x.index_select(0, rows)  # (N, C)
        drop = dropout and dropout.at(site + 1, p, rows)
        o, bias = matmul(o, self.attention.out, ops, dropout, rows), self.attention.out.bias
        h, x = ops.add_norm(o, x, norm(self.mlp.norm), bias, drop)
        h = matmul(h, self.mlp.up, ops, dropout, rows)
        h = ops.bias_gelu(h, self.mlp.up.bias, self.config.activation)  # (T, F)
        drop = dropout and dropout.at(site + 2, p, rows)
        h, bias = matmul(h, self.mlp.down, ops, dropout, rows), self.mlp.down.bias
        return ops.add_norm(h, x, norm(following), bias, drop)


class GPT(Body):
    """Tokens to hidden states, each from its own and earlier tokens of its sequence."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def embed(self, batch: Batch, ops: Ops, dtype: torch.dtype, drop: Dropout | None) -> Tensor:
        """(T, C) the input of the first block, of a batch as layers see it."""
        e, order = self.embeddings, batch.order and batch.order.pick(0, 1)
        ids, tables = (batch.tokens, batch.positions), (e.word.weight, e.position.weight)
        if shift := self.shift(batch):
            ids = batch.tokens, batch.positions + shift
        if self.prompt is None or batch.continues:
            return ops.embed(ids, tables, None, dtype, drop, order)
        x = ops.embed(ids, tables, None, dtype, None, order)
        prompt = (self.prompt() + e.position.weight[:shift]).to(dtype)
        return ops.drop(put_virtual(x, prompt, batch.virtual), drop)

    def forward(
        self,
        batch: Batch,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        dropout: Dropout | None = None,
        rows: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Hidden states of the last layer, normed; see `minift.bert.Bert.forward`."""
        config, batch = self.config, self.seen(batch)
        check_length(batch.layout, self.room if self.prefix else config.max_len)
        ops, past = ops or ops_for(batch.tokens.device), self.past(batch, dtype)
        x = self.embed(batch, ops, dtype, dropout and dropout.at(0, config.embedding_dropout))
        norms = [block.attention.norm for block in self.layers] + [self.norm]
        h, x = ops.add_norm(x, None, norm(norms[0]))
        for i, block in enumerate(self.layers):
            wanted = rows if i == config.n_layer - 1 else None
            given = h, x, batch.layout, ops, dropout, wanted, past[i], norms[i + 1]
            h, x = run_block(block, checkpointing, *given)
        return h


class GPTLanguageModel(nn.Module):
    """The next token, as logits over the vocabulary. The projection is the token table."""

    head_groups = ()

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)

    def forward(
        self,
        batch: Batch,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        draw: Draw | None = None,
        checkpointing: bool = False,
    ) -> Projected:
        """Logits of the rows `batch.at`, or of all, not multiplied out.

        Args:
            batch, ops, dtype, checkpointing: as `minift.bert.Bert.forward`'s.
            draw: seed and step of the dropout, to train; None drops nothing.
        """
        ops, batch = ops or ops_for(batch.tokens.device), self.gpt.seen(batch)
        dropout = self.gpt.draw(draw, batch, ops)
        x = self.gpt(batch, ops, dtype, dropout, batch.at, checkpointing)
        return Projected(x, self.gpt.embeddings.word.weight, None, self.config.vocab_size)


class GPTClassifier(nn.Module):
    """Logits of each sequence from its last token, which alone has seen all of it."""

    head_groups = ("head",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        self.head = Linear(config.dim, len(config.labels), bias=False)

    def forward(
        self,
        batch: Batch,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        draw: Draw | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Logits (B, number of labels) in `dtype`; arguments as `GPTLanguageModel.forward`'s."""
        ops, batch = ops or ops_for(batch.tokens.device), self.gpt.seen(batch)
        dropout = self.gpt.draw(draw, batch, ops)
        x = self.gpt(batch, ops, dtype, dropout, batch.layout.last, checkpointing)  # (B, C)
        return linear(x, self.head)


class GPTTokens(nn.Module):
    """Scores of tokens, each of which has seen those before it: see `minift.bert.BertTokens`."""

    head_groups = ("head",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
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
        `GPTLanguageModel.forward`'s."""
        ops, site = ops or ops_for(batch.tokens.device), 1 + 3 * self.config.n_layer
        batch = self.gpt.seen(batch)
        dropout = self.gpt.draw(draw, batch, ops)
        x = self.gpt(batch, ops, dtype, dropout, batch.at, checkpointing)
        x = ops.drop(x, dropout and dropout.at(site, token_dropout(self.config), batch.at))
        return linear(x, self.head)
