"""What the attention kernels share: spans, tiles of rows, what a query sees, what is dropped, and
how they are launched.

Names       A sequence has q_len queries and k_len keys; i is a query and j a key of it, counted
            from 0. A matrix of rows is a pair: a pointer to the sequence's first row, of one head,
            and the stride between rows.

Causal      The mask is aligned to the end: query i sees keys 0 : i + 1 + k_len - q_len. So the
            tokens that follow a cache are the last rows of a square, and queries before the first
            key see nothing.

                q_len = 3, k_len = 5      # # # . .      q_len = 3, k_len = 2      . .
                                          # # # # .                                # .
                                          # # # # #                                # #

Dropout     dropout.py gives a query two words and a key one; whether their score is kept is then a
            multiply-add and a compare. No random number is made here.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, without_nvidia

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234e38)

# Counts do not choose the code, nor where in a step's words a place's and the columns' begin.
jit = triton.jit(
    do_not_specialize=["threshold", "T", "H"],
    do_not_specialize_on_alignment=["places_ptr", "columns_ptr"],
)


@triton.jit
def span_of(spans_ptr, program, heads):
    """The span of a program, `heads` of them to a span: first row of the piece, then begin and
    length of the sequence's queries, begin and length of its keys; and the program's head."""
    at = spans_ptr + program // heads * 5
    q_begin, k_begin = tl.load(at + 1), tl.load(at + 3)
    q_len, k_len = tl.load(at + 2) - q_begin, tl.load(at + 4) - k_begin
    head = program % heads
    return tl.load(at), q_begin.to(tl.int64), q_len, k_begin.to(tl.int64), k_len, head.to(tl.int64)


@triton.jit
def rows_of(ptr, row_stride, begin, head_stride, head, ALIGNED: tl.constexpr):
    """The rows of one sequence and head, as a matrix. `ALIGNED`: each begins at a multiple of 16
    bytes, and the compiler is told so; of strides it knows only what is a multiple of 16."""
    if ALIGNED:
        row_stride = row_stride // 8 * 8
    return ptr + (begin * row_stride + head * head_stride), row_stride, ALIGNED


@triton.jit
def _addresses(matrix, first, length, BLOCK: tl.constexpr, D: tl.constexpr):
    WIDTH: tl.constexpr = triton.next_power_of_2(D) if D > 16 else 16  # the least of a tl.dot
    ptr, stride, ALIGNED = matrix
    row, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = first + row < length
    if WIDTH > D:
        inside = inside & (d < D)
    first_ptr = ptr + tl.cast(first, tl.int64) * stride
    if ALIGNED:
        first_ptr = tl.multiple_of(first_ptr, 16)
    return first_ptr + (row * stride + d), inside


@triton.jit
def load_rows(matrix, first, length, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows first : first + BLOCK, (BLOCK, next power of 2 of D); past `length` and past D, 0."""
    x_ptr, inside = _addresses(matrix, first, length, BLOCK, D)
    return tl.load(x_ptr, mask=inside, other=0.0)


