"""A third table: the definitions, in the dtype of their input, with masks written out."""

from dataclasses import replace

import torch

from minift.kernels.add_norm import add_norm_ref
from minift.kernels.attention import attention_ref
from minift.kernels.bias_gelu import bias_gelu_ref
from minift.kernels.cross_entropy import cross_entropy_ref
from minift.kernels.dropout import dropout_keep, dropout_ref
from minift.kernels.embed import embed_ref
from minift.ops import TORCH, indexed


def _mask(dropout, columns):
    """keep (T, columns), and p."""
    if dropout is None:
        return None, 0.0
    return dropout_keep(dropout, columns)[:, 0], dropout.p


def _cast(norm, dtype):
    return norm and norm._replace(
        **{name: x.to(dtype) for name, x in norm._asdict().items() if torch.is_tensor(x)}
    )


def attention(qkv, layout, n_head, causal=False, dropout=None):
    keep = None if dropout is None else dropout_keep(dropout, layout.max_length)
    p = 0.0 if dropout is None else dropout.p
    return attention_ref(qkv, layout, n_head, causal=causal, keep=keep, p=p)


def add_norm(x, residual, norm, bias=None, dropout=None, post=False):
    bias = None if bias is None else bias.to(x.dtype)
    keep, p = _mask(dropout, x.shape[1])
    return add_norm_ref(x, residual, _cast(norm, x.dtype), bias, keep, p, post)


def bias_gelu(x, bias, kind):
    return bias_gelu_ref(x, bias.to(x.dtype), kind)


def embed(ids, tables, norm, dtype, dropout=None, order=None):
    return embed_ref(ids, tables, norm, dtype, *_mask(dropout, tables[0].shape[1]))


def drop(x, dropout):
    return dropout_ref(x, *_mask(dropout, x.shape[1]))


def cross_entropy(logits, target, weight=None, label_smoothing=0.0, ignore_index=-100, report=None):
    return cross_entropy_ref(logits, target, weight, label_smoothing, ignore_index)


DEFINITIONS = replace(
    TORCH, attention=attention, attention_at=indexed(attention), add_norm=add_norm,
    bias_gelu=bias_gelu, embed=embed, drop=drop, cross_entropy=cross_entropy,
)  # fmt: skip
