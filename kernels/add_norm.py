"""Bias, dropout, residual and norm: all that stands between one matmul and the next.

Math        x is the product of a matmul, `bias` its bias, r the residual stream; C columns:
                s = r + dropout(x + bias)
                y = h * weight + norm_bias,   h = (s - mean) * rstd,   rstd = 1 / sqrt(var + eps)
            RMSNorm: mean is 0, and var the mean of squares. The second result is the next residual:
            s (pre-norm) or y once more (post-norm), and each result has a gradient of its own.
            With dy and ds what reaches y and s, two of y added up, and g = dy * weight:
                dr = ds + rstd * (g - mean_C(g) - h * mean_C(g * h))      RMSNorm: no mean_C(g)
                dx = dropout(dr),   dbias = sum_T dx
                dweight = sum_T dy * h,   dnorm_bias = sum_T dy

Traffic     T rows, C columns, e bytes each. Forward reads x, r and writes s, y: 4*T*C*e. Backward
            reads s and the gradients, writes dr and, where anything is dropped, dx: 3 to 5*T*C*e.
            Dropout's bits are made again, from words of which there are four a row. s is not
            written when it is x itself, nor when nobody will ask for it.

Tiling      Forward, a tile of rows a program, a row of up to 1024 columns in one warp: see
            row_tiles.py. 64 registers, so that 32 warps an SM have their rows under way. Rows past
            T are the last one again: loads have no mask, only stores have. On sm_90 21 instructions
            an element, 26 with dropout, where 8 bytes of it leave time for 50.
            Backward: see add_norm_backward.py.

Numerics    y is the norm of s as it was rounded, to the bit: what backward finds is what forward
            had. Statistics in fp32, in two passes over registers. The second one sums the
            deviations too, and takes their mean off again: it is what rounding left of the mean.
            Equal numbers in a row give 0 exactly, however small eps is.
            A row's result depends on nothing but that row.
Source      Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467 (RMSNorm);
            post-norm as in BERT, pre-norm as in GPT-2. Chan et al. 1983, "Algorithms for computing
            the sample variance" (the corrected two-pass algorithm).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .add_norm_backward import launch_backward
from .dropout import Dropout, check_dropout, dropout_arguments, keeps, place_of, words_of
from .launch import Launch, can_launch
from .row_tiles import WIDEST, load_chunk, row_tile, store_chunk, total


class Norm(NamedTuple):
    """The parameters of a LayerNorm or RMSNorm over C columns."""

    weight: Tensor       # (C,)
    bias: Tensor | None  # (C,); an RMSNorm has none
    eps: float           # added to the variance
    rms: bool = False    # the mean stays where it is


# ---------------------------------------------------------------- definition


def add_norm_ref(
    x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None = None,
    keep: Tensor | None = None, p: float = 0.0, post: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of `x`.

    Args:
        x: (T, C) float.
        residual: (T, C); None is 0.
        norm: weight and bias (C,), eps.
        bias: (C,), of the matmul that made `x`.
        keep: (T, C) bool: elements of x + bias that stay.
        p: the probability that `keep` was drawn with.
        post: the normed sum is the next residual, not the sum.

    Returns:
        (y, stream): the normed sum, and the next residual; (T, C) each.
    """
    x = x if bias is None else x + bias
    x = x if keep is None else x * keep / (1 - p)
    s = x if residual is None else residual + x
    centred = s if norm.rms else s - s.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    y = centred / (variance + norm.eps).sqrt() * norm.weight
    y = y if norm.bias is None else y + norm.bias
    return y, y if post else s


def check_add_norm(
    x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None = None
) -> None:
    """Raises ValueError when shapes disagree, or an RMSNorm has a bias."""
    given = {"x": x, "residual": residual, "weight": norm.weight, "norm bias": norm.bias,
             "bias": bias}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None}
    wanted = {name: x.shape if name in ("x", "residual") else x.shape[1:] for name in shapes}
    if x.ndim != 2 or shapes != wanted:
        said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected x and residual (T, C), weight and biases (C,), got {said}")
    if norm.rms and norm.bias is not None:
        raise ValueError("expected an RMSNorm without bias, got one")


