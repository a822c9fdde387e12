"""Tries tiles of the attention kernels, and ranks those that are right.

    python -m bench.tune attention --shape 512x12x64 --minutes 3
    TRITON_INTERPRET=1 python -m bench.tune attention --device cpu --shape 20x2x16 --minutes 0.1

A job is a role (forward, dq, dkv, and both passes of short sequences) at a shape, with or without
dropout. Each tile of its list stands in for what the module would choose; it is held to the
definition in fp64, then the whole pass is timed: the other kernels of a gradient are in it, as they
are. A tile that is wrong is printed and never ranked, one that does not compile or fit is a line.
The best few and the module's own are then timed in turn, and ranked. Jobs share the time evenly;
what one leaves goes to those after it. Compiling takes most of it: on a GPU, all cores do.

A shape is LENGTHxHEADSxD, such as 512x12x64, 2048x16:4x128 (4 heads of keys) or sentencesx12x64;
",causal" may follow. Every trial is appended to bench/results/tune.jsonl. Exit status 1: a tile
that the module chooses is wrong or failed.
"""

import argparse
import importlib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from bench.attention_batches import TOKENS, Batch, equal, mixed
from bench.attention_cases import attention
from bench.kernels import finite, release, results_of, worst_error
from bench.measure import ROOT, Run, Timing, append, fingerprint, measure, one_line
from bench.operations import Absent, Case, Inputs, mend_interpreter
from minift.kernels.layout import SHORT

RESULTS = ROOT / "bench" / "results" / "tune.jsonl"
SHAPES = ["512x12x64", "sentencesx12x64", "2048x12x64", "2048x16x128", "128x12x32"]
DROPOUT = 0.1
DROPPED = 2  # shapes, the first ones, that are tuned with dropout too
TRY = {"copies": 2, "blocks": 3, "runs": 10, "block_ms": 10.0}
FINAL = {"copies": 2, "blocks": 6, "runs": 20, "block_ms": 20.0}
FINALISTS = 4
COPIES = 2


@dataclass(frozen=True)
class Tile:
    """What a launch is given; maxnreg None leaves the registers to the compiler."""

    M: int
    N: int
    warps: int
    stages: int
    maxnreg: int | None = None

    def __str__(self) -> str:
        limit = f", {self.maxnreg} registers" if self.maxnreg else ""
        return f"{self.M} x {self.N}, {self.warps} warps, {self.stages} stages{limit}"

    def over(self, given: dict, rows: str) -> dict:
        """In place of what a module chose. `rows` names the block of which a span has SPLIT."""
        blocks = {"BLOCK": self.M} if "BLOCK" in given else {"BLOCK_M": self.M, "BLOCK_N": self.N}
        left = "maxnreg", "before_hopper"  # they belong to the tile that is not taken
        made = {name: value for name, value in given.items() if name not in left}
        made |= blocks | {"num_warps": self.warps, "num_stages": self.stages}
        if given.get("SPLIT"):
            made["SPLIT"] = given["SPLIT"] * given[rows] // made[rows]
        return made | ({"maxnreg": self.maxnreg} if self.maxnreg else {})


@dataclass(frozen=True)
class Role:
    """A launch that asks for a tile."""

    file: str  # of minift.kernels
    function: str  # that is asked
    when: dict[str, object]  # its arguments, where it is asked for this role
    kind: str  # the pass
    short: bool
    tiles: list[Tile]
    rows: str = "BLOCK_M"  # of a program


def tiles(*rows: tuple) -> list[Tile]:
    return [Tile(*row) for row in rows]


