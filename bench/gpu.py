"""All that a machine with a GPU should run, in one call and in the given time.

    python -m bench.gpu --out DIR --minutes 9

    compile       every declared launch, for all targets, on all cores
    ceilings      bandwidth of a copy, rate of a matmul, cost of a launch
    smoke         every operation at a small shape: whether it runs and is right
    tests         the tests of the kernels, on the GPU
    kernels       every operation at the shapes that are trained, beside its peers and its floor
    finetune      fine-tuning side by side, the most important models and texts first
    step_kernels  where the time of a step goes, kernel by kernel
    tune          tiles of the attention kernels, in the time that the others have left

Each part is a process with a time limit and a log; one that fails or hangs does not stop the
others. What a part leaves of its time goes to those after it. DIR/gpu.jsonl has a line for each
part as soon as it ends; DIR/kernels.jsonl one for each contender, DIR/finetune.jsonl for each peer,
DIR/step_kernels.jsonl for each kernel of a step, DIR/tune.jsonl for each tile.
torch, triton, numpy, pytest, hypothesis and what `import minift` takes must be there; minift need
not be installed. Exit status 1: a part failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.measure import ROOT, append

SHARES = {  # of the time, where every part takes all of its own
    "compile": 0.12,
    "ceilings": 0.05,
    "smoke": 0.11,
    "tests": 0.13,
    "kernels": 0.28,
    "finetune": 0.26,
    "step_kernels": 0.03,
    "tune": 0.02,  # when it begins, all that is left is its own
}
TUNE_SECONDS = 45.0  # in less nothing is found
LEARNING_SECONDS = 300.0  # in less, fine-tuning is timed alone
TINY = ("--blocks", "2", "--steps", "3", "--warm-up", "2", "--peers", "minift", "transformers")
LINES, WIDTH = 9, 100  # of the log of a part that failed
ALL_LINES = 18  # where many failed, each has fewer
HEADER = ("part", "status", "seconds", "log", "its last line")


@dataclass(frozen=True)
class Part:
    """What one part runs."""

    command: list[str]
    environment: dict[str, str]
    skipped: str = ""  # why it is not run


@dataclass(frozen=True)
class Result:
    """How a part ended."""

    part: str
    status: str  # "ok", "failed", "timed out", "skipped"
    seconds: float
    limit: float
    code: int | None
    log: str
    last: str  # line of the log, or why it was skipped


def parts(
    device: str, out: Path, link: Path, limits: dict[str, float], ops: Sequence[str] = ()
) -> dict[str, Part]:
    """The command of every part.

    Args:
        device: "cuda", or "cpu" for small shapes.
        out: folder for results.
        link: folder with a link to minift and nothing else.
        limits: seconds for each part.
        ops: operations of smoke and kernels; none: all.
    """
    python = [sys.executable, "-m"]
    plain: dict[str, str] = {}
    quick = ["--quick"] if device == "cpu" else []
    compile_all = [*python, "bench.codegen", "--json", "--jobs", str(os.cpu_count())]
    chosen = ["--op", *ops] if ops else []
    kernels = [*python, "bench.kernels", "--device", device, *chosen]
    choice = ["--tiny", *TINY] if device == "cpu" else []
    choice += ["--learning"] if limits["finetune"] > LEARNING_SECONDS else []
    finetune = [*python, "bench.finetune", "--device", device, *choice]
    choice = ["--workload", "tiny short"] if device == "cpu" else []
    steps = [*python, "bench.step_kernels", "--device", device, *choice]
    tiny = ["--shape", "20x1x16"] if device == "cpu" else []
    tune = [*python, "bench.tune", "attention", "--device", device, *tiny]
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else plain
    no_time = "no time is left" if limits["tune"] < TUNE_SECONDS else ""

    def in_time(name: str) -> list[str]:
        minutes = 0.8 * limits[name] / 60  # the rest is for the case that is running then
        return ["--minutes", str(minutes), "--out", str(out / f"{name}.jsonl")]

    # A folder `kernels` on the path would be taken for the package of that name: so the checkout
    # is not on it (-P), and minift is found through a link.
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, [str(link), os.environ.get("PYTHONPATH")]))
    missing = "" if (ROOT / "bench" / "codegen.py").exists() else "there is no bench/codegen.py"
    return {
        "compile": Part(compile_all, plain, missing),
        "ceilings": Part([*python, "bench.ceilings", "--device", device, *quick], plain),
        "smoke": Part([*kernels, "--quick", "--out", str(out / "smoke.jsonl")], plain),
        "tests": Part([*tests, *test_files()], {"PYTHONPATH": path}),
        "kernels": Part([*kernels, *quick, *in_time("kernels")], plain),
        "finetune": Part([*finetune, *in_time("finetune")], plain, missing_for_finetune()),
        "step_kernels": Part([*steps, "--out", str(out / "step_kernels.jsonl")], plain),
        "tune": Part([*tune, *in_time("tune")], interpreted, no_time),
    }


def missing_for_finetune() -> str:
    """What the peers need and this Python lacks; nothing if it is there."""
    lacking = [name for name in ("transformers", "safetensors") if not find_spec(name)]
    return f"there is no {' and no '.join(lacking)}" if lacking else ""


def test_files() -> list[str]:
    """The tests of kernels/, of what is built on them and of the timing: others do not come near
    a GPU, or need packages that may not be there."""
    names = [path.stem for path in sorted((ROOT / "kernels").glob("[a-z]*.py"))]
    found = [f for n in names for f in sorted(ROOT.glob(f"tests/test_{n}*.py"))]
    others = "ops batch layers blocks prefetch step train embedders measure".split()
    found += [ROOT / "tests" / f"test_{n}.py" for n in others]
    return [str(file.relative_to(ROOT)) for file in dict.fromkeys(found)]


def share_out(names: list[str], seconds: float) -> dict[str, float]:
    """The time of each part that is still to run."""
    total = sum(SHARES[name] for name in names)
    return {name: seconds * SHARES[name] / total if total else 0.0 for name in SHARES}


def run_part(name: str, part: Part, limit: float, out: Path) -> Result:
    """Runs a part to its end or to its limit, with all that it started."""
    log = out / f"{name}.log"
    if part.skipped:
        return Result(name, "skipped", 0.0, limit, None, "-", part.skipped)
    start = time.monotonic()
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)  # whoever needs it sets it
    environment |= part.environment
    with open(log, "wb") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "failed" if code else "ok"
        except subprocess.TimeoutExpired:
            code, status = None, "timed out"
        finally:
            end_session(process.pid)
            process.wait()
    lines = tail(log)
    seconds = time.monotonic() - start
    return Result(name, status, round(seconds, 1), limit, code, log.name, (lines or [""])[-1])


def end_session(leader: int) -> None:
    """Ends all that a part started and left, whatever its process group: it would take time from
    the parts that are timed."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            session = stat.read_text().rpartition(")")[2].split()[3]
            if int(session) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def tail(log: Path) -> list[str]:
    """The last lines of a log that have something in them, cut to a width."""
    text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines[-LINES:]]


