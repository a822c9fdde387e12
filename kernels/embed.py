"""Embedding: the sum of a row of each table, then LayerNorm and dropout.

Math        s_t = sum_k tables[k][ids[k][t]],   y = dropout(norm(s))
            BERT: token, position and type tables with norm; GPT-2: token and position, no norm.
            Backward: dtables[k][i] = sum of ds_t over the rows t with ids[k][t] = i

Traffic     T rows, C columns: forward reads K rows and writes one a token: (K + 1)*T*C*e. Backward
            reads dy and s and writes the touched rows: at most (2 + K)*T*C*e.

Numerics    The sum and the norm in the dtype of the tables (fp32 masters), one cast at the end.
Source      Devlin et al. 2018, arXiv:1810.04805, section 3, figure 2.
"""

import torch
from torch import Tensor

from .add_norm import Norm, add_norm_ref


def embed_ref(
    ids: tuple[Tensor, ...], tables: tuple[Tensor, ...], norm: Norm | None, dtype: torch.dtype,
    keep: Tensor | None = None, p: float = 0.0,
) -> Tensor:
    """The definition.

    Args:
        ids: one (T,) int64 tensor a table.
        tables: (R_k, C) each.
        norm: LayerNorm of the sum; None for none.
        dtype: of the result.
        keep: (T, C) bool: elements that stay.
        p: the probability that `keep` was drawn with.

    Returns:
        (T, C).
    """
    s = sum(table[i] for i, table in zip(ids, tables, strict=True))
    y = s if norm is None else add_norm_ref(s, torch.zeros_like(s), norm)[0]
    y = y if keep is None else y * keep / (1 - p)
    return y.to(dtype)


def check_embed(ids: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> None:
    """Raises ValueError when there is not one (T,) index a table of C columns."""
    if len(ids) != len(tables) or len({i.shape for i in ids}) != 1 or ids[0].ndim != 1:
        shapes = [tuple(i.shape) for i in ids]
        raise ValueError(f"expected one (T,) index for each of {len(tables)} tables, got {shapes}")
    if len({t.shape[1:] for t in tables}) != 1:
        raise ValueError(f"expected tables of one width, got {[tuple(t.shape) for t in tables]}")
