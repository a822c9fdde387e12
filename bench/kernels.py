"""Every kernel beside its definition, torch, torch.compile and its peers, and beside its floor.

    python -m bench.kernels --op cross_entropy --shape 50257
    python -m bench.kernels --quick --device cpu

A contender is held to the definition in fp64 first: at most twice the error of the definition in
the same dtype, plus one unit in the last place. One that is wrong is reported and not timed; a peer
may have a thousand times that error and is timed with a note: torch's norm of 11.7 million fp32
numbers on a CPU is 4e-4 off, 460 times what is allowed. A peer whose numbers cannot be compared
(its dropout is another) is timed with a note when they are finite.

The floor is the time in which the bytes (or flops) that a case must move pass at the ceiling:
"of 4.8" is the share of that rate that a contender reaches at the nominal bandwidth, "of copy" at
that of a copy, measured in the same run. "x best" is the time over that of the fastest peer,
where a peer is whoever is not ours: above 1 is a loss. A case with flops has its rate beside it. A
target is a time, or a share of the time of another contender in this run. Every line is appended to
bench/results/kernels.jsonl; the last line printed is JSON. Exit status 1: one of ours is wrong or
failed.
"""

import argparse
import functools
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench import operations
from bench.cases import all_cases
from bench.ceilings import Ceilings, measure_ceilings
from bench.measure import ROOT, Run, Timing, append, fingerprint, measure, one_line, peak_memory
from bench.operations import Absent, Case, Inputs

RESULTS = ROOT / "bench" / "results" / "kernels.jsonl"
SPEED = {"blocks": 5, "runs": 20, "block_ms": 50.0}
QUICK = {"blocks": 2, "runs": 3, "block_ms": 5.0}
MET = {True: "met", False: "MISSED"}
PEER_ERROR = 1000.0  # over the allowed one
NAME = 22  # of a contender
COLUMNS = f"  {'':<{NAME}}{'ms':>9} {'20 .. 80 %':>18}{'of 4.8':>8}{'of copy':>8}{'x best':>8}"


@dataclass(frozen=True)
class Verdict:
    """What the comparison with the definition gave."""

    status: str  # "right", "wrong", "absent", "failed"; once it is timed, "timed"
    reason: str = ""
    error: float | None = None  # over the allowed error, the worst of all results
    extra_mib: float | None = None  # memory at most, beside inputs and results, on a GPU


# ----------------------------------------------------------------- accuracy