def run_parts(
    names: list[str], device: str, out: Path, seconds: float, ops: Sequence[str] = ()
) -> list[Result]:
    """The parts in their order, each result written as soon as it is there."""
    end = time.monotonic() + seconds
    results = []
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder)
        (link / "minift").symlink_to(ROOT / "minift")
        for i, name in enumerate(names):
            limits = share_out(names[i:], max(end - time.monotonic(), 0.0))
            part = parts(device, out, link, limits, ops)[name]
            result = run_part(name, part, limits[name], out)
            append(out / "gpu.jsonl", asdict(result))
            print(f"{name}: {result.status} in {result.seconds:.0f} s", flush=True)
            results.append(result)
    return results


# ------------------------------------------------------------------- report


def kernel_lines(file: Path) -> list[str]:
    """One line a case: ours beside the best peer."""
    if not file.exists():
        return []
    cases: dict[tuple, list[dict]] = {}
    for row in map(json.loads, file.read_text("utf-8").splitlines()):
        cases.setdefault((row["op"], row["pass"], row["shape"]), []).append(row)
    lines = [f"{'operation, pass: shape':<64}{'ours ms':>9}{'best ms':>9}{'ratio':>7}  best peer"]
    return lines + [kernel_line(case, rows) for case, rows in cases.items()]


