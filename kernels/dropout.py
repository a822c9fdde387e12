"""Dropout masks as a function of where an element stands, never of a stream.

Math        An element has a row (an example and a position in it), a column, and a place in the
            model (a site and a head). Philox names each of them once a step, multiply-adds do the
            rest:

                r0, r1, r2, r3 = Philox(seed; position, example, step, ROW)      four words a row
                u              = Philox(seed; head, site, step, PLACE)           a word a place
                x              = Philox(seed; column, 0, step, COLUMN)           a word a column
                a, b           = r0 * u + r1,   r2 * u + r3                      mod 2^32
                word           = a * x + b                                       mod 2^32
                keep           = word >= p * 2^32;   kept values are divided by 1 - p

            r is uniform, so a word is, and so is the pair of words of two elements of a row, but
            for as many low bits as the difference of their columns (or places) ends in zeros: a
            few, of 32. Rows are independent. The kept fraction is exact to 2^-32. An element costs
            a multiply-add and a compare; Philox, 10 rounds, runs once a step for T rows.

            Kernels take the two words of a row from `words_of` and ask `keeps` for each element.

Why         The mask of a token depends on nothing beside it: not on the batch it is packed into,
            on accumulation, ranks, tiles, or on how often a run was stopped and resumed. Forward
            and backward compute the same bits again, or keep them, as they like.

Traffic     16 bytes a row, 4 a column, made once a step by one launch and read by whatever kernel
            drops. No mask need be stored. `drop` alone: 2*T*C*e.

Source      Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
            Multiply-add hashing: Dietzfelbinger et al. 1997, "A reliable randomized algorithm for
            the closest-pair problem"; over several words: Lemire & Kaser 2014, arXiv:1202.4961.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Launch, can_launch

WORD = 0xFFFFFFFF
# The last counter word: what is named.
ROW, PLACE, COLUMN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Draw(NamedTuple):
    """What names all masks of a step, besides the rows."""

    seed: Tensor  # () int64
    step: Tensor  # () int64 in [0, 2**32): the optimizer step


@dataclass(frozen=True, eq=False)
class Dropout:
    """How one place in the model drops. Made for a step by `draw_dropout`, moved with `at`."""

    p: float         # probability of being dropped, in [0, 1)
    site: int        # which dropout of the model this is
    rows: Tensor     # (T, 4) int32: r0 to r3 of each row
    columns: Tensor  # (N,) int32: x of each column; a place uses the first of them
    places: Tensor   # (sites, heads) int32: u of each place

    def at(self, site: int, p: float, rows: Tensor | None = None) -> "Dropout | None":
        """This dropout at another site; `rows` (M,) int64 picks rows. None when `p` is 0."""
        picked = self.rows if rows is None else self.rows.index_select(0, rows)
        return replace(self, p=p, site=site, rows=picked) if p else None


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10 in int64 arithmetic.

    Args:
        seed: () int64; its low and high words are the key.
        counter: (4, N) int64, words in [0, 2**32).

    Returns:
        (4, N) int64, words in [0, 2**32).
    """
    multiplier = torch.tensor([[0xD2511F53], [0xCD9E8D57]], device=counter.device)
    weyl = torch.tensor([[0x9E3779B9], [0xBB67AE85]], device=counter.device)
    key = torch.stack((seed, seed >> 32))[:, None] & WORD
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        product = even * multiplier  # wraps past 2**63; both halves are right all the same
        even, odd = ((product >> 32) & WORD).flip(0) ^ odd ^ key, (product & WORD).flip(0)
        key = (key + weyl) & WORD
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def draw_dropout_ref(draw: Draw, key: Tensor, columns: int, sites: int, heads: int) -> Dropout:
    """The definition: the words of all rows, columns and places of a step.

    Args:
        draw: seed and step.
        key: (T,) int64: number of the example in its step << 32 | position in its sequence.
        columns: as many as the widest place has: channels, or positions of keys.
        sites, heads: how many places the model has.

    Returns:
        A Dropout with p = 0, to be moved with `at`.
    """
    column, place = (torch.arange(n, device=key.device) for n in (columns, sites * heads))
    parts = (
        (key & WORD, key >> 32, ROW.value),
        (place % heads, place // heads, PLACE.value),
        (column, torch.zeros_like(column), COLUMN.value),
    )
    low, high = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    kind = torch.cat([torch.full_like(part[0], part[2]) for part in parts])
    words = philox(draw.seed, torch.stack((low, high, draw.step.expand(len(low)), kind)))
    rows, places, x = words.to(torch.int32).split([len(key), sites * heads, columns], dim=1)
    return Dropout(0.0, 0, rows.T.contiguous(), x[0], places[0].view(sites, heads))


def row_words(dropout: Dropout) -> tuple[Tensor, Tensor]:
    """(a, b) of the header at this dropout's site: (T, heads) int32 each, wrapped."""
    u, r = dropout.places[dropout.site], dropout.rows[:, :, None]
    return r[:, 0] * u + r[:, 1], r[:, 2] * u + r[:, 3]


def threshold(p: float) -> int:
    """The smallest kept word, moved to int32: `word - 2**31 >= threshold` in signed arithmetic."""
    return min(round(p * 2**32), WORD) - 2**31


def dropout_keep(dropout: Dropout, columns: int) -> Tensor:
    """The mask itself, for tests and definitions: (T, heads, columns) bool, True where it stays.

    A place without heads is head 0 of its site.
    """
    a, b = (w.long()[..., None] for w in row_words(dropout))
    words = (a * dropout.columns[:columns].long() + b) & WORD
    return words >= round(dropout.p * 2**32)


def dropout_ref(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """The definition: x (T, C) where `keep` (T, C) is True, over 1 - p; 0 elsewhere."""
    return x if keep is None else x * keep / (1 - p)


# ------------------------------------------------------------------- kernels


@triton.jit
def place_of(places_ptr, head):
    """The word that names a head at this site; 0 where nothing is dropped."""
    if places_ptr is None:
        return 0
    else:
        return tl.load(places_ptr + head)


@triton.jit
def words_of(rows_ptr, place, row, inside):
    """The words a and b of rows. b is moved by 2^31, so that a signed comparison with `threshold`
    does what an unsigned one with p * 2^32 would."""
    r_ptr = rows_ptr + row * 4
    r0, r1 = tl.load(r_ptr, mask=inside, other=0), tl.load(r_ptr + 1, mask=inside, other=0)
    r2, r3 = tl.load(r_ptr + 2, mask=inside, other=0), tl.load(r_ptr + 3, mask=inside, other=0)
    return r0 * place + r1, (r2 * place + r3) ^ -2147483648


@triton.jit
def keeps(a, b, x, threshold):
    """Whether elements stay, of rows with words a and b, and columns with the word x."""
    return a * x + b >= threshold


# Where the words of a place lie depends on the site: their address chooses no code. The words of
# columns come after those of rows, at a multiple of 16 bytes: they are loaded as wide as rows are.
jit = triton.jit(
    do_not_specialize="T heads places columns threshold".split(),
    do_not_specialize_on_alignment="seed_ptr step_ptr places_ptr".split(),
)


@jit
def _draw_kernel(
    key_ptr, seed_ptr, step_ptr,        # (T,), () and () int64
    rows_ptr, places_ptr, columns_ptr,  # (T, 4), (places,) and (columns,) int32
    T, heads, places, columns,
    BLOCK: tl.constexpr,
):
    """Philox of BLOCK of them: rows first, then places, then columns."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place, column = i - T, i - T - places
    is_row, is_place = i < T, (i >= T) & (column < 0)
    key = tl.load(key_ptr + i, mask=is_row, other=0)
    low = tl.where(is_row, key, tl.where(is_place, place % heads, column)).to(tl.uint32)
    high = tl.where(is_row, key >> 32, tl.where(is_place, place // heads, 0)).to(tl.uint32)
    kind = tl.where(is_row, ROW, tl.where(is_place, PLACE, COLUMN)).to(tl.uint32)
    step = tl.load(step_ptr).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), low, high, low * 0 + step, kind)
    word = r0.to(tl.int32, bitcast=True)
    tl.store(places_ptr + place, word, mask=is_place)
    tl.store(columns_ptr + column, word, mask=(column >= 0) & (column < columns))
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK, 4).to(tl.int32, bitcast=True)
    at = i.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(rows_ptr + at, words, mask=is_row[:, None])


@jit
def _drop_kernel(
    x_ptr, y_ptr, rows_ptr, places_ptr, columns_ptr,  # (T, C), (T, C), (T, 4), (heads,), (C,)
    T, C, stride, threshold, kept,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y is x where it stays, times `kept`, in a tile of BLOCK_T x BLOCK_C."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < T)[:, None] & (c < C)[None, :]
    a, b = words_of(rows_ptr, place_of(places_ptr, 0), t, t < T)
    column = tl.load(columns_ptr + c, mask=c < C, other=0)
    keep = keeps(a[:, None], b[:, None], column[None, :], threshold)
    row = t.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.where(keep, x * kept, 0.0)
    tl.store(y_ptr + row * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------ autograd

DRAW, DROP = {"BLOCK": 128}, {"BLOCK_T": 8, "BLOCK_C": 256}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def draw_dropout(draw: Draw, key: Tensor, columns: int, sites: int, heads: int) -> Dropout:
    """See `draw_dropout_ref`: the same bits, in one launch.

    Raises:
        ValueError: the tensors are not int64 on one GPU.
    """
    tensors = key, draw.seed, draw.step
    if any(x.dtype != torch.int64 or x.device != key.device for x in tensors) or key.ndim != 1:
        said = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in tensors)
        raise ValueError(f"expected key (T,), seed and step in int64 on one device, got {said}")
    if not can_launch(key.device):
        raise ValueError(f"expected a key on a GPU, got {key.device}")
    T, places = len(key), sites * heads
    words = torch.empty(4 * T + columns + places, dtype=torch.int32, device=key.device)
    rows, x, u = words.split([4 * T, columns, places])
    total = T + places + columns
    if total:
        with torch.cuda.device_of(key):
            _draw_kernel[(triton.cdiv(total, DRAW["BLOCK"]),)](
                key.contiguous(), draw.seed, draw.step, rows, u, x, T, heads, places, columns,
                **DRAW, **OPTIONS,
            )
    return Dropout(0.0, 0, rows.view(T, 4), x, u.view(sites, heads))


def check_dropout(dropout: Dropout | None, rows: int, columns: int, heads: int = 1) -> None:
    """Raises ValueError when it is not one for so many rows, columns and heads."""
    if dropout is None:
        return
    if not isinstance(dropout, Dropout):
        raise ValueError(f"expected draw_dropout(...).at(site, p), got {dropout!r}")
    wanted = rows, columns, heads
    got = len(dropout.rows), len(dropout.columns), dropout.places.shape[1]
    if got[0] != wanted[0] or got[1] < wanted[1] or got[2] < wanted[2]:
        raise ValueError(f"expected dropout of (rows, columns, heads) {wanted}, got {got}")


def dropout_arguments(dropout: Dropout | None) -> tuple:
    """Of a launch: pointers to the words of rows, of the place and of columns; threshold, kept."""
    if dropout is None:
        return (None,) * 5
    places = dropout.places[dropout.site]
    return dropout.rows, places, dropout.columns, threshold(dropout.p), 1 / (1 - dropout.p)


def _launch_drop(x: Tensor, dropout: Dropout) -> Tensor:
    T, C = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(T, C)
    rows, places, columns, lowest, kept = dropout_arguments(dropout)
    if y.numel():
        grid = triton.cdiv(T, DROP["BLOCK_T"]), triton.cdiv(C, DROP["BLOCK_C"])
        with torch.cuda.device_of(x):
            _drop_kernel[grid](
                x, y, rows, places, columns, T, C, x.stride(0), lowest, kept, **DROP, **OPTIONS
            )
    return y


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return _launch_drop(x, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return _launch_drop(dy, ctx.dropout), None


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """See `dropout_ref`: (T, C) in fp32, bf16 or fp16, head 0 of its site. None drops nothing.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if dropout is None:
        return x
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected (T, C) in fp32, fp16 or bf16, got {tuple(x.shape)} {x.dtype}")
    if not can_launch(x.device):
        raise ValueError(f"expected x on a GPU, got {x.device}")
    check_dropout(dropout, *x.shape)
    return _Drop.apply(x, dropout)


_WORDS = "*i32:16 *i32 *i32:16"
LAUNCHES = (
    Launch(
        "", _draw_kernel, f"*i64:16 *i64 *i64 {_WORDS} i32 i32 i32 i32",
        DRAW, OPTIONS, streams=False,
    ),
    *(
        Launch(
            dtype, _drop_kernel, f"*{dtype}:16 *{dtype}:16 {_WORDS} i32 i32:16 i32:16 i32 fp32",
            DROP, OPTIONS,
        )
        for dtype in ("bf16", "fp32")
    ),
)