def results_of(case: Case, name: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """What a contender computes, in as many calls as the case says, shaped as the definition's."""
    run = case.ways[name](inputs)
    for _ in range(case.calls):
        if run.reset:
            run.reset()
        results = run.call()
    return run.shaped(results) if run.shaped else results


def worst_error(actual, same_dtype, exact, dtype: torch.dtype | None = None) -> float:
    """The error over the allowed one, at most 1 when all is right; the largest of all results.

    Allowed is twice the error of the definition in the same dtype, and one unit in the last place
    of the largest number of the exact result, in `dtype` or that of the result.
    """
    worst = 0.0
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        if a.shape != e.shape:
            return math.inf
        ulp = torch.finfo(dtype or a.dtype).eps * e.abs().max()
        allowed = 2 * (s.double() - e).abs().max() + ulp
        error = (a.double() - e).abs().max()
        if error > 0 or not torch.isfinite(error):
            ratio = (error / allowed).item()
            worst = max(worst, math.inf if math.isnan(ratio) else ratio)
    return worst


def check(case: Case, inputs: Inputs) -> dict[str, Verdict]:
    """Every contender against the definition in fp64."""
    exact = results_of(case, "definition", inputs.double())
    same_dtype = results_of(case, "definition", inputs)
    verdicts = {}
    for name in case.ways:
        try:
            with peak_memory(inputs.leaves[0].device) as peak:
                results = results_of(case, name, inputs)
            if name in case.unjudged:
                verdicts[name] = plausible(results, exact, case.unjudged[name])
            else:
                error = worst_error(results, same_dtype, exact, case.dtype)
                verdicts[name] = judged(name, error)
            if case.memory and peak:
                extra = (peak[0] - sum(y.nbytes for y in results)) / 2**20
                verdicts[name] = replace(verdicts[name], extra_mib=extra)
            del results  # may be gigabytes
        except Absent as absent:
            verdicts[name] = Verdict("absent", str(absent))
        except Exception as failure:  # a peer may raise anything; the others are still wanted
            verdicts[name] = Verdict("failed", one_line(failure))
    return verdicts


def judged(name: str, error: float) -> Verdict:
    """Ours is wrong above 1. A peer that only rounds worse is timed all the same, with a note:
    leaving it out would flatter us."""
    reason = "" if error <= 1 else f"error {error:.2f} of what is allowed"
    right = error <= (1 if name == "ours" else PEER_ERROR)
    return Verdict("right" if right else "wrong", reason, finite(error))


def plausible(results, exact, why: str) -> Verdict:
    """Of a contender whose values cannot be compared: as many, of the same shapes, all finite."""
    shapes = [y.shape for y in results] == [e.shape for e in exact]
    right = shapes and all(y.isfinite().all() for y in results)
    reason = f"not judged: {why}" if right else "not finite, or of another shape"
    return Verdict("right" if right else "wrong", reason)


def finite(x: float | None) -> float | None:
    """What JSON can hold."""
    return x if x is not None and math.isfinite(x) else None


# ------------------------------------------------------------------- timing


def run_case(
    case: Case, device: torch.device, speed: dict
) -> dict[str, tuple[Verdict, Timing | None]]:
    """Checks all contenders, then times those that are right and may be timed; not ours in the
    interpreter."""
    if any("compile" in name for name in case.ways):
        torch.compiler.reset()  # of one shape only: past 8 it would not compile any more
    try:
        inputs = case.inputs()
        verdicts = check(case, inputs)
    except Exception as error:  # such as no memory for fp64; other cases are smaller
        verdict = Verdict("failed", f"definition: {one_line(error)}")
        return dict.fromkeys(case.ways, (verdict, None))
    for name in case.untimed.keys() & verdicts.keys():
        verdicts[name] = replace(verdicts[name], reason=case.untimed[name])
    release(device)  # what fp64 took: no memory can be freed while a graph is captured
    copies = [inputs, *(inputs.copy() for _ in range(case.copies - 1))]

    def make(way, i: int) -> Run:
        return way(copies[i])

    contenders = {
        name: functools.partial(make, case.ways[name])
        for name, verdict in verdicts.items()
        if verdict.status == "right"
        and name not in case.untimed
        and (name != "ours" or device.type == "cuda")
    }
    timings = measure(contenders, device, copies=case.copies, **speed)
    for name, timing in timings.items():
        if timing.error:
            verdicts[name] = Verdict("failed", timing.error, verdicts[name].error)
    return {name: (verdict, timings.get(name)) for name, verdict in verdicts.items()}


def release(device: torch.device) -> None:
    """Gives cached memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows_of(
    case: Case, found: dict[str, tuple[Verdict, Timing | None]], ceilings: Ceilings, gpu: str
) -> Iterator[dict]:
    """A result for each contender, as it is written down."""
    times = {name: t.p50 for name, (_, t) in found.items() if t and not t.error}
    best = min((ms for name, ms in times.items() if name != "ours"), default=None)
    nominal = ceilings.floor_ms(case.bytes, case.flops, nominal=True)
    floor = ceilings.floor_ms(case.bytes, case.flops)
    target = next((ms for name, ms in case.target_ms.items() if name in gpu), None)
    for name, (verdict, timing) in found.items():
        ms = times.get(name)
        yield {
            "op": case.op,
            "shape": case.shape,
            "pass": case.kind,
            "contender": name,
            "status": "timed" if ms else verdict.status,
            "reason": verdict.reason,
            "error": verdict.error,
            "extra_mib": verdict.extra_mib,
            **({k: finite(v) if isinstance(v, float) else v
                for k, v in asdict(timing).items() if k not in ("reason", "error")}
               if timing else {}),
            "eager_because": timing.reason if timing else "",
            "bytes": case.bytes,
            "flops": case.flops,
            "floor_ms": floor,
            "nominal_floor_ms": nominal,
            "of_copy": floor / ms if ms else None,
            "of_nominal": nominal / ms if ms and nominal else None,
            "ratio_to_best_peer": ms / best if ms and best else None,
            "tflops": case.flops / ms / 1e9 if ms and case.flops else None,
            "target_ms": target,
            "target_met": ms <= target if ms and target and name == "ours" else None,
        }  # fmt: skip


def ratios_of(case: Case, rows: list[dict]) -> list[dict]:
    """The targets of ours that are shares of another's time, from all rows of this run."""

    def time_of(contender: str, shape: str) -> float | None:
        wanted = case.op, case.kind, shape, contender, "timed"
        names = "op", "pass", "shape", "contender", "status"
        found = [row["p50"] for row in rows if tuple(row[name] for name in names) == wanted]
        return found[-1] if found else None

    mine = time_of("ours", case.shape)
    found = []
    for target in case.ratios:
        other = time_of(target.contender, target.shape or case.shape)
        ratio = mine / other if mine and other else None
        met = ratio <= target.most if ratio else None
        found.append({**asdict(target), "ratio": ratio, "met": met})
    return found


# ------------------------------------------------------------------- output


def table(rows: list[dict]) -> str:
    """The rows of a case, for reading."""
    first = rows[0]
    floors = f"{first['floor_ms']:.4f} ms at a copy's rate"
    if first["nominal_floor_ms"]:
        floors = f"{first['nominal_floor_ms']:.4f} ms nominal, {floors}"
    title = f"{first['op']}, {first['pass']}: {first['shape']}"
    lines = ["", title, f"  {first['bytes'] / 1e6:.4g} MB, floor {floors}", COLUMNS]
    return "\n".join(lines + [line(row) for row in rows])


def line(row: dict) -> str:
    """One contender."""
    if row["status"] != "timed":
        return f"  {row['contender']:<{NAME}}{row['status']:>9} {row['reason']}".rstrip()
    spread = f"{row['p20']:.4f} .. {row['p80']:.4f}"
    nominal = f"{row['of_nominal']:.0%}" if row["of_nominal"] else "-"
    ratio = f"{row['ratio_to_best_peer']:.2f}" if row["ratio_to_best_peer"] else "-"
    eager = "" if row["graph"] or row["eager_because"] == "on a CPU" else row["eager_because"]
    rate = f"{row['tflops']:.3g} TFLOP/s" if row["tflops"] else ""
    memory = f"{row['extra_mib']:,.0f} MiB" if row["extra_mib"] is not None else ""
    notes = [rate, memory, row["reason"], eager]
    if row["thrown_away"]:
        notes.append(f"{row['thrown_away']} of {row['blocks']} blocks thrown away")
    if not row["trusted"]:
        notes.append("DOUBTFUL: the machine was busy")
    if row["target_met"] is not None:
        notes.append(f"target {row['target_ms']:.4g} ms {MET[row['target_met']]}")
    notes += map(ratio_note, row.get("ratios", ()))
    return (
        f"  {row['contender']:<{NAME}}{row['p50']:>9.4f} {spread:>18}{nominal:>8}"
        f"{row['of_copy']:>8.0%}{ratio:>8}  {'; '.join(filter(None, notes))}"
    ).rstrip()


def ratio_note(found: dict) -> str:
    """ "0.61 of torch varlen, target 0.67 met", say."""
    other = found["contender"] + (f" at {found['shape']}" if found["shape"] else "")
    if found["ratio"] is None:
        return f"target {found['most']:.2f} of {other}: not timed"
    return f"{found['ratio']:.2f} of {other}, target {found['most']:.2f} {MET[found['met']]}"


def summarise(rows: list[dict]) -> dict:
    """Counts, how ours stands, and what went wrong."""
    counts = {status: 0 for status in ("timed", "right", "wrong", "absent", "failed")}
    for row in rows:
        counts[row["status"]] += 1
    ours = [row for row in rows if row["contender"] == "ours"]
    ratios = [row["ratio_to_best_peer"] for row in ours if row["ratio_to_best_peer"]]
    problems = [row for row in rows if row["status"] in ("wrong", "failed")]
    names = ("op", "shape", "pass", "contender")
    return {
        **counts,
        "doubtful": sum(row.get("trusted") is False for row in rows if row["status"] == "timed"),
        "ours_worst_ratio": max(ratios, default=None),
        "targets_met": sum(row["target_met"] is True for row in ours),
        "targets_missed": sum(row["target_met"] is False for row in ours),
        "ratios": [
            f"{row['op']}, {row['pass']}: {row['shape']}: {ratio_note(found)}"
            for row in ours
            for found in row.get("ratios", ())
        ],
        "failures": [
            ", ".join(row[name] for name in names) + f": {row['reason']}" for row in problems
        ],
        "ours_failures": sum(row["contender"] == "ours" for row in problems),
    }


# --------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", help="operations; default: all")
    parser.add_argument("--shape", default="", help="only shapes whose description has this in it")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended to it")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="no case is begun after so many"
    )
    return parser