def kernel_line(case: tuple, rows: list[dict]) -> str:
    """Ours, the best peer, the ratio; share of the copy's rate, or flops, and targets, if any."""
    peers = [r for r in rows if r["status"] == "timed" and r["contender"] != "ours"]
    best = min(peers, key=lambda row: row["p50"], default=None)
    mine = next((r for r in rows if r["contender"] == "ours"), None)
    title = "{}, {}: {}".format(*case)[:63]
    name, peer_ms = (best["contender"], f"{best['p50']:.4f}") if best else ("none", "-")
    if mine is None or mine["status"] != "timed":
        status = mine["status"] if mine else "-"
        return f"{title:<64}{status:>9}{peer_ms:>9}{'-':>7}  {name}"
    ratio = f"{mine['ratio_to_best_peer']:.2f}" if best else "-"
    rate = f"{mine['of_copy']:.0%} of copy"
    if mine.get("tflops"):
        rate = f"{mine['tflops']:.0f} TFLOP/s"
    found = [mine["target_met"], *(r["met"] for r in mine.get("ratios", ()))]
    words = {True: ", target met", False: ", target MISSED", None: ""}
    note = f"{name}; {rate}{''.join(words[met] for met in found)}"
    return f"{title:<64}{mine['p50']:>9.4f}{peer_ms:>9}{ratio:>7}  {note}"


def finetune_lines(file: Path) -> list[str]:
    """One line a workload: ours beside the best peer and the target."""
    if not file.exists():
        return []
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    timed = [row for row in rows if row["bench"] == "finetune" and row["status"] == "timed"]
    lines = [
        f"{'fine-tuning, real tokens/s':<40}{'ours':>12}{'ratio':>7}{'of target':>11}  best peer"
    ]
    for row in timed:
        if row["peer"] != "minift":
            continue
        ratio, target = row["ratio_to_best_peer"], row["of_target"]
        ratio = "-" if ratio is None else f"{ratio:.2f}"
        target = "-" if target is None else f"{target:.0%}"
        notes = "; ".join([row["best_peer"] or "none", *row["doubts"]])
        rate = f"{row['tokens_per_second']:,.0f}"
        lines.append(f"{row['workload']:<40}{rate:>12}{ratio:>7}{target:>11}  {notes}"[:150])
    return lines


def report(results: list[Result], out: Path) -> str:
    """The kernels, the fine-tuning, the parts, and the ends of the logs of those that failed."""
    rows = [HEADER]
    rows += [(r.part, r.status, f"{r.seconds:.0f}", r.log, r.last[:70]) for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    lines = [*kernel_lines(out / "kernels.jsonl"), *finetune_lines(out / "finetune.jsonl"), ""]
    for *cells, last in rows:
        lines.append("  ".join([*map(str.ljust, cells, widths), last]).rstrip())
    bad = [r for r in results if r.status in ("failed", "timed out")]
    for r in bad:
        end = tail(out / r.log)[-max(2, ALL_LINES // len(bad)) :]
        lines += ["", f"{r.part} {r.status} ({out / r.log}):", *end]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(SHARES), help="with commas; default: all")
    parser.add_argument("--op", nargs="+", default=[], help="of smoke and kernels; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a rehearsal"
    )
    parser.add_argument("--commit", help="of this copy, if it is without git")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    names = args.parts.split(",")
    if unknown := set(names) - set(SHARES):
        raise SystemExit(f"expected --parts of {','.join(SHARES)}, got {','.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("expected a GPU, found none: --device cpu rehearses every part", file=sys.stderr)
        raise SystemExit(2)
    if args.commit:
        os.environ["BENCH_COMMIT"] = args.commit
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu", "smoke", "kernels", "finetune", "tune"):
        (out / f"{name}.jsonl").unlink(missing_ok=True)  # of an earlier run
    results = run_parts(names, args.device, out, 60 * args.minutes, args.op)
    print(report(results, out))
    raise SystemExit(1 if any(r.status in ("failed", "timed out") for r in results) else 0)


if __name__ == "__main__":
    main()
