"""Blocks of training steps in turn (A B C A B C ...), timed by two clocks.

A step is timed between two events on the device, one after each step: together they cover the whole
block, and what the host was late with is in them. The wall clock of the block, from one wait for
the device to the next, must say the same. Before each block some steps go untimed, so that a peer
finds its caches and clocks as in a long run; a canary of fixed size between all blocks tells when
the machine was busy with something else.
"""

import contextlib
import gc
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from bench.measure import SLOW, CpuTimer, one_line, percentile
from bench.peers import Job, Peer, Unavailable

AHEAD = 3  # untimed steps before a block
AGREE = 0.02  # by which the clocks may differ
ALIKE = {"fp32": 1e-3, "bf16": 2e-3}  # by which the first losses may, where nothing is dropped
STILL_ALIKE = 0.02  # and those after the steps to warm up
FEW_BLOCKS = 5
MAKING = 0.7  # of the time, to make the peers
MIB = 2**20


@dataclass(frozen=True)
class Block:
    """Some steps of a peer."""

    first: int  # number of its first timed step
    times: list[float]  # ms of each step, between events
    wall: float  # ms of all together
    canary: float  # ms, the slower one beside it


@dataclass
class Course:
    """What became of one peer of a workload."""

    name: str
    kind: type[Peer]
    status: str = "timed"  # or "unavailable", "failed"
    reason: str = ""
    note: str = ""  # what it does not share with the others, known after its steps
    peer: Peer | None = None
    blocks: list[Block] = field(default_factory=list)
    prepare_seconds: float = 0.0
    allocated: int = 0  # bytes at most, beyond what lay there
    reserved: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    micro_batches: int = 1  # in a step
    doubts: list[str] = field(default_factory=list)
    sm_mhz: int | None = None
    watts: float | None = None


class CpuClock:
    """Wall clock at each mark."""

    def __init__(self):
        self.marks: list[float] = []
        self.timer = CpuTimer(flush_bytes=0)

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def wait(self) -> None:
        pass

    def take(self) -> list[float]:
        """Milliseconds between the marks; forgets them."""
        marks, self.marks = self.marks, []
        return [1e3 * (b - a) for a, b in pairwise(marks)]

    def canary(self) -> float:
        return self.timer.canary()


class CudaClock:
    """An event on the device at each mark."""

    def __init__(self, device: torch.device):
        self.marks: list[torch.cuda.Event] = []
        self.matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def take(self) -> list[float]:
        """Milliseconds between the marks, after `wait`; forgets them."""
        marks, self.marks = self.marks, []
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    def canary(self) -> float:
        """The best of three products."""
        for _ in range(3):
            self.mark()
            self.matrix @ self.matrix
        self.mark()
        self.wait()
        return min(self.take())


def make_clock(device: torch.device) -> CpuClock | CudaClock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Plan:
    """How many steps, and until when."""

    warm_up: int = 40
    blocks: int = 5
    steps: int = 30  # in a block
    deadline: float = float("inf")  # of time.monotonic()

    @property
    def total(self) -> int:
        """Steps of each peer, timed or not."""
        return self.warm_up + self.blocks * (AHEAD + self.steps)

    def first(self, block: int) -> int:
        """The first timed step of a block."""
        return self.warm_up + block * (AHEAD + self.steps) + AHEAD


def prepare(kind: type[Peer], job: Job, plan: Plan) -> Course:
    """A peer, made and warm; one that cannot be says why. Where memory is short it has smaller
    micro-batches, if its steps have any."""
    course = _prepare(kind, job, plan)
    size = job.data.batches.batch_size
    if course.reason.startswith("OutOfMemoryError") and size % 2 == 0 and job.predicts:
        return prepare(kind, replace(job, data=job.data.halved()), plan)
    return course


