"""Two tables of the same operations, and the choice between them: an argument, nothing else.

    model(batch, ops=TORCH)     plain torch, on any device: the CPU path and the yardstick
    model(batch, ops=TRITON)    the kernels, on a GPU

A model that is given no table takes `ops_for` the device of its input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import torch_attention, torch_ops, torch_prefix
from .kernels.adamw import AdamW
from .kernels.add_norm import Norm, add_norm
from .kernels.attention import attention
from .kernels.attention import attention_probs as attention_probs_of
from .kernels.attention_prefix import attention_prefix
from .kernels.attention_step import attention_step_
from .kernels.bias_gelu import bias_gelu
from .kernels.cross_entropy import IGNORE_INDEX, cross_entropy
from .kernels.dropout import Draw, Dropout, draw_dropout, draw_dropout_ref, drop
from .kernels.embed import embed
from .kernels.embed_order import EmbedOrder
from .kernels.key_values import KeyValues, fill_
from .kernels.layout import Layout
from .kernels.linear_cross_entropy import linear_cross_entropy
from .kernels.table_gradients import TableGradients
from .kernels.target_report import TargetReport
from .kernels.virtual_tokens import Virtual, key_of, put_virtual
from .torch_ops import clip_in_step

__all__ = [
    "IGNORE_INDEX",
    "TABLES",
    "TORCH",
    "TRITON",
    "Draw",
    "Dropout",
    "EmbedOrder",
    "KeyValues",
    "Layout",
    "Norm",
    "Ops",
    "TableGradients",
    "TargetReport",
    "Virtual",
    "attention_probs_of",
    "clip_in_step",
    "fill_",
    "indexed",
    "key_of",
    "ops_for",
    "put_virtual",
]


@dataclass(frozen=True)
class Ops:
    """The operations that a model or a trainer calls; signatures as in `minift.torch_ops`."""

    draw_dropout: Callable
    attention: Callable
    attention_prefix: Callable
    attention_at: Callable  # attention, but of some rows alone
    attention_step_: Callable
    add_norm: Callable
    bias_gelu: Callable
    embed: Callable
    drop: Callable
    cross_entropy: Callable
    linear_cross_entropy: Callable
    adamw: Callable  # -> a torch.optim.Optimizer whose step clips: grad_norm, skipped
    masters: bool = False  # whether it takes 16-bit weights and steps their fp32 masters
    captured: bool = False  # whether a CUDA graph of them is good for other batches of its shape


def indexed(attention: Callable) -> Callable:
    """`attention_at` by way of an `attention`: who puts another one into a table wants both."""

    def attention_at(qkv, layout, n_head, rows, dropout=None):
        return attention(qkv, layout, n_head, dropout=dropout).index_select(0, rows)

    return attention_at


def _adamw(groups, betas, eps, max_grad_norm, masters=None):
    return AdamW(groups, betas=betas, eps=eps, max_grad_norm=max_grad_norm, masters=masters)


TORCH = Ops(
    draw_dropout=draw_dropout_ref,
    attention=torch_attention.attention,
    attention_prefix=torch_prefix.attention_prefix,
    attention_at=torch_attention.attention_at,
    attention_step_=torch_attention.attention_step_,
    add_norm=torch_ops.add_norm,
    bias_gelu=torch_ops.bias_gelu,
    embed=torch_ops.embed,
    drop=torch_ops.drop,
    cross_entropy=torch_ops.cross_entropy,
    linear_cross_entropy=torch_ops.linear_cross_entropy,
    adamw=torch_ops.adamw,
)

TRITON = Ops(
    draw_dropout=draw_dropout,
    attention=attention,
    attention_prefix=attention_prefix,
    attention_at=indexed(attention),
    attention_step_=attention_step_,
    add_norm=add_norm,
    bias_gelu=bias_gelu,
    embed=embed,
    drop=drop,
    cross_entropy=cross_entropy,
    linear_cross_entropy=linear_cross_entropy,
    adamw=_adamw,
    masters=True,
    captured=True,
)

TABLES = {"torch": TORCH, "triton": TRITON}


def ops_for(device: torch.device) -> Ops:
    """TRITON on a GPU, TORCH elsewhere."""
    return TRITON if device.type == "cuda" else TORCH
