"""Memory for the gradients of embedding tables, kept from step to step.

Why         The gradient of a table has R rows, of which a batch touches a few hundred; the others
            are 0. To write those zeros anew every step is 4*R*C bytes: 95 MB of BERT-base, as much
            as all the rest of embed's gradient at T = 4,096; on a CPU, where each step's memory is
            new to the process, 34 ms for 30,522 words of 384. Here they are written once. The
            optimizer sees all rows as ever: what was never touched has gradients and moments of 0.

Life        take     a backward pass gets gradients that are 0, and adds to the rows of its ids
            settle   before the optimizer: whether anybody else has written to them since, such as
                     a second micro-batch that was added, or a hook
            clear    after it, when `grad` is None again: 0 in the rows of those ids; everywhere, if
                     somebody else wrote

            Between take and clear the memory is taken: who asks for gradients then gets new ones.
            Who keeps `p.grad` beyond the step sees it change: clone it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .embed_order import PIECE, EmbedOrder
from .launch import Launch

CLEAR = {"BLOCK_C": 256, "num_warps": 1, "enable_fp_fusion": True}
PROGRAMS = 1024  # that share the ids of a table


@triton.jit
def _clear(ids_ptr, order_ptr, dtable_ptr, R, T, C, PIECE: tl.constexpr, BLOCK_C: tl.constexpr):
    """0 in the program's share of the rows whose ids occur: those of first pieces."""
    rows_ptr = order_ptr + 1
    pieces_ptr = rows_ptr + T + 2 * tl.cdiv(T, PIECE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    zeros = tl.zeros((BLOCK_C,), dtable_ptr.dtype.element_ty)
    for p in range(tl.program_id(0), tl.load(order_ptr), tl.num_programs(0)):
        word = tl.load(pieces_ptr + p)
        i = tl.load(ids_ptr + tl.load(rows_ptr + word // 4))
        known = (i >= 0) & (i < R)
        row_ptr = dtable_ptr + tl.where(known, i, 0) * C
        tl.store(row_ptr + c, zeros, mask=(c < C) & known & (word & 1 != 0))
    return 0


@triton.jit(
    do_not_specialize="R0 R1 R2 R3 T".split(),
    do_not_specialize_on_alignment=(
        "ids0_ptr ids1_ptr ids2_ptr ids3_ptr order0_ptr order1_ptr order2_ptr order3_ptr"
    ).split(),
)
def _clear_kernel(
    ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr,
    order0_ptr, order1_ptr, order2_ptr, order3_ptr,
    dtable0_ptr, dtable1_ptr, dtable2_ptr, dtable3_ptr,
    R0, R1, R2, R3, T, C,
    PIECE: tl.constexpr, BLOCK_C: tl.constexpr,
):
    ids = (ids0_ptr, ids1_ptr, ids2_ptr, ids3_ptr)
    orders = (order0_ptr, order1_ptr, order2_ptr, order3_ptr)
    dtables = (dtable0_ptr, dtable1_ptr, dtable2_ptr, dtable3_ptr)
    R = (R0, R1, R2, R3)
    for k in tl.static_range(4):
        if dtables[k] is not None:  # noqa: SIM102, known to the compiler and not the other
            if tl.program_id(2) == k:
                _clear(ids[k], orders[k], dtables[k], R[k], T, C, PIECE, BLOCK_C)


def four(values) -> tuple:
    """With None for each table that there is not."""
    return (*values, *[None] * (4 - len(values)))


@dataclass(frozen=True)
class _Taken:
    ids: tuple[Tensor, ...]
    order: EmbedOrder | None
    parts: list[Tensor | None]
    version: int


class TableGradients:
    """The gradients of the tables of one model, for whoever calls backward, `settle`, the optimizer
    and `clear` in turn. Hand it over in `EmbedOrder.gradients`."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._taken: _Taken | None = None
        self._others = False  # somebody else wrote

    def take(
        self, tables: tuple[Tensor, ...], needed: tuple[bool, ...], ids: tuple[Tensor, ...],
        order: EmbedOrder | None,
    ) -> list[Tensor | None]:
        """Gradients for `needed` ones of `tables`, all 0; new ones if the last were not cleared.

        Args:
            ids, order: of the rows that will be written. Without order, only on a CPU.
        """
        if self._taken is not None:
            return zeros(tables, needed)
        size, like = sum(_sizes(tables, needed)), tables[0]
        memory = self._memory
        if memory is None or (len(memory), memory.dtype, memory.device) != (
            size, like.dtype, like.device
        ):
            self._memory = like.new_zeros(size)
        parts = _parts(self._memory, tables, needed)
        self._taken = _Taken(ids, order, parts, self._memory._version)
        return _parts(self._memory, tables, needed)  # autograd takes only what nobody else holds

    def settle(self) -> None:
        """Notes whether anybody has written to them beside the backward pass, until now. What the
        optimizer does afterwards, such as clipping, leaves zeros as they are."""
        if self._taken is not None:
            self._others |= self._memory._version != self._taken.version

    @torch.no_grad()
    def clear(self) -> None:
        """All 0 again."""
        taken, self._taken = self._taken, None
        if taken is not None and self._others:
            self._memory.zero_()
        elif taken is not None and self._memory.device.type == "cpu" and taken.order is None:
            for part, i in zip(taken.parts, taken.ids, strict=True):
                if part is not None:
                    part[i] = 0
        elif taken is not None:
            _launch_clear(taken)
        self._others = False


def _launch_clear(taken: _Taken) -> None:
    live = [k for k, part in enumerate(taken.parts) if part is not None]
    parts, ids = [taken.parts[k] for k in live], [taken.ids[k] for k in live]
    T, C = len(ids[0]), parts[0].shape[1]
    if not T:
        return
    lines = [taken.order.words[taken.order.lines[k]] for k in live]
    grid = min(T, PROGRAMS), triton.cdiv(C, CLEAR["BLOCK_C"]), len(live)
    with torch.cuda.device_of(parts[0]):
        _clear_kernel[grid](
            *four(ids), *four(lines), *four(parts), *four([len(x) for x in parts]), T, C, PIECE,
            **CLEAR,
        )


def _sizes(tables, needed):
    """Elements of each gradient, in whole units of 16 bytes."""
    C = tables[0].shape[1]
    return [triton.cdiv(len(x) * C, 16) * 16 for x, n in zip(tables, needed, strict=True) if n]


def _parts(memory, tables, needed):
    C, parts = tables[0].shape[1], iter(memory.split(_sizes(tables, needed)))
    return [
        next(parts)[: len(x) * C].view(len(x), C) if need else None
        for x, need in zip(tables, needed, strict=True)
    ]


def zeros(tables: tuple[Tensor, ...], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients of the tables that need one, 0, side by side in memory: one fill."""
    return _parts(tables[0].new_zeros(sum(_sizes(tables, needed))), tables, needed)


def _launches():
    tables = {2: "two tables", 3: "three tables"}
    for K, label in tables.items():
        types = [*["*i64"] * K, *["*i32"] * K, *["*fp32:16"] * K, *["i32"] * K, "i32", "i32:16"]
        names = [f"{name}{k}" for k in range(K, 4) for name in ("ids", "order", "dtable")]
        absent = [f"{name}_ptr" for name in names] + [f"R{k}" for k in range(K, 4)]
        constexprs = {"PIECE": PIECE, "BLOCK_C": CLEAR["BLOCK_C"]} | dict.fromkeys(absent)
        options = {name: CLEAR[name] for name in ("num_warps", "enable_fp_fusion")}
        yield Launch(label, _clear_kernel, " ".join(types), constexprs, options, streams=False)


LAUNCHES = tuple(_launches())