def _prepare(kind, job, plan):
    course, cuda = Course(kind.name, kind), job.device.type == "cuda"
    course.micro_batches = job.data.batches.accumulation
    gc.collect()
    before = reserved = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    start = time.perf_counter()
    try:
        course.peer = kind(job)
        watch = None
        for k in range(plan.warm_up):
            course.peer.step(k)
            if k == 0:
                course.first_loss = course.peer.loss()
            if k == plan.warm_up // 2 and cuda:
                watch = start_watch()
        course.last_loss = course.peer.loss()  # waits
    except Exception as error:  # a peer may raise anything; the others are still wanted
        give_up(course, error)
        return course
    course.prepare_seconds = time.perf_counter() - start
    course.sm_mhz, course.watts = read_watch(watch)
    if cuda:
        course.allocated = torch.cuda.max_memory_allocated() - before
        course.reserved = torch.cuda.max_memory_reserved() - reserved
    return course


def give_up(course: Course, error: Exception) -> None:
    """Lets go of a peer that raised, and of what it held."""
    course.status = "unavailable" if isinstance(error, Unavailable) else "failed"
    course.reason = str(error) if isinstance(error, Unavailable) else one_line(error)
    course.peer = None
    error.__traceback__ = None  # its frames hold tensors
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # nothing more works after some errors
            torch.cuda.empty_cache()


def run_block(peer: Peer, first: int, steps: int, clock) -> tuple[list[float], float]:
    """Milliseconds of each of `steps` steps from `first` on, and of all together."""
    gc.collect()
    for k in range(first - AHEAD, first):
        peer.step(k)
    clock.wait()
    start = time.perf_counter()
    clock.mark()
    for k in range(first, first + steps):
        peer.step(k)
        clock.mark()
    clock.wait()
    wall = 1e3 * (time.perf_counter() - start)
    return clock.take(), wall


def run_rounds(courses: list[Course], plan: Plan, clock) -> list[float]:
    """Times the blocks of all peers in turn; the canaries. Rounds end early at the deadline, after
    the second."""
    gc.collect()
    gc.freeze()  # collecting before each block is quick then
    try:
        return _run_rounds(courses, plan, clock)
    finally:
        gc.unfreeze()


def _run_rounds(courses, plan, clock):
    canaries = [clock.canary()]
    for b in range(plan.blocks):
        if b >= 2 and time.monotonic() > plan.deadline:
            break
        for course in courses:
            if course.peer is None:
                continue
            first = plan.first(b)
            try:
                times, wall = run_block(course.peer, first, plan.steps, clock)
                course.last_loss = course.peer.loss()
                canaries.append(clock.canary())
            except Exception as error:  # the others are still wanted
                give_up(course, error)
                clock.marks.clear()
                continue
            course.blocks.append(Block(first, times, wall, max(canaries[-2:])))
    return canaries


def run_peers(
    kinds: list[type[Peer]], job: Job, plan: Plan, say: Callable[[str], None] = print
) -> tuple[list[Course], list[float]]:
    """All peers of a workload, made one after the other and timed in turn; and the canaries.

    A share of the time is for making them: what would take longer is not made, but for the first
    two.
    """
    courses: list[Course] = []
    start = time.monotonic()
    for i, kind in enumerate(kinds):
        used = time.monotonic() - start
        needed = kind.seconds_a_layer * job.layers if kind.seconds_a_layer else 0.0
        if i >= 2 and used + needed > MAKING * (plan.deadline - start):
            courses.append(Course(kind.name, kind, "unavailable", "no time was left"))
            continue
        courses.append(prepare(kind, job, plan))
        course = courses[-1]
        done = f"ready in {course.prepare_seconds:.1f} s"
        say(f"  {course.name}: {done if course.peer else f'{course.status}: {course.reason}'}")
    if job.predicts:
        compare_losses(courses, job.config.dtype)
    clock = make_clock(job.device)
    canaries = run_rounds(courses, plan, clock)
    for course in courses:
        course.note = (course.peer or course.kind).note
        course.peer = None
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # forgets the models it compiled
    gc.collect()  # and the memory of graphs that a generator holds
    return courses, canaries


