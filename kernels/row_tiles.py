"""Rows in registers: how a kernel that norms rows of C columns holds them.

Tiling      A tile is powers of two wide, C is not: 768 columns in one tile of 1024 waste a quarter
            of all lanes. So a row is cut into equal chunks, and a kernel holds a tuple of tiles:

                |    CHUNK    |    CHUNK    |    CHUNK    |        768 = 3 x 256
                  a warp's: 32 lanes x 16 bytes of bf16

            Up to 256 columns of bf16, a chunk lies in one warp or less. Then a row does, sums over
            columns are shuffles, and no warp waits for another. Wider rows take wider chunks, of
            several warps.

            What there is a column of (weights, words) is read as a tile too, the same for each of
            its rows: so it has the layout of the rows, and nothing is exchanged.
"""

import functools

import triton
import triton.language as tl

WIDEST = 8192  # columns: a row beyond has no place in the registers of a program


@functools.cache  # triton's own arithmetic takes microseconds a call
def row_tile(C: int, element_size: int, chunks: int) -> tuple[dict[str, int], int]:
    """The constexprs of a kernel over C columns, in at most so many chunks; and its warps."""
    narrow = [n for n in (256, 128, 64, 32, 16) if triton.cdiv(C, n) <= chunks]
    if narrow:
        chunk = min(narrow, key=lambda n: triton.cdiv(C, n) * n)  # the least beyond C
    else:
        chunk = triton.next_power_of_2(triton.cdiv(C, chunks))
    warps = min(16, max(4, chunk * element_size // 512))
    rows = max(1, warps * 512 // (chunk * element_size))
    return {"C": C, "ROWS": rows, "CHUNK": chunk}, warps


@triton.jit
def load_chunk(ptr, at, i, C: tl.constexpr, CHUNK: tl.constexpr, exists=None):
    """Columns i to i + CHUNK of the rows that begin at `at` (ROWS, 1) and exist; 0 elsewhere."""
    c = i + tl.arange(0, CHUNK)[None, :]
    if exists is not None:
        mask = exists if i + CHUNK <= C else exists & (c < C)
        return tl.load(ptr + (at + c), mask=mask, other=0)
    elif i + CHUNK <= C:
        return tl.load(ptr + (at + c))
    else:
        return tl.load(ptr + (at + c), mask=c < C, other=0)


@triton.jit
def load_rows(ptr, at, exists, C: tl.constexpr, CHUNK: tl.constexpr):
    """All chunks of rows, as they are stored; none where there is no pointer."""
    chunks = ()
    if ptr is not None:
        for i in tl.static_range(0, C, CHUNK):
            chunks += (load_chunk(ptr, at, i, C, CHUNK, exists),)
    return chunks


@triton.jit
def store_chunk(ptr, at, x, exists, i, C: tl.constexpr, CHUNK: tl.constexpr):
    """Where there is a pointer: columns i to i + CHUNK of the rows that exist."""
    if ptr is not None:
        c = i + tl.arange(0, CHUNK)[None, :]
        mask = exists if i + CHUNK <= C else exists & (c < C)
        tl.store(ptr + (at + c), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def total(chunks):
    """The sum over columns: (ROWS, 1)."""
    x = chunks[0]
    for i in tl.static_range(1, len(chunks)):
        x += chunks[i]
    return tl.sum(x, 1)[:, None]