# -------------------------------------------------------------------- kernel


@triton.jit(
    do_not_specialize=["T", "threshold"],
    do_not_specialize_on_alignment=["places_ptr", "mean_ptr", "rstd_ptr"],
)
def _add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, norm_bias_ptr, bias_ptr,  # (T, C), (T, C), three of (C,)
    rows_ptr, places_ptr, columns_ptr,                         # words of dropout
    y_ptr, s_ptr, mean_ptr, rstd_ptr,                          # (T, C), (T, C), (T,), (T,) fp32
    T, threshold, kept, eps,
    C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):
    """A tile of rows. Without `mean_ptr` it is an RMSNorm."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = t < T
    t = tl.minimum(t, T - 1)
    row = t * C
    every = tl.zeros((ROWS, 1), tl.int32)  # where what there is a column of begins, for each row
    if rows_ptr is not None:
        a, b = words_of(rows_ptr, place_of(places_ptr, 0), t, exists)
    s = ()
    for i in tl.static_range(0, C, CHUNK):
        v = load_chunk(x_ptr, row, i, C, CHUNK).to(tl.float32)
        if bias_ptr is not None:
            v += load_chunk(bias_ptr, every, i, C, CHUNK).to(tl.float32)
        if rows_ptr is not None:
            word = load_chunk(columns_ptr, every, i, C, CHUNK)
            v *= tl.where(keeps(a, b, word, threshold), kept, 0.0)
        if residual_ptr is not None:
            v += load_chunk(residual_ptr, row, i, C, CHUNK).to(tl.float32)
        v = v.to(x_ptr.dtype.element_ty)
        store_chunk(s_ptr, row, v, exists, i, C, CHUNK)
        s += (v.to(tl.float32),)
    mean = 0.0
    if mean_ptr is not None:
        mean = total(s) * (1.0 / C)
    d = ()
    squares = ()
    for i in tl.static_range(0, C, CHUNK):
        v = s[i // CHUNK] - mean
        if i + CHUNK > C:
            v = tl.where(i + tl.arange(0, CHUNK)[None, :] < C, v, 0.0)
        d += (v,)
        squares += (v * v,)
    rest = 0.0
    var = total(squares) * (1.0 / C)
    if mean_ptr is not None:
        of_d = total(d)
        rest = of_d * (1.0 / C)
        rest = tl.fma(tl.fma(-rest, C * 1.0, of_d), 1.0 / C, rest)  # of_d / C, rounded correctly
        var = tl.maximum(var - rest * rest, 0.0)
        tl.store(mean_ptr + t, mean + rest, mask=exists)
    rstd = tl.rsqrt(var + eps)
    tl.store(rstd_ptr + t, rstd, mask=exists)
    for i in tl.static_range(0, C, CHUNK):
        # Not d * rstd - rest * rstd: fused, one product is rounded and the other is not.
        y = (d[i // CHUNK] - rest) * rstd * load_chunk(weight_ptr, every, i, C, CHUNK)
        if norm_bias_ptr is not None:
            y += load_chunk(norm_bias_ptr, every, i, C, CHUNK)
        store_chunk(y_ptr, row, y, exists, i, C, CHUNK)


# ------------------------------------------------------------------ autograd

CHUNKS = 4  # of a row at most: 32 columns a lane


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, norm_bias, bias, norm: Norm, dropout, uses):
        post, trains = uses
        T, C = x.shape
        tile, warps = row_tile(C, x.element_size(), CHUNKS)
        tensors = x, residual, weight, norm_bias, bias
        dense = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
        y, (mean, rstd) = x.new_empty(T, C), x.new_empty(2, T, dtype=torch.float32)
        mean = None if norm.rms else mean
        s = None
        is_x = residual is None and bias is None and dropout is None
        if not is_x and (trains or not post):
            s = x.new_empty(T, C)
        *words, lowest, kept = dropout_arguments(dropout)
        if T:
            with torch.cuda.device_of(x):
                _add_norm_kernel[(triton.cdiv(T, tile["ROWS"]),)](
                    *dense, *words, y, s, mean, rstd, T, lowest, kept, norm.eps, **tile,
                    num_warps=warps, enable_fp_fusion=True,
                )
        ctx.save_for_backward(dense[0] if is_x else s, mean, rstd, dense[2])
        ctx.dropout, ctx.post = dropout, post
        ctx.set_materialize_grads(False)
        return y, y.detach() if post else x if is_x else s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dstream: Tensor | None):
        upstream = (dy, dstream, None) if ctx.post else (dy, None, dstream)
        grads = launch_backward(upstream, ctx.saved_tensors, ctx.dropout, ctx.needs_input_grad[:5])
        return *grads, None, None, None


# -------------------------------------------------------------------- public


def _check_kernel(
    x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None, dropout: Dropout | None
) -> None:
    check_add_norm(x, residual, norm, bias)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected x in fp32, fp16 or bf16, got {x.dtype}")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"expected a residual in {x.dtype}, got {residual.dtype}")
    parameters = [p for p in (norm.weight, norm.bias, bias) if p is not None]
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, x.dtype}:
        said = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"expected parameters all in torch.float32 or {x.dtype}, got {said}")
    if not 1 <= x.shape[1] <= WIDEST:
        raise ValueError(f"expected 1 to {WIDEST} columns, got {x.shape[1]}")
    devices = {tensor.device for tensor in (x, residual, *parameters) if tensor is not None}
    if len(devices) > 1 or not can_launch(x.device):
        raise ValueError(f"expected all on one GPU, got {', '.join(sorted(map(str, devices)))}")
    check_dropout(dropout, *x.shape)


def add_norm(
    x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None = None,
    dropout: Dropout | None = None, post: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `add_norm_ref`. Both results may be used, as often as one likes: their gradients are
    added where they are needed, and no kernel runs for it.

    Args:
        x: (T, C) fp32, fp16 or bf16, of at most 8192 columns. Not dense, it is copied.
        residual: (T, C) in the dtype of x; None is 0.
        norm: weight and bias (C,) in fp32 or the dtype of x; eps.
        bias: (C,), of the matmul that made `x`.
        dropout: of x + bias, head 0 of its site; None drops nothing.
        post: the normed sum is the next residual, not the sum.

    Returns:
        (y, stream): in storage of their own, but y is the stream when `post`, and x is when
        nothing was added to it or dropped.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_kernel(x, residual, norm, bias, dropout)
    weight, norm_bias, *_ = norm
    uses = post, torch.is_grad_enabled()
    return _AddNorm.apply(x, residual, weight, norm_bias, bias, norm, dropout, uses)


def _launches():
    """As BERT runs it, in every dtype; the widths of models; GPT's first and last; an RMSNorm."""
    dropout = {"rows": "*i32:16", "places": "*i32", "columns": "*i32:16"}
    for dtype, C, off in (
        ("bf16", 768, ""), ("fp16", 768, ""), ("fp32", 768, ""), ("bf16", 384, ""),
        ("bf16", 1024, ""), ("bf16", 8192, ""), ("bf16", 768, "dropout"),
        ("bf16", 768, "dropout residual bias s"),
        ("bf16", 768, "dropout residual bias s norm_bias mean"),
    ):  # fmt: skip
        tile, warps = row_tile(C, 4 if dtype == "fp32" else 2, CHUNKS)
        rows, column = f"*{dtype}:16", "*fp32:16"
        types = {"x": rows, "residual": rows, "weight": column, "norm_bias": column,
                 "bias": column, **dropout, "y": rows, "s": rows, "mean": "*fp32",
                 "rstd": "*fp32"}  # fmt: skip
        absent = off.replace("dropout", " ".join(dropout)).split()
        constexprs = {f"{name}_ptr": None for name in absent} | tile
        numbers = "i32 i32 fp32 fp32"
        if "dropout" in off:
            constexprs |= {"threshold": None, "kept": None}
            numbers = "i32 fp32"
        words = [word for name, word in types.items() if name not in absent]
        yield Launch(
            f"{dtype}, C {C}" + (f", no {off}" if off else ""), _add_norm_kernel,
            " ".join([*words, numbers]), constexprs,
            {"num_warps": warps, "enable_fp_fusion": True},
        )


LAUNCHES = tuple(_launches())
