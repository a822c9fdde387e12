"""Times several contenders of one operation side by side, on a GPU or on a CPU.

    timings = measure({"torch": lambda i: Run(lambda: x[i].softmax(-1)), ...}, device)

A contender makes one run for each copy of the inputs. What makes the numbers comparable:

- blocks of runs in turn (A B C A B C ...): a slow minute of the machine hits all of them
- no input is in the cache: copies are used in rotation, and the cache is flushed before every run
- a canary, an operation of fixed size, is timed between all blocks; a block beside a canary that
  took 1.5 times its usual time or more is thrown away, and counted
- on a GPU a run is captured in a CUDA graph and replayed, as in training; where that cannot be, it
  is launched from Python, and the reason is kept
- medians with the 20th and 80th percentile, of the runs that count
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
SLOW = 1.5  # times the canary's median: the machine was busy with something else
WARM_UP = 3
FEWEST = 3  # runs in a block


@dataclass(frozen=True)
class Run:
    """One timed call on one copy of the inputs."""

    call: Callable[[], object]
    reset: Callable[[], object] | None = None  # untimed, before each call: undoes what a call did
    keep: object = None  # what must live as long as this, such as the tensors of a graph
    shaped: Callable | None = None  # untimed: what the call returned, shaped as the definition's


@dataclass(frozen=True)
class Prepared:
    """A contender, warm: a run for each copy of the inputs."""

    runs: list[Run]
    graph: bool = False
    reason: str = ""  # why it is not a graph


@dataclass(frozen=True)
class Block:
    """The runs of a contender between two canaries, in milliseconds."""

    times: list[float]
    canary: float  # the slower one


@dataclass(frozen=True)
class Timing:
    """What a contender took, in milliseconds."""

    p20: float
    p50: float
    p80: float
    runs: int  # those that count
    blocks: int  # those that were timed
    thrown_away: int
    trusted: bool  # at least half of the blocks count
    graph: bool
    reason: str = ""  # why it is not a graph
    error: str = ""  # what it raised; then there are no times


def measure(
    contenders: dict[str, Callable[[int], Run]],
    device: torch.device,
    *,
    copies: int = 3,
    blocks: int = 5,
    runs: int = 20,
    block_ms: float = 50.0,
    timer: "CpuTimer | CudaTimer | None" = None,
) -> dict[str, Timing]:
    """Times every contender; one that raises is reported, and the others go on.

    Args:
        contenders: by name, in the order of their turns: number of a copy -> its run.
        device: where the runs compute.
        copies: of the inputs.
        blocks: for each contender.
        runs: in a block, at most.
        block_ms: a block of slow runs has fewer of them, so as to take about this long.
        timer: what times; default: the one of `device`.
    """
    timer = timer or (CudaTimer(device) if device.type == "cuda" else CpuTimer())
    prepared: dict[str, Prepared] = {}
    sizes, errors = {}, {}
    with timer.session():
        for name, make in contenders.items():
            try:
                ready = timer.prepare(make, copies)
                pilot = timer.block([ready.runs[0]] * 2)[-1]
            except Exception as error:  # a peer may raise anything; the others are still wanted
                errors[name] = one_line(error)
                continue
            prepared[name] = ready
            sizes[name] = max(FEWEST, min(runs, int(block_ms / max(pilot, 1e-6))))
        timed, canaries = in_turn(timer, prepared, sizes, blocks)
    limit = SLOW * statistics.median(canaries)
    return {
        name: summarise(timed[name], limit, prepared[name])
        if name in prepared
        else failed(errors[name])
        for name in contenders
    }


def in_turn(
    timer, prepared: dict[str, Prepared], sizes: dict[str, int], blocks: int
) -> tuple[dict[str, list[Block]], list[float]]:
    """Blocks of all contenders in turn, a canary between any two; and all canaries."""
    canaries = [timer.canary()]
    timed: dict[str, list[Block]] = {name: [] for name in prepared}
    for b in range(blocks):
        for name, ready in prepared.items():
            first = b * sizes[name]
            times = timer.block(
                [ready.runs[(first + i) % len(ready.runs)] for i in range(sizes[name])]
            )
            canaries.append(timer.canary())
            timed[name].append(Block(times, max(canaries[-2:])))
    return timed, canaries


def summarise(blocks: list[Block], limit: float, prepared: Prepared) -> Timing:
    """Percentiles over the blocks beside which no canary reached `limit`.

    Without any such block all of them count, since a doubtful number says more than none.
    """
    good = [block for block in blocks if block.canary < limit]
    times = [ms for block in good or blocks for ms in block.times]
    return Timing(
        *(percentile(times, share) for share in (0.2, 0.5, 0.8)),
        runs=len(times),
        blocks=len(blocks),
        thrown_away=len(blocks) - len(good),
        trusted=2 * len(good) >= len(blocks),
        graph=prepared.graph,
        reason=prepared.reason,
    )


def failed(error: str) -> Timing:
    """The timing of a contender that raised."""
    nan = float("nan")
    return Timing(nan, nan, nan, 0, 0, 0, trusted=False, graph=False, error=error)


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie, on the line between the two nearest."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def one_line(error: BaseException, width: int = 200) -> str:
    """An exception as a short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:width]