ROLES = {  # rows of a program divide SPAN; the most promising tiles first
    "forward": Role("attention", "_tile", {"short": False}, "forward", False, tiles(
        (128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3),
        (64, 128, 4, 2), (128, 64, 4, 2), (64, 64, 4, 2), (128, 32, 4, 4), (64, 128, 4, 3),
        (128, 64, 8, 4), (64, 64, 4, 4), (64, 32, 4, 4), (128, 32, 8, 4), (64, 64, 4, 3, 128),
        (128, 128, 4, 2), (128, 64, 8, 3, 128), (64, 32, 4, 3),
    )),
    "dkv": Role("attention_backward", "_tile", {"role": "dkv"}, "backward", False, tiles(
        (64, 64, 4, 3), (64, 128, 8, 2), (32, 128, 4, 3), (32, 128, 8, 3), (32, 64, 4, 3),
        (64, 128, 8, 3), (32, 128, 4, 2), (64, 128, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2),
        (128, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 4), (128, 64, 4, 2),
        (64, 64, 4, 2, 168),
    ), rows="BLOCK_N"),
    "dq": Role("attention_backward", "_tile", {"role": "dq"}, "backward", False, tiles(
        (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 32, 4, 3),
        (64, 32, 4, 3), (128, 64, 4, 2), (64, 32, 4, 4), (128, 32, 8, 3), (128, 128, 8, 2),
        (64, 128, 8, 2), (64, 64, 4, 4), (64, 64, 8, 2), (64, 128, 4, 3), (64, 64, 4, 3, 168),
        (128, 32, 8, 4),
    )),
    "short forward": Role("attention", "_tile", {"short": True}, "forward", True, tiles(
        (32, 32, 1, 1), (32, 64, 2, 1), (64, 64, 4, 1), (32, 64, 1, 1), (64, 32, 4, 1),
        (32, 32, 4, 1), (64, 64, 2, 1), (16, 32, 1, 1), (64, 32, 2, 1), (32, 32, 2, 2),
        (16, 64, 1, 1), (32, 32, 1, 2), (16, 16, 1, 1),
    )),
    "short backward": Role(
        "attention_backward", "_tile", {"role": "short"}, "backward", True, tiles(
        (32, 32, 1, 1), (32, 32, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1), (16, 16, 1, 1),
        (64, 64, 2, 1), (32, 32, 2, 2), (32, 32, 1, 2), (16, 16, 2, 1), (64, 64, 4, 2),
        (32, 32, 2, 1, 128), (16, 16, 1, 2),
    )),
}  # fmt: skip


# ---------------------------------------------------------------- other tiles


@contextmanager
def patched(role: Role, tile: Tile | None) -> Iterator[None]:
    """In the block the launches of a role get this tile; None: the module's own.

    Raises:
        LookupError: none asked for it, so a time would be that of another tile.
    """
    module = importlib.import_module(f"minift.kernels.{role.file}")
    original = getattr(module, role.function)
    signature, asked = inspect.signature(original), False

    def chosen(*args, **kwargs):
        nonlocal asked
        given = original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if any(bound.arguments.get(name) != value for name, value in role.when.items()):
            return given
        asked = True
        return tile.over(given, role.rows) if tile else given

    setattr(module, role.function, chosen)
    try:
        yield
    finally:
        setattr(module, role.function, original)
    if not asked:
        raise LookupError(f"nothing asked {role.file}.{role.function} for {role.when or 'a tile'}")


@dataclass(frozen=True)
class Recorder:
    """Stands in for a kernel: notes a launch in place of running it."""

    kernel: Callable
    launches: list[tuple]

    def __getitem__(self, grid: tuple) -> Callable:
        def note(*args, **options):
            self.launches.append((self.kernel, grid, args, options))

        return note


@contextmanager
def recorded(launches: list[tuple]) -> Iterator[None]:
    """In the block, no kernel of attention runs; launches are noted."""
    names = ("attention", "attention_backward")
    modules = [importlib.import_module(f"minift.kernels.{name}") for name in names]
    originals = [module.launch for module in modules]
    for module, launch in zip(modules, originals, strict=True):

        def noted(kernel, *args, launch=launch, **options):
            launch(Recorder(kernel, launches), *args, **options)

        module.launch = noted
    try:
        yield
    finally:
        for module, launch in zip(modules, originals, strict=True):
            module.launch = launch


def compile_together(call: Callable, role: Role, chosen: list[Tile | None]) -> None:
    """Compiles for all tiles on all cores; a launch then finds its kernel in triton's cache. What
    does not compile is left to its launch, which says why."""
    launches: list[tuple] = []
    for tile in chosen:
        with recorded(launches), patched(role, tile):
            call()
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for kernel, grid, args, options in launches:
            kernel.warmup(*args, grid=grid, **options)


# --------------------------------------------------------------------- trials


