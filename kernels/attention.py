"""Attention over packed sequences of different lengths.

Math        For every sequence and head, with scale = 1 / sqrt(D):
                S = scale * Q K^T + mask,   P = softmax(S, rows),   O = dropout(P) V
            Backward, with Z the dropped and rescaled P and delta_i = sum_d dO_id * O_id:
                dV = Z^T dO,   dP = dropout(dO V^T),   dS = P * (dP - delta)
                dQ = scale * dS K,   dK = scale * dS^T Q

Layout      B sequences are laid end to end on one token axis; nothing is padded. The product of
            the q, k, v projection is read as it lies: heads of q, then of k, then of v.
                qkv          (T, H + 2 * Hk, D)     H query heads, Hk key heads; Hk divides H
                out          (T, H, D)              rows of no sequence are 0

Traffic     Forward floor: read Q, K, V and write O once = (2 * H + 2 * Hk) * T * D * e bytes.
            Scores are sum_b L_b^2 * H; a kernel need never store them.

Source      Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped heads: Ainslie et al.
            2023, arXiv:2305.13245; dropout on the probabilities as in BERT, arXiv:1810.04805.
"""

import math

import torch
from torch import Tensor

from .layout import Layout


def attention_ref(
    qkv: Tensor, layout: Layout, n_head: int, *, causal: bool = False,
    keep: Tensor | None = None, p: float = 0.0,
) -> Tensor:
    """The definition: one dense softmax a sequence, in the dtype of `qkv`.

    Args:
        qkv: (T, H + 2 * Hk, D) float.
        layout: where the sequences lie.
        n_head: H, heads of the queries.
        causal: a row sees itself and the rows before it.
        keep: (T, H, L) bool, L at least the longest sequence: probabilities that stay. A row is a
            query, a column the position of a key in its sequence.
        p: the probability that `keep` was drawn with.

    Returns:
        (T, H, D).
    """
    T, heads, D = qkv.shape
    n_key = (heads - n_head) // 2
    q, k, v = qkv.split([n_head, n_key, n_key], dim=1)
    k, v = (x.repeat_interleave(n_head // n_key, dim=1) for x in (k, v))
    out, start = [], 0
    for length in layout.lengths:
        rows = slice(start, start + length)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) / math.sqrt(D)
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        probs = scores.softmax(-1)
        if keep is not None:
            probs = probs * keep[rows, :, :length].transpose(0, 1) / (1 - p)
        out.append(torch.einsum("hij,jhd->ihd", probs, v[rows]))
        start += length
    return torch.cat([*out, qkv.new_zeros(T - start, n_head, D)])


def check_attention(qkv: Tensor, layout: Layout, n_head: int) -> None:
    """Raises ValueError when `qkv` does not fit the layout or the head count."""
    if qkv.ndim != 3 or qkv.shape[0] != layout.rows:
        raise ValueError(f"expected qkv ({layout.rows}, H + 2 * Hk, D), got {tuple(qkv.shape)}")
    n_key, odd = divmod(qkv.shape[1] - n_head, 2)
    if n_head < 1 or odd or n_key < 1 or n_head % n_key:
        raise ValueError(f"expected H + 2 * Hk heads, Hk dividing H = {n_head}, got {qkv.shape[1]}")
