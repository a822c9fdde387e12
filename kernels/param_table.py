"""Where all parameters lie: one table in device memory, so that one launch finds every tensor.

                         WEIGHT  GRAD  MEAN  SQUARE  MASTER  STEP  KIND  NUMEL  FIRST  GROUP
    parameter 0             .      .     .      .       .      .     0    5000      0      0
    parameter 1             .      0     .      .       .      .     0       7      3      0
    parameter 2             .      .     .      .       .      .     1    2048      4      1
                          addresses, 0: none; GRAD 0: this step     |   elements,  group
                          leaves the parameter as it is           dtype first chunk

    chunk        0  1  2  3  4        A chunk is BLOCK elements of one parameter; the last one of
    owner        0  0  0  1  2        a parameter may be shorter. A program updates one chunk, or
                                      adds up the squares of SPAN gradients' chunks.

Parameters keep their own storage. Owners and sizes are made when the set of parameters changes;
addresses when one of them does, which is seldom, as allocators hand out the same blocks again.
A captured CUDA graph reads its own addresses for as long as it lives: `write_captured`.
"""

import torch
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a chunk
SPAN = 8  # chunks that one program adds up: one alone, 4 KB of bf16, would be all latency
COLUMNS = tl.constexpr(10)
WEIGHT = tl.constexpr(0)
GRAD = tl.constexpr(1)
MEAN = tl.constexpr(2)
SQUARE = tl.constexpr(3)
MASTER = tl.constexpr(4)  # of an fp32 parameter: the weight itself
STEP = tl.constexpr(5)
KIND = tl.constexpr(6)
NUMEL = tl.constexpr(7)
FIRST = tl.constexpr(8)
GROUP = tl.constexpr(9)

FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
FP16 = tl.constexpr(2)
KINDS = {torch.float32: FP32.value, torch.bfloat16: BF16.value, torch.float16: FP16.value}

CAPTURES = 64  # captured steps that a set of parameters has room for


class ParamTable:
    """The table of one list of parameters, and what kernels need beside it."""

    def __init__(self, params: list[Tensor], groups: list[int], device: torch.device) -> None:
        """Makes owners and sizes; `write` fills in the addresses.

        Args:
            params: P of them, or their gradients: only their sizes matter here.
            groups: (P,) the group of each.
            device: where the table lies.
        """
        numel = torch.tensor([local(p).numel() for p in params], dtype=torch.int64)
        chunks = (numel + BLOCK - 1) // BLOCK
        first = chunks.cumsum(0) - chunks
        owners = torch.arange(len(params), dtype=torch.int32).repeat_interleave(chunks)
        self.params, self.device, self.chunks = params, device, len(owners)
        self.sizes = torch.stack((numel, first, torch.tensor(groups, dtype=torch.int64)), 1)
        self.owners = upload(owners, device)                             # (chunks,) int32
        self.rows = torch.empty(len(params), COLUMNS.value, dtype=torch.int64, device=device)
        self.partials = torch.empty(-(-self.chunks // SPAN), device=device)  # sums of SPAN chunks
        self.key = None  # what `rows` were written for; compared by the one who writes
        self._spare: list[tuple[Tensor, Tensor]] = []
        self._captured: list[tuple] = []

    def write(self, addresses: list[tuple[int, ...]]) -> None:
        """Puts new addresses into `rows`: for each parameter the columns WEIGHT to KIND."""
        self.key, self._written = None, self._host(addresses)
        self.rows.copy_(upload(self._written, self.device), non_blocking=True)

    def write_grads(self, addresses: list[int]) -> None:
        """Puts other addresses into the column GRAD, if they are others."""
        column = torch.tensor(addresses, dtype=torch.int64)
        if not torch.equal(column, self._written[:, GRAD.value]):
            self._written[:, GRAD.value] = column
            self.rows.copy_(upload(self._written, self.device), non_blocking=True)

    def reserve(self) -> None:
        """Makes room for captures. Not in a capture, where memory is not ours to take."""
        if len(self._spare) < CAPTURES:
            shape, pinned = (CAPTURES - len(self._spare), *self.rows.shape), self.rows.is_cuda
            host = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
            self._spare += zip(host, torch.empty_like(host, device=self.device), strict=True)

    def write_captured(self, addresses: list[tuple[int, ...]], alive: list[Tensor]) -> Tensor:
        """Rows for one captured step: every replay copies them again from the same host memory.

        Args:
            addresses: as in `write`.
            alive: tensors that the addresses name; they are kept for good, as the rows are.

        Raises:
            RuntimeError: no room is left, or none was made before the capture.
        """
        if not self._spare:
            raise RuntimeError(
                f"expected at most {CAPTURES} captured steps in a row, after one that is not: "
                "take a step, or call prepare(), before the capture"
            )
        host, rows = self._spare.pop()
        host.copy_(self._host(addresses))
        rows.copy_(host, non_blocking=True)
        self._captured.append((host, rows, alive))
        return rows

    @property
    def captured(self) -> bool:
        """Whether a graph reads this table's memory."""
        return bool(self._captured)

    def _host(self, addresses):
        known = torch.tensor(addresses, dtype=torch.int64).view(len(self.params), KIND.value + 1)
        return torch.cat((known, self.sizes), 1)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched there now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that waits for nothing: torch keeps pinned memory until it is read."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def local(tensor: Tensor) -> Tensor:
    """What lies on this device: the local shard of a DTensor, whose own address is 0."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether elements fill their stretch of memory once, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold their elements in the same order."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def like(param: Tensor, value: Tensor) -> Tensor:
    """`value` in fp32, on the device and in the order of `param`: itself where it is that.

    Raises:
        ValueError: it has another shape.
    """
    if value.shape != param.shape:
        wanted, got = tuple(param.shape), tuple(value.shape)
        raise ValueError(f"expected a tensor of the parameter's shape {wanted}, got {got}")
    here, there = local(param), local(value)
    fits = (there.dtype, there.device) == (torch.float32, here.device) and same_order(here, there)
    return value if fits else torch.empty_like(param, dtype=torch.float32).copy_(value)
