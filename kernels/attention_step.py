"""One step of decoding: attention of one new token a sequence to its keys and values in a cache.

Math        For every slot s with n = lengths[s] keys in the cache, and every head:
                k[s, :, n], v[s, :, n] = k_new, v_new
                o = softmax(q K^T / sqrt(D)) V      over keys 0 : n + 1
            The cache is written in place; nobody waits for the device.

Layout      A slot is the room of one sequence. Keys of a head lie end to end, so that a program
            reads memory from end to end:
                qkv          (S, H + 2 * Hk, D)     as in attention.py, one row a slot
                k, v         (S, Hk, L, D)          L: how many keys a slot has room for
                lengths      (S,) int32             keys in the cache, the new one not counted
                out          (S, H, D)
            lengths[s] < 0: the slot is empty; its row of out is 0, and nothing is written.
            lengths[s] >= L: there is no room; its row of out is NaN, and nothing is written.
            What lies in the cache at n and beyond is never read.

Tiling      One query a head does not fill a card: keys are split. A program does one split, a
            fixed number of keys, for a key head and all GROUP = H / Hk query heads that share it:
            keys and values are read once. The first split also has the new key, from qkv, and is
            the one that writes it.

                            keys  0 ... 127 | 128 ... 255 | 256 ... 383      L = 384
                n = 300     new + # # # # # | # # # # # # | # # . . . .      3 programs a head
                n = 128     new + # # # # # | . . . . . . | . . . . . .      1, and 2 that return
                n = 0       new + . . . . . | . . . . . . | . . . . . .

            How keys are split depends on L alone, so that a slot's result is the same bits in any
            batch; the grid on S, Hk and L, so that a CUDA graph is good for all lengths.

Softmax     Within a split as in attention.py. Each leaves o_i and lse_i = m_i + log2(l_i), and with
            M = max lse_i a second kernel makes of them
                o = sum 2^(lse_i - M) o_i / sum 2^(lse_i - M)
            in their order: no atomics. Where all of L is one split there is no second kernel.

Traffic     Floor: read the keys and values once = 2 * sum(n) * Hk * D * e bytes; all else is small.
            What is left between the kernels is 8 * (D + 1) * H bytes a split, written and read: of
            128 keys in bf16 that is GROUP parts in 64. A multiply-add an element at GROUP 1, and a
            product of 16 rows on tensor cores above: bound by memory.

Source      Dao, Haziza, Massa, Sizov 2023, Flash-Decoding for long-context inference; Milakov,
            Gimelshein 2018, arXiv:1805.02867; grouped heads: Ainslie et al. 2023,
            arXiv:2305.13245.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import LOG2E, LOWEST, aligned, launch, load_rows, rows_of, store_rows
from .key_values import KeyValues
from .launch import Launch, can_launch

# ---------------------------------------------------------------- definition


def attention_step_ref(
    qkv: Tensor, cache: KeyValues, lengths: Tensor
) -> tuple[Tensor, KeyValues]:
    """The definition: one dense softmax a slot, in the dtype of `qkv`; nothing is written.

    Args:
        qkv: (S, H + 2 * Hk, D) float.
        cache: k and v (S, Hk, L, D).
        lengths: (S,) int.

    Returns:
        (S, H, D), and the cache as it is afterwards.
    """
    _, Hk, L, D = cache.k.shape
    H = qkv.shape[1] - 2 * Hk
    q, k_new, v_new = qkv.split([H, Hk, Hk], dim=1)
    k, v = cache.k.clone(), cache.v.clone()
    out = torch.zeros_like(q)
    for s, n in enumerate(lengths.tolist()):
        if n >= L:
            out[s] = math.nan
        elif n >= 0:
            k[s, :, n], v[s, :, n] = k_new[s], v_new[s]
            keys, values = (x[s, :, : n + 1].repeat_interleave(H // Hk, 0) for x in (k, v))
            probs = (torch.einsum("hd,hjd->hj", q[s], keys) / math.sqrt(D)).softmax(-1)
            out[s] = torch.einsum("hj,hjd->hd", probs, values)
    return out, KeyValues(k, v)


def check_attention_step(qkv: Tensor, cache: KeyValues, lengths: Tensor) -> None:
    """Raises ValueError when a shape, dtype or device does not fit, or a gradient is wanted."""
    k, v = cache
    if k.ndim != 4 or k.shape != v.shape or min(k.shape[1:]) < 1:
        raise ValueError(f"expected k, v (S, Hk, L, D), got {[tuple(x.shape) for x in cache]}")
    S, Hk, _, D = k.shape
    H = qkv.shape[1] - 2 * Hk if qkv.ndim == 3 else 0
    if H < 1 or H % Hk or (len(qkv), qkv.shape[2]) != (S, D):
        wanted = f"qkv ({S}, H + 2 * {Hk}, {D}), {Hk} dividing H"
        raise ValueError(f"expected {wanted}, got {tuple(qkv.shape)}")
    if lengths.shape != (S,) or lengths.dtype != torch.int32:
        found = f"{tuple(lengths.shape)}, {lengths.dtype}"
        raise ValueError(f"expected lengths ({S},) int32, got {found}")
    for x in (k, v, lengths):
        if x.device != qkv.device or (x is not lengths and x.dtype != qkv.dtype):
            wanted = f"all on {qkv.device}, the cache in {qkv.dtype}"
            raise ValueError(f"expected {wanted}, got {x.dtype}, {x.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, k, v)):
        raise ValueError("a step of decoding has no gradient: call it under torch.no_grad()")


# ------------------------------------------------------------------- kernels

# Counts do not choose the code, nor where in a longer list the lengths begin.
_COUNTS = ["L", "heads", "splits", "keys"]
jit = triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=["lengths_ptr"])


@triton.jit
def _one_query(q, k, v, first, end, D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """What a query (1, width) sees in keys first : end: m (1, 1), l (1, 1), acc (1, width).

    TILES tiles are on their way at a time. A row of a tile has a state of its own, which is joined
    with those of the others once, at the end: within the loop no thread waits for another warp.
    """
    q = q.to(tl.float32) * (D**-0.5 * LOG2E)
    row = tl.arange(0, BLOCK)[:, None]
    m = tl.full((BLOCK, 1), LOWEST, tl.float32)
    l = tl.zeros((BLOCK, 1), tl.float32)
    acc = tl.zeros((BLOCK, q.shape[1]), tl.float32)
    for start in range(first, end, BLOCK * TILES):
        tiles = ()
        for i in tl.static_range(TILES):
            tiles += (load_rows(k, start + i * BLOCK, end, BLOCK, D),)
        for i in tl.static_range(TILES):
            tiles += (load_rows(v, start + i * BLOCK, end, BLOCK, D),)
        scores = ()
        m_new = m
        for i in tl.static_range(TILES):
            s = tl.sum(q * tiles[i].to(tl.float32), 1, keep_dims=True)
            s = tl.where(start + i * BLOCK + row < end, s, -float("inf"))
            scores += (s,)
            m_new = tl.maximum(m_new, s)
        rescale = tl.exp2(m - m_new)
        l *= rescale
        acc *= rescale
        for i in tl.static_range(TILES):
            p = tl.exp2(scores[i] - m_new)
            l += p
            acc += p * tiles[TILES + i].to(tl.float32)
        m = m_new
    m_all = tl.max(m, 0, keep_dims=True)
    share = tl.exp2(m - m_all)
    return m_all, tl.sum(l * share, 0, keep_dims=True), tl.sum(acc * share, 0, keep_dims=True)


@triton.jit
def _query_group(q, k, v, first, end, D: tl.constexpr, BLOCK: tl.constexpr):
    """The same of ROWS queries, 16 at least, as products: m, l (ROWS, 1), acc (ROWS, width)."""
    c: tl.constexpr = D**-0.5 * LOG2E
    m = tl.full((q.shape[0], 1), LOWEST, tl.float32)
    l = tl.zeros((q.shape[0], 1), tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    for start in range(first, end, BLOCK):
        k_tile = load_rows(k, start, end, BLOCK, D)
        v_tile = load_rows(v, start, end, BLOCK, D)
        s = tl.dot(q, tl.trans(k_tile))
        s = tl.where(start + tl.arange(0, BLOCK)[None, :] < end, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1, keep_dims=True) * c)
        p = tl.exp2(s * c - m_new)
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(p, 1, keep_dims=True)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale)
        m = m_new
    return m, l, acc


@jit
def _split_kernel(
    qkv_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr,
    qkv_row, qkv_head, slot_stride, head_stride, key_stride, L, heads, splits, keys,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A split of a slot, for one of its `heads` key heads. Without `lse_ptr` it is the only one."""
    split, pair = tl.program_id(0) % splits, tl.program_id(0) // splits
    slot, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    length = tl.load(lengths_ptr + slot)
    fits = (length >= 0) & (length < L)
    n = tl.where(fits, length, 0)
    first = split * keys
    if (split == 0) | (first < n):
        ROWS: tl.constexpr = max(16, triton.next_power_of_2(GROUP)) if GROUP > 1 else 1
        new = tl.where((split == 0) & fits, 1, 0)  # rows of the new token that are this program's
        queries = rows_of(qkv_ptr, qkv_head, head * GROUP, qkv_row, slot, ALIGNED)
        k_row = rows_of(qkv_ptr, qkv_head, heads * GROUP + head, qkv_row, slot, ALIGNED)
        v_row = rows_of(qkv_ptr, qkv_head, heads * (GROUP + 1) + head, qkv_row, slot, ALIGNED)
        k = rows_of(k_ptr + slot * slot_stride, key_stride, 0, head_stride, head, ALIGNED)
        v = rows_of(v_ptr + slot * slot_stride, key_stride, 0, head_stride, head, ALIGNED)
        q = load_rows(queries, 0, GROUP, ROWS, D)
        k_new = load_rows(k_row, 0, new, 1, D)
        v_new = load_rows(v_row, 0, new, 1, D)
        end = tl.minimum(first + keys, n)
        if GROUP == 1:
            m, l, acc = _one_query(q, k, v, first, end, D, BLOCK, TILES)
        else:
            m, l, acc = _query_group(q, k, v, first, end, D, BLOCK)
        # The new key comes last: nobody waits for it before the others are on their way.
        store_rows(k, k_new, n, n + new, 1, D)
        store_rows(v, v_new, n, n + new, 1, D)
        s = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1, keep_dims=True)
        s = tl.where(new > 0, s * (D**-0.5 * LOG2E), -float("inf"))
        m_new = tl.maximum(m, s)
        p, rescale = tl.exp2(s - m_new), tl.exp2(m - m_new)
        l = l * rescale + p
        acc = acc * rescale + p * v_new.to(tl.float32)
        seen = l != 0
        value = acc / tl.where(seen, l, 1.0)
        value = tl.where(fits, value, tl.where(length < 0, 0.0, float("nan")))
        out = rows_of(out_ptr, splits * D, pair.to(tl.int64) * GROUP, D, split, ALIGNED)
        store_rows(out, value, 0, GROUP, ROWS, D)
        if lse_ptr is not None:
            row = tl.arange(0, ROWS)[:, None]
            lse = tl.where(seen, m_new + tl.log2(tl.where(seen, l, 1.0)), -float("inf"))
            lse = tl.where(fits, lse, 0.0)
            at = (pair.to(tl.int64) * GROUP + row) * splits + split
            tl.store(lse_ptr + at, lse, mask=row < GROUP)


