"""GPT-2 in plain torch, for torch.compile: what one can have with no kernels and no library.

Pre-norm blocks, causal scaled_dot_product_attention on (B, L) blocks of tokens, the token table as
last projection, and its loss over all logits at once, in fp32. The vocabulary is padded with rows
of zeros, as products like it; they are trained as if they were tokens. It drops nothing out.
Parameters have minift's names, so its weights are loaded as they are.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". B blocks of L tokens, C
wide, H heads, V tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.config import ModelConfig
from minift.ops import IGNORE_INDEX

PADDED = 64  # rows of the token table are a multiple


class Attention(nn.Module):
    """Each token looks at itself and those before it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, self.n_head = config.dim, config.n_head
        self.norm = nn.LayerNorm(C, config.norm_eps)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, L, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).reshape(B, L, C))


class MLP(nn.Module):
    """Up, GELU by tanh, down."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, wide = config.dim, config.ffn_dim
        self.norm = nn.LayerNorm(C, config.norm_eps)
        self.up, self.down = nn.Linear(C, wide), nn.Linear(wide, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class Block(nn.Module):
    """Each half reads the residual stream and is added to it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class PlainGPT(nn.Module):
    """The mean loss of blocks, () in fp32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        rows = -(-config.vocab_size // PADDED) * PADDED
        word, position = nn.Embedding(rows, config.dim), nn.Embedding(config.max_len, config.dim)
        self.embeddings = nn.ModuleDict({"word": word, "position": position})
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            ids: (B, L).
            targets: (B, L), IGNORE_INDEX where there is none.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["word"](ids) + self.embeddings["position"](positions)  # (B, L, C)
        for block in self.layers:
            x = block(x)
        logits = F.linear(self.norm(x), self.embeddings["word"].weight)  # (B, L, V)
        flat = logits.flatten(0, 1).float()
        return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX)
