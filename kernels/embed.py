"""Embedding: the sum of a row of each table, then LayerNorm and dropout.

Math        s_t = sum_k tables[k][ids[k][t]],   y = dropout(norm(s))
            BERT: token, position and type tables with norm; GPT-2: token and position, no norm.
            Backward: dtables[k][i] = sum of ds_t over the rows t with ids[k][t] = i

Traffic     T rows, C columns, K tables of fp32, y of e bytes: forward gathers K rows and writes
            one, (4*K + e)*T*C. Memory gives no more than the rows that differ: position and type
            rows come out of the cache. That is why the sum is not kept for the gradient: to write
            and read it in fp32 is 8 bytes an element, to gather it again 4 of memory (of word rows)
            and 4*(K - 1) of cache. Kept are mean and rstd, 8 bytes a row. The gradient's traffic
            stands in embed_backward.py.

Tiling      A program does BLOCK_T whole rows; up to 1,024 columns it is one warp, and a row one
            chain of loads: nothing is exchanged between warps. C is a constant of the code, so that
            columns past it cost nothing: 768 is 3 steps of 256 and not 4. An element of 768 costs
            24 instructions with three tables, norm and dropout, 15 without dropout.

Numerics    The sum and the norm in fp32, one cast at the end. An id that its table has no row for
            reads the table's first and makes its row NaN (where it is not dropped), and the loss.
Source      Devlin et al. 2018, arXiv:1810.04805, section 3, figure 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .add_norm import Norm, add_norm_ref
from .dropout import Dropout, check_dropout, dropout_arguments, keeps, place_of, words_of
from .embed_backward import (
    DROPPED,
    check_order,
    declared,
    embed_gradient,
    gather,
    jit,
    row_tile,
)
from .embed_order import EmbedOrder
from .launch import can_launch
from .table_gradients import four

# ---------------------------------------------------------------- definition


def embed_ref(
    ids: tuple[Tensor, ...], tables: tuple[Tensor, ...], norm: Norm | None, dtype: torch.dtype,
    keep: Tensor | None = None, p: float = 0.0,
) -> Tensor:
    """The definition.

    Args:
        ids: one (T,) int64 tensor a table.
        tables: (R_k, C) each.
        norm: of the sum; None for none.
        dtype: of the result.
        keep: (T, C) bool: elements that stay.
        p: the probability that `keep` was drawn with.

    Returns:
        (T, C).
    """
    s = sum(table[i] for i, table in zip(ids, tables, strict=True))
    y = s if norm is None else add_norm_ref(s, None, norm)[0]
    y = y if keep is None else y * keep / (1 - p)
    return y.to(dtype)


def check_embed(ids: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> None:
    """Raises ValueError when there is not one (T,) index a table of C columns."""
    if len(ids) != len(tables) or len({i.shape for i in ids}) != 1 or ids[0].ndim != 1:
        shapes = [tuple(i.shape) for i in ids]
        raise ValueError(f"expected one (T,) index for each of {len(tables)} tables, got {shapes}")
    if len({t.shape[1:] for t in tables}) != 1:
        raise ValueError(f"expected tables of one width, got {[tuple(t.shape) for t in tables]}")


# ------------------------------------------------------------------- kernels


@jit
def _forward_kernel(
    ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr,          # (T,) int64 each; None past the last table
    table0_ptr, table1_ptr, table2_ptr, table3_ptr,  # (R, C)
    R0, R1, R2, R3,
    weight_ptr, bias_ptr, y_ptr, stats_ptr,          # (C,), (C,), (T, C), (2, T) fp32
    words_ptr, places_ptr, columns_ptr, threshold, kept, eps, T,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)[None, :]
    ids = (ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr)
    tables = (table0_ptr, table1_ptr, table2_ptr, table3_ptr)
    y = gather(ids, tables, (R0, R1, R2, R3), tl.minimum(t, T - 1), c, C)
    if weight_ptr is not None:
        mean = tl.sum(y, 1) / C
        centred = tl.where(c < C, y - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        tl.store(stats_ptr + t, mean, mask=t < T)
        tl.store(stats_ptr + T + t, rstd, mask=t < T)
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        y = centred * rstd[:, None] * weight + bias
    if columns_ptr is not None:
        a, b = words_of(words_ptr, place_of(places_ptr, 0), t, t < T)
        keep = keeps(a[:, None], b[:, None], tl.load(columns_ptr + c, mask=c < C), threshold)
        y = tl.where(keep, y * kept, 0.0)
    at = t.to(tl.int64)[:, None] * C + c
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & (c < C))


# ------------------------------------------------------------------ autograd


def _forward(ids, tables, norm, dtype, dropout):
    """y and, with norm, mean and rstd of every row: (2, T) fp32."""
    T, C = len(ids[0]), tables[0].shape[1]
    y = tables[0].new_empty(T, C, dtype=dtype)
    weight, bias, eps, _ = norm or (None, None, 0.0, False)
    stats = None if norm is None else y.new_empty(2, T, dtype=torch.float32)
    if T:
        with torch.cuda.device_of(y):
            tile = row_tile(C)
            _forward_kernel[(triton.cdiv(T, tile["BLOCK_T"]),)](
                *four(ids), *four(tables), *four([len(x) for x in tables]), weight, bias, y, stats,
                *dropout_arguments(dropout), eps, T, C, **tile,
            )
    return y, stats


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, dtype, dropout, order, eps, weight, bias, *tables):
        norm = None if weight is None else Norm(weight, bias, eps)
        y, stats = _forward(ids, tables, norm, dtype, dropout)
        ctx.save_for_backward(*ids, *tables, weight, stats)
        ctx.facts = dropout, order
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *saved, weight, stats = ctx.saved_tensors
        K = len(saved) // 2
        ids, tables = saved[:K], saved[K:]
        *_, need_weight, need_bias = ctx.needs_input_grad[:7]
        dtables, dweight, dbias = embed_gradient(
            dy, ids, tables, ctx.needs_input_grad[7:], weight, stats,
            need_weight or need_bias, *ctx.facts,
        )
        norm = dweight if need_weight else None, dbias if need_bias else None
        return *[None] * 5, *norm, *dtables


# -------------------------------------------------------------------- public


def _check_kernel(ids, tables, norm, dtype) -> None:
    check_embed(ids, tables)
    floats = torch.float32, torch.float16, torch.bfloat16
    first = tables[0]
    if not 1 <= len(tables) <= 4 or first.ndim != 2 or not 1 <= first.shape[1] <= 8192:
        shapes = [tuple(x.shape) for x in tables]
        raise ValueError(f"expected 1 to 4 tables (R, C) of 1 to 8,192 columns, got {shapes}")
    if any(x.dtype != first.dtype or not x.is_contiguous() or not len(x) for x in tables):
        said = ", ".join(f"{tuple(x.shape)} {x.dtype} {x.stride()}" for x in tables)
        raise ValueError(f"expected dense tables of one dtype with at least a row, got {said}")
    if first.dtype not in floats or dtype not in floats:
        raise ValueError(f"expected fp32, fp16 or bf16, got {first.dtype} to {dtype}")
    if any(i.dtype != torch.int64 for i in ids):
        raise ValueError(f"expected int64 ids, got {[i.dtype for i in ids]}: call .long()")
    if norm is not None and (norm.rms or norm.bias is None):
        raise ValueError("expected a LayerNorm with a bias, or None")
    parameters = () if norm is None else (norm.weight, norm.bias)
    if any(x.shape != first.shape[1:] for x in parameters):
        raise ValueError(f"expected a norm of {first.shape[1]}, got {tuple(norm.weight.shape)}")
    devices = {x.device for x in (*ids, *tables, *parameters)}
    if len(devices) > 1 or not can_launch(first.device):
        raise ValueError(f"expected all tensors on one GPU, got {sorted(map(str, devices))}")


def embed(
    ids: tuple[Tensor, ...], tables: tuple[Tensor, ...], norm: Norm | None, dtype: torch.dtype,
    dropout: Dropout | None = None, order: EmbedOrder | None = None,
) -> Tensor:
    """The input of the first block.

    Args:
        ids: one (T,) int64 tensor for each of 1 to 4 tables. One that its table has no row for
            makes a row of NaN, and that table gets no gradient from it.
        tables: (R_k, C) dense, C at most 8,192, of one dtype: fp32, fp16 or bf16.
        norm: LayerNorm of the sum; None for none.
        dtype: of the result: fp32, fp16 or bf16.
        dropout: of T rows and C columns; None drops nothing.
        order: of `ids`, made when the batch was. Without it the gradient makes one, on the host:
            slower, since it waits for the GPU, and no graph can capture that.

    Returns:
        (T, C) in `dtype`.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    _check_kernel(ids, tables, norm, dtype)
    check_dropout(dropout, len(ids[0]), tables[0].shape[1])
    check_order(order, ids)
    ids = tuple(i.contiguous() for i in ids)
    weight, bias, eps, _ = norm or (None, None, 0.0, False)
    if norm is not None:
        weight, bias = weight.contiguous(), bias.contiguous()
    return _Embed.apply(ids, dtype, dropout, order, eps, weight, bias, *tables)


def _launches():
    for C, K, norm, drop in ((768, 3, 1, 1), (768, 3, 1, 0), (768, 2, 0, 1), (384, 3, 1, 1),
                             (8192, 3, 1, 1)):  # fmt: skip
        absent = "weight_ptr bias_ptr stats_ptr " * (not norm) + DROPPED * (not drop)
        yield declared(_forward_kernel, C, K, absent, row_tile(C))


LAUNCHES = tuple(_launches())