@dataclass(frozen=True)
class Trial:
    """What became of a tile."""

    tile: Tile | None  # None: the module's own
    status: str  # "timed", "WRONG", "failed"
    reason: str = ""
    timing: Timing | None = None

    @property
    def name(self) -> str:
        return str(self.tile or "as it is")


class Bench:
    """One pass over a batch, and its exact results."""

    def __init__(self, batch: Batch, kind: str, device: torch.device):
        self.case: Case = next(c for c in attention(batch, device) if c.kind == kind)
        self.device = device
        inputs = self.case.inputs()
        self.exact = results_of(self.case, "definition", inputs.double())
        self.same_dtype = results_of(self.case, "definition", inputs)
        self.copies: list[Inputs] = [inputs, *(inputs.copy() for _ in range(COPIES - 1))]
        release(device)

    def contender(self, role: Role, tile: Tile | None) -> Callable[[int], Run]:
        """Ours with a tile; of a gradient, the forward pass before it has the module's own."""

        def make(i: int) -> Run:
            run = self.case.ways["ours"](self.copies[i])

            def call() -> tuple[Tensor, ...]:
                with patched(role, tile):
                    return run.call()

            return Run(call, run.reset, keep=run)

        return make

    def trial(self, role: Role, tile: Tile | None) -> Trial:
        """Verified, then timed."""
        make = self.contender(role, tile)
        try:
            error = worst_error(make(0).call(), self.same_dtype, self.exact)
        except Absent:
            raise
        except Exception as failure:  # a compiler may raise anything; others are still wanted
            return Trial(tile, "failed", one_line(failure))
        if not error <= 1:
            return Trial(tile, "WRONG", f"error {error:.3g} of what is allowed")
        timing = measure({"": make}, self.device, **TRY)[""]
        if timing.error:
            return Trial(tile, "failed", timing.error)
        return Trial(tile, "timed", timing=timing)

    def final(self, role: Role, trials: list[Trial]) -> list[Trial]:
        """The best and the module's own in turn, in the order of their times."""
        ranked = sorted((t for t in trials if t.status == "timed"), key=lambda t: t.timing.p50)
        own = [t for t in ranked[FINALISTS:] if t.tile is None]
        chosen = ranked[:FINALISTS] + own
        contenders = {t.name: self.contender(role, t.tile) for t in chosen}
        timings = measure(contenders, self.device, **FINAL) if chosen else {}
        found = [replace(t, timing=timings[t.name]) for t in chosen if not timings[t.name].error]
        return sorted(found, key=lambda t: t.timing.p50)


