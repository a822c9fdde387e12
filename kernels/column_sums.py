"""Sums over rows, in two launches: the gradients of biases and of a norm's parameters.

A kernel whose programs each walk some rows keeps its sums of columns to the end and writes them
once, fp32, a row a program: `partials`. One small launch adds them up, in an order that is always
the same, so no atomics are needed and the same bits come out of every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

PROGRAMS = 264  # that write partials, at most: two on each multiprocessor of an H100 or H200


@triton.jit(do_not_specialize=["programs", "C"])
def _column_sums_kernel(
    partials_ptr, sums_ptr,  # (K, programs, C) fp32, (K, C)
    programs, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    k = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    partials_ptr += k.to(tl.int64) * programs * C
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_R):
        inside = (start + r < programs)[:, None] & (c < C)[None, :]
        at = (start + r)[:, None] * C + c[None, :]
        total += tl.load(partials_ptr + at, mask=inside, other=0.0)
    sums = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + k * C + c, sums, mask=c < C)


TILE = {"BLOCK_R": 128, "BLOCK_C": 32}
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def column_sums(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(K, programs, C) fp32, dense -> (K, C) in `dtype`: the sums over programs."""
    K, programs, C = partials.shape
    sums = partials.new_empty(K, C, dtype=dtype)
    if K and C:
        with torch.cuda.device_of(partials):
            _column_sums_kernel[(triton.cdiv(C, TILE["BLOCK_C"]), K)](
                partials, sums, programs, C, **TILE, **OPTIONS
            )
    return sums


LAUNCHES = tuple(
    Launch(dtype, _column_sums_kernel, f"*fp32:16 *{dtype}:16 i32 i32", TILE, OPTIONS,
           streams=False)
    for dtype in ("fp32", "bf16")
)  # fmt: skip