@jit
def _combine_kernel(
    parts_ptr, lse_ptr, lengths_ptr, out_ptr, L, heads, splits, keys,
    ALIGNED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One of the `heads` query heads of a slot, of all its splits that had keys."""
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + pair // heads)
    end = tl.maximum(tl.cdiv(tl.where(length < L, length, 0), keys), 1)
    parts = rows_of(parts_ptr, D, pair * splits, 0, 0, ALIGNED)
    m = tl.full((1,), LOWEST, tl.float32)
    l = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, triton.next_power_of_2(D) if D > 16 else 16), tl.float32)
    for start in range(0, end, ROWS):
        i = start + tl.arange(0, ROWS)
        lse = tl.load(lse_ptr + pair * splits + i, mask=i < end, other=-float("inf"))
        part = load_rows(parts, start, end, ROWS, D)
        m_new = tl.maximum(m, tl.max(lse, 0))
        p, rescale = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        l = l * rescale + tl.sum(p, 0)
        acc = acc * rescale[:, None] + tl.sum(p[:, None] * part, 0)[None, :]
        m = m_new
    out = rows_of(out_ptr, D, pair, 0, 0, ALIGNED)
    store_rows(out, acc / l[:, None], 0, 1, 1, D)


# -------------------------------------------------------------------- public

KEYS, SPLITS = 128, 64  # a split has at least so many keys; there are at most so many splits


def _keys_of(L: int) -> int:
    """Keys of a split where there is room for L."""
    return max(KEYS, triton.next_power_of_2(triton.cdiv(L, SPLITS)))


def _tile(D: int, dtype: torch.dtype, group: int) -> dict:
    """Tile and options of the first kernel. For one query a tile is 1,024 numbers, and 8 loads of
    16 bytes a thread are on their way at a time; for a group it is 8 KiB, and the next two are on
    their way while it is multiplied."""
    width, warps = max(16, triton.next_power_of_2(D)), {"num_warps": 4, "enable_fp_fusion": True}
    if group == 1:
        return {"BLOCK": 1024 // width, "TILES": 8 // dtype.itemsize, "num_stages": 1} | warps
    block = min(max(2**13 // (width * dtype.itemsize), 16), KEYS)
    options = {"BLOCK": block, "TILES": 1, "num_stages": 3} | warps
    if dtype == torch.float32:
        options["default_dot_input_precision"] = "tf32x3"
    return options


def _combining(D: int) -> dict:
    """Tile and options of the second kernel."""
    warps = max(1, triton.next_power_of_2(D) // 64)
    return {"ROWS": 16, "num_warps": warps, "enable_fp_fusion": True}


def _check_kernel(qkv: Tensor, cache: KeyValues) -> None:
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected fp32, fp16 or bf16, got {qkv.dtype}")
    if qkv.shape[2] > 256:
        raise ValueError(f"expected heads of at most 256, got {qkv.shape[2]}")
    if not can_launch(qkv.device):
        raise ValueError(f"expected tensors on a GPU, got {qkv.device}")
    for x in (qkv, *cache):
        if x.stride(-1) != 1:
            raise ValueError(f"expected unit stride along D, got {x.stride()}: call .contiguous()")
        if x.stride(-2) > 2**24:  # within a tile an offset has 32 bits
            raise ValueError(f"expected rows at most 2^24 elements apart, got {x.stride(-2)}")
    if cache.k.stride() != cache.v.stride():
        raise ValueError(f"expected k and v alike in strides, got {[x.stride() for x in cache]}")


def attention_step_(qkv: Tensor, cache: KeyValues, lengths: Tensor) -> Tensor:
    """Attention of one new token a slot, whose key and value go into the cache. No gradient.

    Args:
        qkv: (S, H + 2 * Hk, D) fp32, fp16 or bf16: heads of q, then of k, then of v. Unit stride
            along D, any strides of rows and heads. D up to 256.
        cache: k and v (S, Hk, L, D) in the dtype of qkv, alike in their strides; is written to.
        lengths: (S,) int32 on the device: how many keys a slot has already; below 0 it is empty.

    Returns:
        (S, H, D) in the dtype of qkv: 0 for an empty slot, NaN where there is no room.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or a gradient is wanted.
    """
    check_attention_step(qkv, cache, lengths)
    _check_kernel(qkv, cache)
    S, Hk, L, D = cache.k.shape
    H = qkv.shape[1] - 2 * Hk
    lengths = lengths.contiguous()
    out = qkv.new_empty(S, H, D)
    keys = _keys_of(L)
    splits = triton.cdiv(L, keys)
    parts, lse = out, None
    if splits > 1:
        parts = qkv.new_empty(S, H, splits, D, dtype=torch.float32)
        lse = qkv.new_empty(S, H, splits, dtype=torch.float32)
    strides = *qkv.stride()[:2], *cache.k.stride()[:3]
    shape = {"ALIGNED": aligned(qkv, *cache, parts, out), "D": D}
    tile = {"GROUP": H // Hk} | _tile(D, qkv.dtype, H // Hk)
    tensors, counts = (qkv, *cache, lengths, parts, lse), (L, Hk, splits, keys)
    launch(_split_kernel, S * Hk * splits, *tensors, *strides, *counts, **shape, **tile)
    if splits > 1:
        tensors, counts = (parts, lse, lengths, out), (L, H, splits, keys)
        launch(_combine_kernel, S * H, *tensors, *counts, **shape, **_combining(D))
    return out


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CASES = (  # dtype, D, GROUP, whether there is more than one split
    *(("bf16", 64, 1, True), ("bf16", 64, 1, False), ("bf16", 64, 4, True), ("bf16", 128, 4, True)),
    *(("bf16", 40, 1, True), ("bf16", 256, 8, True), ("fp32", 64, 1, True), ("fp32", 64, 4, True)),
)


def _declared(kernel, label: str, types: str, D: int, options: dict, **constexprs) -> Launch:
    names = [name for name in kernel.arg_names if name in options]
    constexprs |= {"ALIGNED": D % 16 == 8, "D": D} | {name: options.pop(name) for name in names}
    return Launch(label, kernel, types + 4 * " i32", constexprs, options)


def _declared_split(dtype: str, D: int, group: int, several: bool) -> Launch:
    rows, head = f"*{dtype}:16", "i32:16" if D % 16 == 0 else "i32"
    to = "*fp32:16 *fp32:16" if several else rows
    types = f"{rows} {rows} {rows} *i32 {to} i32:16 {head} i32:16 i32:16 {head}"
    label = f"{dtype}, D {D}, GROUP {group}" + ("" if several else ", one split")
    constexprs = {"GROUP": group} | ({} if several else {"lse_ptr": None})
    options = _tile(D, _DTYPES[dtype], group)
    return _declared(_split_kernel, label, types, D, options, **constexprs)


def _declared_combine(dtype: str, D: int) -> Launch:
    types = f"*fp32:16 *fp32:16 *i32 *{dtype}:16"
    return _declared(_combine_kernel, f"{dtype}, D {D}", types, D, _combining(D))


LAUNCHES = (
    *(_declared_split(*case) for case in _CASES),
    *(_declared_combine(*case) for case in dict.fromkeys(case[:2] for case in _CASES)),
)
