"""What a model looks at: attention weights, made again outside the fast path.

The model takes its operations as an argument, so looking needs no hook and no second forward pass:
a table whose attention also writes down what it saw.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .batch import Batch
from .ops import Ops, Virtual, attention_probs_of, indexed, ops_for


@torch.no_grad()
def attention_probs(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ops: Ops | None = None,
) -> dict[int, list[Tensor]]:
    """The attention probabilities of a model in evaluation: row i of a head is how token i
    distributes its look over the tokens of its sequence.

    Args:
        model: a `Bert` or a `BertClassifier`.
        batch: on the model's device; see `minift.batch.collate`.
        layers: which, from 0; default all.
        heads: which, from 0; default all.
        ops: table of operations; default, the one for the device.

    Returns:
        By layer, for each sequence of the batch, in its order (shortest first), a (heads, L, L)
        fp32 tensor whose rows sum to 1. Virtual tokens come first: those of a prompt are rows and
        columns, those of a prefix columns.

    Raises:
        ValueError: a layer or head that the model does not have.
    """
    n_layer = model.config.n_layer
    layers = tuple(range(n_layer) if layers is None else layers)
    heads = None if heads is None else tuple(heads)
    if not all(0 <= i < n_layer for i in layers):
        raise ValueError(f"expected layers in 0 to {n_layer - 1}, got {list(layers)}")
    ops = ops or ops_for(batch.tokens.device)
    seen, layer = {}, 0

    def attention(qkv, layout, n_head, causal=False, dropout=None):
        nonlocal layer
        if layer in layers:
            probs = attention_probs_of(qkv, layout, n_head, causal=causal, heads=heads)
            seen[layer] = probs[: len(batch.rows)]  # without the empty ones of training batches
        layer += 1
        return ops.attention(qkv, layout, n_head, causal, dropout)

    def attention_prefix(qkv, prefix, layout, n_head, causal=False, dropout=None, virtual=None):
        # As rows of the batch a prefix gives the same probabilities; its own queries are none.
        where = Virtual.pack(layout, len(prefix)).to(qkv.device)
        out = attention(where.with_prefix(qkv, prefix), where.layout, n_head, causal)
        if layer - 1 in seen:
            seen[layer - 1] = [probs[:, len(prefix) :] for probs in seen[layer - 1]]
        return out.index_select(0, where.place)

    looking = replace(ops, attention=attention, attention_at=indexed(attention))
    model(batch, ops=replace(looking, attention_prefix=attention_prefix))
    return seen
