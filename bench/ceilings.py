"""What this machine can do at most: bytes copied and flops of a matmul a second, cost of a launch.

    python -m bench.ceilings

Measured in the same run as the kernels, and what their floors are computed from. One JSON object.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
import triton
import triton.language as tl

from bench.measure import CpuTimer, CudaTimer, Run, Timing, fingerprint, measure

NOMINAL = {"H200": (4.8e12, 989e12)}  # bytes and dense bf16 flops a second, by the datasheet
NODES = 1000  # empty kernels in one graph


@dataclass(frozen=True)
class Ceilings:
    """Rates a second, of bytes read plus bytes written and of bf16 flops; None: not known."""

    copy: float
    matmul: float | None = None
    nominal_copy: float | None = None
    nominal_matmul: float | None = None

    def floor_ms(self, bytes: int, flops: int, nominal: bool = False) -> float | None:
        """The least time that so many bytes and flops take, each at its ceiling."""
        copy, matmul = self.copy, self.matmul
        if nominal:
            copy, matmul = self.nominal_copy, self.nominal_matmul
        if copy is None:
            return None
        return 1e3 * max(bytes / copy, flops / matmul if matmul else 0.0)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def empty_kernel(x_ptr):
    pass


def copies(size: int, device: torch.device):
    """A copy of `size` bytes, by torch and by a kernel."""
    x = torch.randn(2, size // 4, device=device)
    y = torch.empty_like(x)

    def by_torch(i: int) -> Run:
        return Run(lambda: y[i].copy_(x[i]))

    def by_triton(i: int) -> Run:
        n, block = x.shape[1], 4096
        return Run(lambda: copy_kernel[(triton.cdiv(n, block),)](x[i], y[i], n, BLOCK=block))

    return {"torch": by_torch} | ({"triton": by_triton} if device.type == "cuda" else {})


def measure_ceilings(device: torch.device, quick: bool = False, matmul: bool = True) -> Ceilings:
    """The ceilings of a device.

    Args:
        device: to measure.
        quick: smaller tensors; good for seeing that it works.
        matmul: as well; it takes the longest.
    """
    cuda = device.type == "cuda"
    size = 2**22 if quick else 2**31 if cuda else 2**28
    timer = CudaTimer(device) if cuda else CpuTimer()
    rounds = {"copies": 2, "blocks": 2 if quick else 5, "runs": 10, "timer": timer}
    timings = measure(copies(size, device), device, **rounds).values()
    best = min(t.p50 for t in timings if not t.error)
    found = Ceilings(copy=2 * size / best * 1e3)
    if matmul:
        n = 256 if quick else 8192 if cuda else 1024
        a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16)
        took = measure({"matmul": lambda i: Run(lambda: a @ b)}, device, **rounds)["matmul"]
        found = replace(found, matmul=2 * n**3 / took.p50 * 1e3)
    for name, (copy, flops) in NOMINAL.items():
        if cuda and name in torch.cuda.get_device_name(device):
            found = replace(found, nominal_copy=copy, nominal_matmul=flops)
    return found


def measure_matmuls(
    shapes: Sequence[tuple[int, int, int, int]], device: torch.device, rounds: int = 5
) -> float:
    """Milliseconds of these matmuls in bf16, back to back: the best of some rounds.

    Args:
        shapes: (count, M, N, K) of each.
    """
    made = [
        (count, torch.randn(M, K, device=device).bfloat16(), torch.randn(K, N, device=device))
        for count, M, N, K in shapes
    ]
    made = [(count, a, b.bfloat16()) for count, a, b in made]
    times = []
    for _ in range(rounds + 1):  # the first is warm-up
        synchronise(device)
        start = time.perf_counter()
        for count, a, b in made:
            for _ in range(count):
                a @ b
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_launch(device: torch.device) -> Timing:
    """A graph of NODES empty kernels: what a launch costs at least, NODES times."""
    x = torch.zeros(1, device=device)

    def make(i: int) -> Run:
        def call():
            for _ in range(NODES):
                empty_kernel[(1,)](x)

        return Run(call)

    return measure({"empty": make}, device, copies=1)["empty"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--quick", action="store_true", help="small tensors, few repetitions")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ceilings = measure_ceilings(device, args.quick)
    print(f"copy    {ceilings.copy / 1e9:10.1f} GB/s")
    print(f"matmul  {ceilings.matmul / 1e12:10.3f} TFLOP/s")
    row = asdict(ceilings)
    if device.type == "cuda":
        launch = measure_launch(device)
        row["launch_us"] = 1e3 * launch.p50 / NODES
        row["launch_in_graph"] = launch.graph
        print(f"launch  {row['launch_us']:10.2f} us, {'in a graph' if launch.graph else 'eager'}")
    print(json.dumps({**row, **fingerprint(device)}))


if __name__ == "__main__":
    main()