def chosen(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases of --op and --shape."""
    cases = all_cases(device, args.quick)
    known = list(dict.fromkeys(case.op for case in cases))
    if unknown := set(args.op or ()) - set(known):
        raise SystemExit(f"expected --op of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    ops = args.op or known
    cases = [case for case in cases if case.op in ops and args.shape in case.shape]
    if not cases:
        raise SystemExit(f"expected --shape in one of the shapes, got {args.shape!r}")
    return cases


def main() -> None:
    args = make_parser().parse_args()
    end = time.monotonic() + 60 * args.minutes
    # `-m` puts this repository first on the path, where a peer that imports transformers would
    # take our folder `kernels` for the package of that name.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    operations.mend_interpreter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = chosen(args, device)
    ceilings = measure_ceilings(device, args.quick, matmul=any(case.flops for case in cases))
    machine = fingerprint(device)
    print(json.dumps(machine))
    print(f"a copy moves {ceilings.copy / 1e9:,.0f} GB/s here")
    rows: list[dict] = []
    left_out = []
    for case in cases:
        if time.monotonic() > end:
            left_out.append(f"{case.op}, {case.kind}: {case.shape}")
            continue
        if args.quick:
            for name in [name for name in case.ways if "compile" in name]:
                del case.ways[name]  # compiling takes longer than all the rest
        found = run_case(case, device, QUICK if args.quick else SPEED)
        new = list(rows_of(case, found, ceilings, machine.get("gpu", "")))
        for row in new:
            if row["contender"] == "ours" and case.ratios:
                row["ratios"] = ratios_of(case, rows + new)
        print(table(new), flush=True)
        for row in new:
            append(args.out, {**row, "quick": args.quick, **machine})
        rows += new
        release(device)
    summary = {**summarise(rows), "left_out": left_out}
    print(json.dumps(summary))
    raise SystemExit(1 if summary["ours_failures"] else 0)


if __name__ == "__main__":
    main()