def compare_losses(courses: list[Course], dtype: str) -> None:
    """Doubts peers whose losses are not those of the median peer, before the first step and after
    those to warm up: of the same weights and rows, where nothing is dropped, they are the same."""
    ready = [course for course in courses if course.peer]
    for name, limit in (("first_loss", ALIKE[dtype]), ("last_loss", STILL_ALIKE)):
        middle = statistics.median_low([getattr(c, name) for c in ready]) if ready else 0.0
        for course in ready:
            loss = getattr(course, name)
            if not abs(loss - middle) <= limit * middle:  # NaN compares false
                course.doubts.append(f"{name} {loss:.4f} before it was timed, others' {middle:.4f}")


def counted(course: Course, canaries: list[float]) -> list[Block]:
    """The blocks that were not beside a slow canary; without any such block all of them, since a
    doubtful number says more than none."""
    limit = SLOW * statistics.median(canaries)
    return [b for b in course.blocks if b.canary < limit] or course.blocks


def timed_facts(course: Course, job: Job, canaries: list[float]) -> dict:
    """What the blocks of a peer say: see `bench.finetune` for the names."""
    good = [b for b in course.blocks if b.canary < SLOW * statistics.median(canaries)]
    blocks = counted(course, canaries)
    times = sorted(ms for block in blocks for ms in block.times)
    medians = [statistics.median(block.times) for block in course.blocks]
    tokens = {b.first: sum(sum(job.data.lengths(k)) for k in numbers(b)) for b in blocks}
    rates = [tokens[b.first] / b.wall * 1e3 for b in blocks]
    n = sum(len(block.times) for block in blocks)
    batch = job.data.batch
    wall, event = sum(b.wall for b in blocks) / n, sum(times) / n
    facts = {
        "tokens_per_step": sum(tokens.values()) / n,
        "tokens_per_second": statistics.median(rates),
        "sequences_per_second": statistics.median(
            batch * len(b.times) / b.wall * 1e3 for b in blocks
        ),
        **{f"p{q}": percentile(times, q / 100) for q in (10, 50, 90)},
        "wall_ms": wall,
        "event_ms": event,
        "block_ms": medians,
        "spread": (max(medians) - min(medians)) / statistics.median(medians),
        "blocks": len(course.blocks),
        "thrown_away": len(course.blocks) - len(good),
        "steps": n,
    }
    doubts = list(course.doubts)
    if abs(wall - event) > AGREE * wall:
        doubts.append(f"clocks differ by {abs(wall / event - 1):.1%}")
    if 2 * len(good) < len(course.blocks):
        doubts.append(f"{facts['thrown_away']} of {len(course.blocks)} blocks beside a busy moment")
    if len(course.blocks) < FEW_BLOCKS:
        doubts.append(f"{len(course.blocks)} blocks")
    return facts | {"doubts": doubts}


def numbers(block: Block) -> range:
    """The steps of a block."""
    return range(block.first, block.first + len(block.times))


def start_watch() -> subprocess.Popen | None:
    """Asks for clock and power while the steps go on."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    return subprocess.Popen(
        query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )


def read_watch(watch: subprocess.Popen | None) -> tuple[int | None, float | None]:
    """MHz of the multiprocessors, and watts, where it was told."""
    if watch is None:
        return None, None
    try:
        answer = watch.communicate(timeout=10)[0].decode().split("\n")[0]
    except subprocess.TimeoutExpired:
        watch.kill()
        return None, None
    return read_clock(answer)


def read_clock(answer: str) -> tuple[int | None, float | None]:
    """ "1980, 512.3" as numbers; what is none is None."""

    def number(text, kind):
        try:
            return kind(float(text))
        except ValueError:
            return None

    clock, _, power = answer.partition(",")
    return number(clock, int), number(power, float)
