"""Bias and GELU.

Math        z = x + bias
            gelu_erf  (BERT)    y = z * Phi(z),  Phi(z) = (1 + erf(z / sqrt 2)) / 2
                                dy/dz = Phi(z) + z * exp(-z^2 / 2) / sqrt(2 pi)
            gelu_tanh (GPT-2)   y = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
            dbias = sum_T dx

Traffic     T rows, F columns, e bytes: forward 2*T*F*e, backward 3*T*F*e; sums of dbias add 0.5 %
            at 16,384 rows. Saved is x, which the matmul has written anyway: saving dy/dz would
            write T*F*e more, to spare 17 instructions backward, where there is time.

Tiling      A program owns BLOCK_F columns and walks rows, BLOCK_T at a time; a thread has 64 bytes
            of loads under way. Forward there are as many programs as tiles. Backward there are six
            on each multiprocessor, of 80 registers: few sums of columns are written, and none is
            exchanged before the end; `column_sums` adds them up.

Numerics    One formula for both signs and both kinds. With a = |z| and the tail q(a) = 1 - Phi(a),

                y = max(z, 0) - a * q,   dy/dz = q - a * s on the left, 1 minus that on the right

            where s = -dq/da. log2 of the tail of erf is all but a parabola: a polynomial of degree
            8 and one exp2 give a * q to 3e-8 or to 0.3 %, whichever is more, down to y of -6e-9;
            the rounding of fp32 is more than that near 0. The tail of tanh is 1 / (1 + 2^v), the
            square of an rsqrt: two instructions where a division takes eight. Nothing cancels, as
            it does in 1 + erf: below -3 y is better than the definition's. -inf gives 0, NaN NaN.

            Instructions of sm_90 for an element of bf16, of 25 forward and 38 backward for which
            there is time at 4.8 TB/s: erf 19 and 27, tanh 17 and 26; with libdevice's erf 38 and
            48. Degree 5 would be good to 7e-7 and spare 3: it would show in bf16, in the tail.

Not here    The activation in the matmul's epilogue. At 16,384 x 768 x 3,072 it would not read x
            again: 100 MB, 21 us of 4.8 TB/s; x is written all the same, for backward. The matmul is
            77 GFLOP, 104 us at 75 % of an H200's peak: one in Triton that falls 17 % behind cuBLAS
            has taken 21 us longer. Triton's tutorial has a tie, on another GPU and without 19
            instructions an element in the epilogue. Not measured here, so not shipped.

Source      Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .column_sums import PROGRAMS, column_sums
from .launch import Launch, can_launch

KINDS = ("gelu_erf", "gelu_tanh")
FAR = tl.constexpr(16.0)  # from here on the tail is 0 in fp32
LN2 = tl.constexpr(math.log(2))
# log2(1 - Phi(a)) in powers of a, for a in [0, 6]; beyond, it goes on falling. Minimax of the error
# of the tail times max(1, a), or of 3e-3 of the tail.
TAIL = tl.constexpr((
    -1.0, -1.1511078673263067, -0.4591775963048963, -0.05260864128949782, 0.007249756552583794,
    -0.00029487809134460787, -0.00011545281072882575, 2.3537975413506908e-05,
    -1.4444555942559502e-06,
))  # fmt: skip
# 2^v of the other tail: exp(2 w), w = sqrt(2 / pi) * (a + 0.044715 a^3)
TANH, TANH3 = (tl.constexpr(2 * math.sqrt(2 / math.pi) / math.log(2) * c) for c in (1, 0.044715))

# ---------------------------------------------------------------- definition


def bias_gelu_ref(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The definition, in the dtype of `x`.

    Args:
        x: (T, F) float.
        bias: (F,), of the matmul that made `x`.
        kind: "gelu_erf" or "gelu_tanh".

    Returns:
        (T, F).
    """
    z = x if bias is None else x + bias
    if kind == "gelu_erf":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def check_bias_gelu(x: Tensor, bias: Tensor | None, kind: str) -> None:
    """Raises ValueError on an unknown kind or a bias of another width."""
    if kind not in KINDS:
        raise ValueError(f"expected kind {' or '.join(KINDS)}, got {kind!r}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"expected bias ({x.shape[-1]},), got {tuple(bias.shape)}")


# ------------------------------------------------------------------- kernels


@triton.jit
def _tail(a, ERF: tl.constexpr):
    """1 - Phi(a), or what stands in its place in gelu_tanh, for a in [0, FAR]."""
    if ERF:
        p = TAIL[8]
        for i in tl.static_range(8):
            p = p * a + TAIL[7 - i]
        return tl.exp2(p)
    else:
        r = tl.rsqrt(1.0 + tl.exp2(a * (a * a * TANH3 + TANH)))
        return r * r


@triton.jit
def _gelu(z, ERF: tl.constexpr):
    a = tl.minimum(tl.abs(z), FAR, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(z, 0.0) - a * _tail(a, ERF)


@triton.jit
def _slope(z, ERF: tl.constexpr):
    """dy/dz."""
    a = tl.minimum(tl.abs(z), FAR, propagate_nan=tl.PropagateNan.ALL)
    q = _tail(a, ERF)
    if ERF:
        s = tl.exp2(a * a * -0.7213475204444817 - 1.3257480647361594)  # exp(-a^2/2) / sqrt(2 pi)
    else:
        s = q * (1.0 - q) * (a * a * (3 * LN2 * TANH3) + LN2 * TANH)
    left = q - a * s
    return tl.where(z > 0, 1.0 - left, left)


@triton.jit
def _bias(bias_ptr, c, F):
    if bias_ptr is None:
        return 0.0
    else:
        return tl.load(bias_ptr + c, mask=c < F, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile(start, c, T, F, BLOCK_T: tl.constexpr):
    """Rows, 64 bits wide, and which elements are there."""
    t = start + tl.arange(0, BLOCK_T)
    return t.to(tl.int64)[:, None], (t < T)[:, None] & (c < F)[None, :]


@triton.jit(do_not_specialize=["T"])
def _gelu_kernel(
    x_ptr, bias_ptr, y_ptr,  # (T, F), (F,), (T, F)
    T, F, stride,
    ERF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    bias = _bias(bias_ptr, c, F)
    for start in range(tl.program_id(1) * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        row, inside = _tile(start, c, T, F, BLOCK_T)
        x = tl.load(x_ptr + row * stride + c[None, :], mask=inside)
        y = _gelu(x.to(tl.float32) + bias, ERF).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * F + c[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _gradient_kernel(
    x_ptr, bias_ptr, dy_ptr, dx_ptr, partials_ptr,  # (T, F), (F,), (T, F), (T, F), (programs, F)
    T, F, stride, dy_stride,
    ERF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    bias = _bias(bias_ptr, c, F)
    sums = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        row, inside = _tile(start, c, T, F, BLOCK_T)
        x = tl.load(x_ptr + row * stride + c[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * dy_stride + c[None, :], mask=inside, other=0.0)
        dx = dy.to(tl.float32) * _slope(x.to(tl.float32) + bias, ERF)
        if dx_ptr is not None:
            stored = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * F + c[None, :], stored, mask=inside)
        if partials_ptr is not None:
            sums += dx  # of what is not there, 0
    if partials_ptr is not None:
        at = partials_ptr + tl.program_id(1).to(tl.int64) * F + c
        tl.store(at, tl.sum(sums, 0), mask=c < F)


# ------------------------------------------------------------------ autograd

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
BLOCK_F = 256
ROWS, GRADIENT_ROWS = 32, 16  # BLOCK_T of elements of one byte
MOST = 65535  # programs along the second axis of a grid


def _blocks(rows: int, dtype: torch.dtype) -> dict[str, int]:
    return {"BLOCK_T": rows // dtype.itemsize, "BLOCK_F": BLOCK_F}


def _grid(T: int, F: int, block_t: int, most: int = MOST) -> tuple[int, int]:
    """At most so many programs along T, all with as many tiles, or one less."""
    tiles = triton.cdiv(T, block_t)
    return triton.cdiv(F, BLOCK_F), triton.cdiv(tiles, max(1, triton.cdiv(tiles, most)))


def _most(F: int) -> int:
    """Programs along T: with those along F six on each multiprocessor, all at once."""
    return max(1, min(PROGRAMS, 3 * PROGRAMS // max(1, triton.cdiv(F, BLOCK_F))))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.erf = kind == "gelu_erf"
        y, blocks = x.new_empty(x.shape), _blocks(ROWS, x.dtype)
        if y.numel():
            with torch.cuda.device_of(x):
                _gelu_kernel[_grid(*x.shape, blocks["BLOCK_T"])](
                    x, bias, y, *x.shape, x.stride(0), ERF=ctx.erf, **blocks, **OPTIONS
                )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x, bias), (need_x, need_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        (T, F), dy, blocks = x.shape, _dense_rows(dy), _blocks(GRADIENT_ROWS, x.dtype)
        grid = _grid(T, F, blocks["BLOCK_T"], _most(F) if need_bias else MOST)
        dx = x.new_empty(T, F) if need_x else None
        partials = x.new_empty(1, grid[1], F, dtype=torch.float32) if need_bias else None
        if T * F:
            with torch.cuda.device_of(x):
                _gradient_kernel[grid](
                    x, bias, dy, dx, partials, T, F, x.stride(0), dy.stride(0),
                    ERF=ctx.erf, **blocks, **OPTIONS,
                )
        return dx, column_sums(partials, bias.dtype)[0] if need_bias else None, None


# -------------------------------------------------------------------- public


def bias_gelu(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """See `bias_gelu_ref`, of which the sum with the bias is not rounded to the dtype of `x`.

    Args:
        x: (T, F) fp32, fp16 or bf16 with unit stride along F; only read.
        bias: (F,) fp32 or in the dtype of x.
        kind: "gelu_erf" or "gelu_tanh".

    Returns:
        (T, F), dense.

    Raises:
        ValueError: the kind is another, or a shape, dtype, stride or device does not fit.
    """
    check_bias_gelu(x, bias, kind)
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected (T, F) in fp32, fp16 or bf16, got {tuple(x.shape)} {x.dtype}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"expected unit stride along F, got {x.stride()}: call .contiguous()")
    if bias is not None and bias.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"expected bias in fp32 or {x.dtype}, got {bias.dtype}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"expected bias on {x.device}, got {bias.device}")
    if not can_launch(x.device):
        raise ValueError(f"expected x on a GPU, got {x.device}")
    return _BiasGelu.apply(x, None if bias is None else bias.contiguous(), kind)


def _launches():
    """Every kind and dtype with an fp32 bias; in bf16 what else there is to ask for."""
    cases = [(kind, dtype, "*fp32:16", "") for kind in KINDS for dtype in ("bf16", "fp16", "fp32")]
    cases += [("gelu_erf", "bf16", bias, label)
              for bias, label in (("*bf16:16", ", bf16 bias"), ("", ", no bias"))]  # fmt: skip
    for kind, dtype, bias, label in cases:
        x, size, sums = f"*{dtype}:16", 4 if dtype == "fp32" else 2, "*fp32:16" if bias else ""
        const = {"ERF": kind == "gelu_erf", "BLOCK_F": BLOCK_F}
        const |= {} if bias else {"bias_ptr": None}
        none = {} if bias else {"partials_ptr": None}
        for kernel, rows, types, off in (
            (_gelu_kernel, ROWS, f"{x} {bias} {x} i32 i32:16 i32:16", {}),
            (_gradient_kernel, GRADIENT_ROWS,
             f"{x} {bias} {x} {x} {sums} i32 i32:16 i32:16 i32:16", none),
        ):  # fmt: skip
            blocks = {"BLOCK_T": rows // size} | off
            types = " ".join(types.split())
            yield Launch(f"{kind} {dtype}{label}", kernel, types, const | blocks, OPTIONS)
    yield Launch(
        "gelu_erf bf16, x frozen", _gradient_kernel,
        "*bf16:16 *fp32:16 *bf16:16 *fp32:16 i32 i32:16 i32:16 i32:16",
        {"ERF": True, "dx_ptr": None, "BLOCK_T": GRADIENT_ROWS // 2, "BLOCK_F": BLOCK_F}, OPTIONS,
        streams=False,
    )


LAUNCHES = tuple(_launches())