def synchronize(device: torch.device) -> None:
    """Raises RuntimeError when a kernel has broken the process's access to the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tune(bench: Bench, name: str, end: float, write: Callable[..., None]) -> list[Trial]:
    """One job, until `end` of the monotonic clock: its finalists in their order.

    Args:
        bench: the pass.
        name: of the role.
        end: no trial is begun after it, but that of the module's own tile.
        write: takes each trial, and whether it is a final one.
    """
    role = ROLES[name]
    print(f"\n{name}: {bench.case.shape}", flush=True)
    queue: list[Tile | None] = [None, *role.tiles]
    cuda, trials = bench.device.type == "cuda", []
    at_once = (os.cpu_count() or 1) if cuda else 1
    while queue and (not trials or time.monotonic() < end):
        chosen, queue = queue[:at_once], queue[at_once:]
        if cuda:
            try:
                compile_together(bench.case.ways["ours"](bench.copies[0]).call, role, chosen)
            except Exception as error:  # then each is compiled when it is launched
                print(f"  compiled one by one: {one_line(error)}")
        for tile in chosen:
            if trials and time.monotonic() > end:
                break
            trial = bench.trial(role, tile)
            trials.append(trial)
            write(trial, final=False)
            if trial.status != "timed":
                print(f"  {trial.name}: {trial.status}: {trial.reason}", flush=True)
            synchronize(bench.device)
    final = bench.final(role, trials)
    for trial in final:
        write(trial, final=True)
    print(table(bench.case, final, len(trials), 1 + len(role.tiles)), flush=True)
    return trials


def table(case: Case, final: list[Trial], tried: int, of: int) -> str:
    """The finalists, the best first."""
    own = next((t.timing.p50 for t in final if t.tile is None), None)
    lines = [f"  {'':<36}{'ms':>9} {'20 .. 80 %':>18}{'TFLOP/s':>9}{'x own':>7}"]
    for trial in final:
        took = trial.timing
        ratio = f"{took.p50 / own:.3f}" if own else "-"
        spread = f"{took.p20:.4f} .. {took.p80:.4f}"
        rate = f"{case.flops / took.p50 / 1e9:.3g}"
        eager = "" if took.graph or took.reason == "on a CPU" else f"no graph: {took.reason}"
        notes = [eager, "" if took.trusted else "DOUBTFUL: the machine was busy"]
        line = f"  {trial.name:<36}{took.p50:>9.4f} {spread:>18}{rate:>9}{ratio:>7}"
        lines.append(f"{line}  {'; '.join(filter(None, notes))}".rstrip())
    return "\n".join([*lines, f"  {tried} of {of} tiles tried"])


# ----------------------------------------------------------------------- main


def parse(shape: str, tokens: int) -> Batch:
    """A batch of a shape as on the command line."""
    found = re.fullmatch(r"(\d+|sentences|squad)x(\d+)(?::(\d+))?x(\d+)(,causal)?", shape)
    if not found:
        raise SystemExit(f"expected --shape such as 512x12x64 or sentencesx12x64, got {shape}")
    length, H, Hk, D, causal = found.groups()
    facts = {"Hk": int(Hk or 0), "causal": bool(causal)}
    if length.isdigit():
        return equal(int(length), int(H), int(D), tokens, **facts)
    return mixed(length, int(H), int(D), tokens, **facts)


def jobs(shapes: list[str], roles: list[str], tokens: int) -> list[tuple[Batch, str]]:
    """Batches and roles in the order of their weight: passes of a batch are neighbours."""
    found = []
    for i, shape in enumerate(shapes):
        batch = parse(shape, tokens)
        for p in (0.0, DROPOUT) if i < DROPPED else (0.0,):
            dropped = replace(batch, p=p)
            present = {length <= SHORT for length in batch.lengths}
            found += [(dropped, name) for name in roles if ROLES[name].short in present]
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("op", choices=("attention",))
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="the most important first")
    parser.add_argument("--role", nargs="+", choices=tuple(ROLES), default=list(ROLES))
    parser.add_argument("--minutes", type=float, default=3.0, help="for all jobs together")
    parser.add_argument("--tokens", type=int, help="of a batch; default: 16384, on a CPU 64")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended to it")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    end = time.monotonic() + 60 * args.minutes
    mend_interpreter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("expected a GPU, or TRITON_INTERPRET=1 to try it on a CPU", file=sys.stderr)
        raise SystemExit(2)
    tokens = args.tokens or (TOKENS if device.type == "cuda" else 64)
    todo = jobs(args.shape, args.role, tokens)
    machine, broken = fingerprint(device), 0
    benches: dict[tuple, Bench] = {}
    for i, (batch, name) in enumerate(todo):
        now = time.monotonic()
        if now > end:
            print(f"\nno time for {len(todo) - i} of {len(todo)} jobs")
            break
        at = str(batch), ROLES[name].kind
        if at not in benches:
            if any(shape != at[0] for shape, _ in benches):
                benches.clear()  # exact results of a batch that is done
            benches[at] = Bench(batch, at[1], device)

        def write(trial: Trial, final: bool, role: str = name, at: tuple = at) -> None:
            append(args.out, {**row_of(trial, role, *at), "final": final, **machine})

        trials = tune(benches[at], name, now + (end - now) / (len(todo) - i), write)
        broken += trials[0].status != "timed"
    raise SystemExit(1 if broken else 0)


def row_of(trial: Trial, role: str, shape: str, kind: str) -> dict:
    """A trial as it is written down."""
    timing = asdict(trial.timing) if trial.timing else {}
    timing = {name: finite(x) if isinstance(x, float) else x for name, x in timing.items()}
    return {
        **timing,
        "op": "attention",
        "role": role,
        "shape": shape,
        "pass": kind,
        "tile": asdict(trial.tile) if trial.tile else None,
        "status": trial.status,
        "reason": trial.reason,
    }


if __name__ == "__main__":
    main()