@triton.jit
def store_rows(matrix, value, first, length, BLOCK: tl.constexpr, D: tl.constexpr):
    x_ptr, inside = _addresses(matrix, first, length, BLOCK, D)
    tl.store(x_ptr, value.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def keys_seen(i, q_len, k_len, CAUSAL: tl.constexpr):
    """How many keys query i sees."""
    if CAUSAL:
        return tl.minimum(tl.maximum(i + 1 + k_len - q_len, 0), k_len)
    else:
        return i * 0 + k_len


@triton.jit
def key_range(
    first, q_len, k_len, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What queries first : first + BLOCK_M see: how many keys each; how many all of them, in whole
    blocks of BLOCK_N; how many the last one."""
    each = keys_seen(first + tl.arange(0, BLOCK_M), q_len, k_len, CAUSAL)
    whole = keys_seen(first, q_len, k_len, CAUSAL) // BLOCK_N * BLOCK_N
    last = tl.minimum(first + BLOCK_M, q_len) - 1
    return each, whole, keys_seen(last, q_len, k_len, CAUSAL)


# ---------------------------------------------------------------------- launching


def aligned(*tensors: Tensor) -> bool:
    """Whether the compiler must be told that rows of each (..., D) begin at multiples of 16
    bytes. It sees so by itself where strides are multiples of 16, as a rule with D."""
    D = tensors[0].shape[-1]
    rows = (x.data_ptr() % 16 == 0 and not any(n % 8 for n in x.stride()[:-1]) for x in tensors)
    return D % 16 == 8 and all(rows)


def strides(*tensors: Tensor) -> list[int]:
    """Of rows and heads of each (T, heads, D), as kernels take them."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def tile(tiles: dict, D: int, dtype: torch.dtype, dropout: bool) -> dict:
    """Tile and options of a launch.

    Args:
        tiles: by the next power of 2 of D (at least 32) and bytes an element, without dropout and
            with it: BLOCK_M, BLOCK_N, warps, stages; the limit of registers, where there must be
            one; and options that are others before Hopper.
    """
    found = tiles[max(32, triton.next_power_of_2(D)), dtype.itemsize][dropout]
    names = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg", "before_hopper"
    options = {k: v for k, v in zip(names, found, strict=False) if v is not None}
    if D % 8:  # rows are loaded in small parts, each with its address: a limit would spill
        options.pop("maxnreg", None)
    if dtype == torch.float32:
        options["default_dot_input_precision"] = "tf32x3"
    return options | {"enable_fp_fusion": True}


def launch(any_kernel, grid: int, *args, before_hopper: dict | None = None, **options) -> None:
    """One program each; nothing where there is none.

    Args:
        before_hopper: options that are others on an older GPU of NVIDIA's.
    """
    if not grid:
        return
    with torch.cuda.device_of(args[0]):
        if torch.version.hip:
            options = without_nvidia(options)
        elif before_hopper and args[0].is_cuda and torch.cuda.get_device_capability() < (9, 0):
            options |= before_hopper
        any_kernel[(grid,)](*args, **options)


class Case(NamedTuple):
    """A call of attention whose launches are declared: of sequences all long or all short."""

    dtype: torch.dtype
    D: int
    short: bool = False
    GROUP: int = 1
    causal: bool = False
    dropout: bool = False

    @property
    def label(self) -> str:
        """ "bf16, D 64, short, dropout", say."""
        said = [name for name in ("short", "causal", "dropout") if getattr(self, name)]
        group = [f"GROUP {self.GROUP}"] if self.GROUP > 1 else []
        return ", ".join([_NAMES[self.dtype], f"D {self.D}", *said, *group])


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CASES = (
    Case(torch.bfloat16, 64),
    Case(torch.bfloat16, 64, short=True),
    Case(torch.bfloat16, 64, dropout=True),
    Case(torch.bfloat16, 64, dropout=True, short=True),
    Case(torch.bfloat16, 64, causal=True),
    Case(torch.bfloat16, 32, short=True),
    Case(torch.bfloat16, 32, dropout=True, short=True),
    Case(torch.bfloat16, 80, causal=True, GROUP=4),
    Case(torch.bfloat16, 40, dropout=True),
    Case(torch.bfloat16, 128),
    Case(torch.bfloat16, 256),
    Case(torch.float32, 64),
)


def declared(kernel, case: Case, options: dict) -> Launch:
    """The launch of a kernel for packed heads, whose rows begin at multiples of 16 bytes.

    Args:
        options: tile and options, as `tile` makes them.
    """
    older = options.pop("before_hopper", {})
    constexprs = {"GROUP": case.GROUP, "CAUSAL": case.causal, "D": case.D}
    constexprs["ALIGNED"] = case.D % 16 == 8
    constexprs |= {name: options[name] for name in kernel.arg_names if name in options}
    options = {name: value for name, value in options.items() if name not in constexprs}
    known = {"T": "i32", "H": "i32", "spans_ptr": "*i32:16"}
    if case.D % 16:
        known |= {name: "i32" for name in kernel.arg_names if name.endswith("_head")}
    known |= dict.fromkeys(("lse_ptr", "record_ptr"), "*fp32:16")
    drops = {"words_ptr": "*i32:16", "places_ptr": "*i32", "columns_ptr": "*i32"}
    drops |= {"threshold": "i32", "kept": "fp32"}
    if case.dropout:
        known |= drops
    else:
        constexprs |= {name: None for name in kernel.arg_names if name in drops}
    rows = f"*{_NAMES[case.dtype]}:16"
    types = [
        known.get(name, rows if name.endswith("_ptr") else "i32:16")
        for name in kernel.arg_names
        if name not in constexprs
    ]
    return Launch(case.label, kernel, " ".join(types), constexprs, options, before_hopper=older)