# ------------------------------------------------------------------- timers


class CpuTimer:
    """Wall clock time of each run."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, flush_bytes: int | None = None
    ):
        self.clock = clock
        size = last_level_cache() * 5 // 4 if flush_bytes is None else flush_bytes
        self.buffer = torch.empty(size, dtype=torch.int8)
        self.matrix = torch.randn(256, 256)

    def session(self) -> AbstractContextManager:
        return nullcontext()

    def prepare(self, make: Callable[[int], Run], copies: int) -> Prepared:
        runs = [make(i) for i in range(copies)]
        for run in runs:
            self.block([run])
        return Prepared(runs, reason="on a CPU")

    def block(self, runs: list[Run]) -> list[float]:
        times = []
        for run in runs:
            if run.reset:
                run.reset()
            self.buffer.fill_(1)
            start = self.clock()
            run.call()
            times.append(1e3 * (self.clock() - start))
        return times

    def canary(self) -> float:
        """The best of three small products: a machine that is slow for all of them is busy."""
        best = float("inf")
        for _ in range(3):
            start = self.clock()
            self.matrix @ self.matrix
            best = min(best, 1e3 * (self.clock() - start))
        return best


class CudaTimer:
    """Device time of each run, between two events, all on one stream of our own: backward runs
    on the stream of its forward, and a graph cannot be captured on the default one."""

    def __init__(self, device: torch.device):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.written = torch.empty(size, dtype=torch.int8, device=device)
        self.read = torch.ones(size // 4, device=device)
        self.matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def session(self) -> AbstractContextManager:
        torch.cuda.synchronize()  # what was made so far was made on another stream
        return torch.cuda.stream(self.stream)

    def prepare(self, make: Callable[[int], Run], copies: int) -> Prepared:
        runs = [make(i) for i in range(copies)]
        for run in runs * WARM_UP:
            self.block([run])
        if reason := waits_for_the_device(runs[0]):
            return Prepared(runs, reason=reason)
        try:
            return Prepared([self.capture(run) for run in runs], graph=True)
        except RuntimeError as error:
            torch.cuda.synchronize()
            return Prepared(runs, reason=one_line(error))

    def capture(self, run: Run) -> Run:
        if run.reset:
            run.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            run.call()
        return Run(graph.replay, run.reset, keep=(graph, run))

    def flush(self) -> None:
        """Nothing of ours stays in the cache. What the write leaves dirty there would be written
        back during the timed run: the read makes room for it."""
        self.written.fill_(1)
        self.read.sum()

    def block(self, runs: list[Run]) -> list[float]:
        pairs = []
        for run in runs:
            if run.reset:
                run.reset()
            self.flush()
            pairs.append(self.timed(run.call))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def timed(self, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    def canary(self) -> float:
        """The best of three products."""
        pairs = [self.timed(lambda: self.matrix @ self.matrix) for _ in range(3)]
        torch.cuda.synchronize()
        return min(start.elapsed_time(end) for start, end in pairs)


def waits_for_the_device(run: Run) -> str:
    """What torch says of a run that waits for its own results, and so cannot be a graph."""
    if run.reset:
        run.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.call()
    except RuntimeError as error:
        return one_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Bytes that the block allocated at most, beyond what was there; nothing on a CPU."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield peak
    if device.type == "cuda":
        peak.append(torch.cuda.max_memory_allocated(device) - before)


def last_level_cache(default: int = 64 * 2**20) -> int:
    """Bytes of the largest cache of the CPU."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=default)


# ------------------------------------------------------------------ results


def fingerprint(device: torch.device) -> dict:
    """What a number must carry to be compared with another."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    cpu = [line.split(":")[1].strip() for line in names if line.startswith("model name")]
    return {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        **(gpu_facts() if device.type == "cuda" else {}),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """Of this checkout, "-dirty" with changes; BENCH_COMMIT names that of a copy without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("BENCH_COMMIT") or done.stdout.strip() or "unknown"


def gpu_facts() -> dict:
    """The GPU's name, its clock just now and its driver, where something tells them."""
    facts = {"gpu": torch.cuda.get_device_name(), "sm_mhz": None, "driver": None}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        clock, comma, driver = done.stdout.split("\n")[0].partition(", ")
        if comma and not done.returncode:
            mhz = clock.removesuffix(" MHz")
            facts |= {"sm_mhz": int(mhz) if mhz.isdigit() else None, "driver": driver.strip()}
    return facts


def append(path: Path, row: dict) -> None:
    """Appends a whole line of JSON, on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(row, allow_nan=False) + "\n")
        log.flush()
        os.fsync(log.fileno())
