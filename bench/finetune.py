"""Fine-tuning beside transformers and the strongest plain torch, side by side in one process.

    python -m bench.finetune                        on a GPU, every workload and peer
    python -m bench.finetune --workload "GPT-2 1.5B LM 1024"    a large GPT, only by its name
    python -m bench.finetune --minutes 8            the most important ones first, in that time
    python -m bench.finetune --tiny                 a small model, on anything, in seconds
    python -m bench.finetune --device cpu           beside transformers' Trainer: bench/trainers.py
    python -m bench.finetune --device cpu --task lm instruct --data DIR     bench/language.py

All peers train the same random weights on the same rows in the same order, with the same dropout,
clipping, schedule and decay, in blocks of steps in turn (A B C A B C ...). Moments and masters are
fp32, but for the peer that is named for its bf16 ones. The peers' batches are put together before
the clock starts and wait in pinned memory, as a loader that is never late would have it; minift's
loop makes its own as it goes. Its last layer computes first tokens alone, which is all that a
classifier needs; the peers' compute all, as their models come.

A GPT predicts tokens in full blocks, without dropout; its peers are eager and compiled transformers
and a plain GPT in torch, compiled. Their losses are compared before anything is timed.

Peers are in `bench.peers` and `bench.gpt_peers`, models and lengths in `bench.workloads`, the
clocks in `bench.rounds`, whether all learn alike in `bench.learning`, floors in `bench.floors`.

Each workload and peer is one JSON line of --out (default bench/results/finetune_gpu.jsonl):

    bench, workload, model, data    "finetune", "BERT-base SST-2", "BERT-base", "SST-2"
    peer, status, reason            status "timed", "unavailable" or "failed"; reason: why not timed
    note                            what this peer does not share with the others; "" if nothing
    comparable                      false: lower precision or no attention dropout, a row of its own
    device, dtype, states           "cuda", "bf16", "fp32": of the moments and masters
    task                            "classification", or "lm": tokens are predicted
    batch, micro_batches            sequences in a step; what they are cut into, for memory
    tokens_per_step                 real tokens, the mean of the timed steps
    tokens_per_second               real tokens by the wall clock, median over the blocks: headline
    sequences_per_second            likewise
    p10, p50, p90                   ms of a step between device events, over all blocks that count
    wall_ms, event_ms               a step by the wall clock and by events: means of those blocks
    block_ms, spread                medians of each block; (highest - lowest) / median
    blocks, thrown_away, steps      timed; beside a slow canary; steps that count
    warm_up_steps, prepare_seconds  untimed steps; seconds of all compiling, capturing, warming up
    peak_allocated_mib, peak_reserved_mib    beyond what lay there before the peer was made
    model_tflop                     a step's, on real tokens, backward twice forward
    mfu_nominal, nominal_tflops     of the datasheet's 989; null on other machines than an H200
    mfu_measured, measured_tflops   of the matmul measured in this run
    floor_ms, target_ms             bench.floors, of the same lengths, packed; null likewise
    floor_measured_ms               likewise, with the matmul and the copy measured in this run
    of_floor, of_target             floor_ms / p50, target_ms / p50
    sm_mhz, watts                   while this peer was warming up; null: nothing told
    first_loss, last_loss           of the run; the first before any update
    check                           dropout off: {dtype, loss_difference, cosine, passed}, or null;
                                    minift's in fp32 as well for the first workload
    learning                        {inside, learned, passed} of --learning, or null
    best_peer, ratio_to_best_peer, ratio_to_default_peer    minift's row: quotients of tokens/s
    trusted, doubts                 false with the reasons; a doubtful row is shown, not hidden
    seed, utc, commit, gpu, driver, cpu, cores, threads, torch, triton, python, transformers

A row that was not timed has the keys up to `batch`, `trusted` false and what it ran on. With
--learning there are rows of bench "learning" as well: workload, peer, seeds, steps, window, loss
(means over windows of steps, each a list over the seeds), inside (the share of windows at which the
mean lies in the band of the others' seeds), learned (the loss fell by a tenth), passed.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import floors, language, learning, trainers
from bench.ceilings import Ceilings, measure_ceilings
from bench.gpt_peers import GPT_PEERS
from bench.measure import ROOT, append, fingerprint, one_line
from bench.peers import PEERS, Job, Peer, Unavailable, import_transformers
from bench.rounds import MIB, Course, Plan, counted, numbers, run_peers, timed_facts
from bench.workloads import (
    LARGE,
    TINY,
    TINY_GPT,
    WORKLOADS,
    Data,
    Workload,
    train_config,
    write_model,
)

RESULTS = ROOT / "bench" / "results" / "finetune_gpu.jsonl"
SHORTEST = 40.0  # seconds: in less no workload is begun, but the first
FIRST_SHARE = 0.45  # of the time that is left, for the workload that is next
LEARNING = 2  # workloads that are learned from with --learning, the first that classify
LONG = 6  # a block of a workload that predicts tokens has so many times fewer steps: they are long
SUMMARY = ("tokens_per_second", "p50", "of_target", "best_peer", "ratio_to_best_peer",
           "ratio_to_default_peer", "trusted")  # fmt: skip
FLOORS = ("floor_ms", "target_ms", "floor_measured_ms", "of_floor", "of_target")
DEFAULT = "transformers"  # the peer that ratio_to_default_peer is of


@dataclass(frozen=True)
class Session:
    """What is the same for all workloads of a run."""

    device: torch.device
    dtype: str
    seed: int
    kinds: list[type[Peer]]
    ceilings: Ceilings
    out: Path | None
    exact: bool = True  # minift is checked in fp32 as well: its kernels are compiled once more

    def write(self, row: dict) -> None:
        """Appends a row to --out, where there is one."""
        if self.out:
            append(self.out, finite(row))


def finite(value):
    """A row, or a part of it, with None for what is no finite number: JSON knows none."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_workload(
    workload: Workload, session: Session, plan: Plan, learned: dict[str, dict]
) -> list[dict]:
    """The rows of all peers, written as well.

    Args:
        learned: what `learn_rows` found of them.
    """
    device = session.device
    with tempfile.TemporaryDirectory() as folder:
        plain, fixed = write_model(workload.model, Path(folder), session.seed)
        data = Data.make(workload, plan.total, session.seed)
        config = train_config(workload, plan.total, session.seed, session.dtype)
        job = Job(plain, data, config, device)
        courses, canaries = run_peers(session.kinds, job, plan)
        # Not before: it compiles what `prepare_seconds` should hold.
        checks = check(session, Job(fixed, data, config, device))
    rows = [peer_row(course, workload, job, session, plan, canaries) for course in courses]
    for row in rows:
        if row["status"] == "timed":
            row["check"], row["learning"] = (d.get(row["peer"]) for d in (checks, learned))
            add_doubts(row)
    add_ratios(rows)
    facts = fingerprint(device) | {"transformers": transformers_version()}
    # The clock of the fingerprint is that of a GPU at rest.
    rows = [row | {"seed": session.seed, **facts, "sm_mhz": row.get("sm_mhz")} for row in rows]
    for row in rows:
        session.write(row)
    return rows


def check(session: Session, job: Job) -> dict[str, dict]:
    """What `learning.check_peers` finds; without transformers, nothing."""
    try:
        return learning.check_peers(session.kinds, job, session.exact)
    except Exception as error:  # the rows say that nothing was checked
        print(f"  not checked: {one_line(error)}", flush=True)
        return {}


def peer_row(
    course: Course, workload: Workload, job: Job, session: Session, plan: Plan, canaries
) -> dict:
    """A line of the results, all but ratios, checks and what it ran on."""
    row = {
        "bench": "finetune",
        "workload": workload.name,
        "model": workload.model,
        "data": workload.data,
        "peer": course.name,
        "status": course.status,
        "reason": course.reason,
        "note": course.note,
        "comparable": course.kind.comparable,
        "device": session.device.type,
        "dtype": session.dtype,
        "states": course.kind.states,
        "task": "lm" if workload.predicts else "classification",
        "batch": workload.batch,
        "micro_batches": course.micro_batches,
        "trusted": False,
    }
    if course.status != "timed":
        return row
    facts = timed_facts(course, job, canaries)
    steps = [job.data.lengths(k) for block in counted(course, canaries) for k in numbers(block)]
    cuda = session.device.type == "cuda"
    return row | {
        **facts,
        "warm_up_steps": plan.warm_up,
        "prepare_seconds": course.prepare_seconds,
        "peak_allocated_mib": course.allocated / MIB if cuda else None,
        "peak_reserved_mib": course.reserved / MIB if cuda else None,
        **speed_facts(workload, steps, facts, session.ceilings),
        "sm_mhz": course.sm_mhz,
        "watts": course.watts,
        "first_loss": course.first_loss,
        "last_loss": course.last_loss,
    }


def speed_facts(
    workload: Workload, steps: list[list[int]], facts: dict, ceilings: Ceilings
) -> dict:
    """How near a peer comes to what the machine can do. Floors are an H200's: null elsewhere.

    Args:
        steps: the lengths of each step that counts.
        facts: of `timed_facts`.
    """
    sizes = floors.Sizes.of(workload.model)
    floor = floors.mean_floor(sizes, steps)
    flops = floor.model_flops / facts["tokens_per_step"] * facts["tokens_per_second"]
    nominal, matmul = ceilings.nominal_matmul, ceilings.matmul
    found = {
        "model_tflop": floor.model_flops / 1e12,
        "mfu_nominal": nominal and flops / nominal,
        "nominal_tflops": nominal and nominal / 1e12,
        "mfu_measured": matmul and flops / matmul,
        "measured_tflops": matmul and matmul / 1e12,
    }
    if nominal is None:  # another machine
        return found | dict.fromkeys(FLOORS)
    here = floors.mean_floor(sizes, steps, floors.measured(matmul, ceilings.copy))
    shares = floor.floor / facts["p50"], floor.target / facts["p50"]
    return found | dict(zip(FLOORS, (floor.floor, floor.target, here.floor, *shares), strict=True))


def add_doubts(row: dict) -> None:
    """What else speaks against a timed row; whether it is trusted."""
    doubts = row["doubts"]
    for name in ("first_loss", "last_loss"):
        if row[name] is None or not math.isfinite(row[name]):
            doubts.append(f"{name} is no finite number")
    if row["check"] and not row["check"]["passed"]:
        doubts.append("begins other than transformers: see check")
    if row["learning"] and not row["learning"]["passed"]:
        doubts.append("learns other than its peers: see learning")
    if row["peer"] == "minift" and not row["check"]:
        doubts.append("was not checked beside transformers")
    row["trusted"] = not doubts


def add_ratios(rows: list[dict]) -> None:
    """Ours beside the best comparable peer, and beside the default one."""
    timed = {row["peer"]: row for row in rows if row["status"] == "timed"}
    mine = timed.get("minift")
    if mine is None:
        return
    rate = "tokens_per_second"
    others = [r for n, r in timed.items() if not n.startswith("minift") and r["comparable"]]
    best = max(others, key=lambda row: row[rate], default=None)
    default = timed.get(DEFAULT)
    mine["best_peer"] = best and best["peer"]
    mine["ratio_to_best_peer"] = best and mine[rate] / best[rate]
    mine["ratio_to_default_peer"] = default and mine[rate] / default[rate]


def transformers_version() -> str | None:
    """Of what the peers import."""
    try:
        return import_transformers().__version__
    except Unavailable:
        return None


def learn_rows(
    workload: Workload, session: Session, seeds: Sequence[int], steps: int
) -> dict[str, dict]:
    """Writes one row a peer: its loss over the seeds, and whether it lies in the band of the
    others. That is returned, by the peer's name."""
    with tempfile.TemporaryDirectory() as folder:

        def make_job(seed: int) -> Job:
            plain, _ = write_model(workload.model, Path(folder) / str(seed), seed)
            config = train_config(workload, steps, seed, session.dtype)
            return Job(plain, Data.make(workload, steps, seed), config, session.device)

        curves, reasons = learning.learn(session.kinds, make_job, seeds)
    for name, reason in reasons.items():
        print(f"  {name} did not learn: {reason}", flush=True)
    judged = learning.judge(curves)
    rows = [
        {
            "bench": "learning",
            "workload": workload.name,
            "peer": name,
            "seeds": list(seeds),
            "steps": steps,
            "window": learning.WINDOW,
            "loss": [list(point) for point in zip(*curve, strict=True)],
            **judged.get(name, {"inside": None, "passed": None}),
            **fingerprint(session.device),
        }
        for name, curve in curves.items()
    ]
    for row in rows:
        session.write(row)
    return judged


def table(rows: list[dict]) -> list[str]:
    """One line a peer, the fastest first."""
    lines = [f"  {'peer':<32}{'tokens/s':>12}{'ms':>9}{'of target':>11}{'spread':>8}  doubts"]
    timed = [row for row in rows if row["status"] == "timed"]
    for row in sorted(timed, key=lambda row: -row["tokens_per_second"]):
        target = "-" if row["of_target"] is None else f"{row['of_target']:.1%}"
        lines.append(
            f"  {row['peer']:<32}{row['tokens_per_second']:>12,.0f}{row['p50']:>9.3f}"
            f"{target:>11}{row['spread']:>8.1%}  {'; '.join(row['doubts'])}".rstrip()
        )
    return lines


def run(args: argparse.Namespace, device: torch.device) -> dict:
    """All workloads in the time there is, the first with the largest share of it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    end = time.monotonic() + 60 * args.minutes
    workloads = [TINY, TINY_GPT]
    if not args.tiny:
        workloads = chosen(WORKLOADS + LARGE, args.workload) if args.workload else WORKLOADS
    out = args.out or (None if args.tiny else RESULTS)
    ceilings = measure_ceilings(device, quick=args.tiny)
    chosen([*{kind.name: kind for kind in (*PEERS, *GPT_PEERS)}.values()], args.peers)
    session = Session(device, args.dtype or "bf16", args.seeds[0], [], ceilings, out)
    summary: dict = {}
    learned_from = [workload for workload in workloads if not workload.predicts][:LEARNING]
    for i, workload in enumerate(workloads):
        left = end - time.monotonic()
        if i and left < SHORTEST:
            print(f"{workload.name}: no time was left", flush=True)
            continue
        print(workload.name, flush=True)
        last = i + 1 == len(workloads)
        end_here = end if last else time.monotonic() + max(left * FIRST_SHARE, SHORTEST)
        here = replace(session, kinds=peers_of(workload, args.peers), exact=i == 0)
        learning_steps = args.learning * (workload in learned_from)
        try:
            rows = time_workload(workload, here, args, end_here, learning_steps)
        except Exception as error:  # such as a GPU that is lost; what was written is there
            print(f"  failed: {one_line(error)}", flush=True)
            summary[workload.name] = {"failed": one_line(error)}
            continue
        summary[workload.name] = {
            key: row.get(key) for row in rows if row["peer"] == "minift" for key in SUMMARY
        }
    return summary


def time_workload(
    workload: Workload, session: Session, args: argparse.Namespace, end: float, learning_steps: int
) -> list[dict]:
    """The rows of a workload, shown as well.

    Args:
        end: until when, of time.monotonic().
        learning_steps: to learn first, over all seeds; 0: not.
    """
    learned = {}
    if learning_steps:
        learned = learn_rows(workload, session, args.seeds, learning_steps)
    few = LONG if workload.predicts else 1
    plan = Plan(max(2, args.warm_up // few), args.blocks, max(3, args.steps // few), end)
    rows = run_workload(workload, session, plan, learned)
    print("\n".join(table(rows)), flush=True)
    return rows


def peers_of(workload: Workload, names: Sequence[str]) -> list[type[Peer]]:
    """Those of a workload, of these names or all; not more than there is room for."""
    known = GPT_PEERS if workload.predicts else PEERS
    return [kind for kind in known if not names or kind.name in names][: workload.room]


def chosen(known: Sequence, names: Sequence[str]) -> list:
    """Those with these names, in the order that is known; without names, all.

    Raises:
        SystemExit: there is none of some name.
    """
    if unknown := set(names) - {one.name for one in known}:
        choice = ", ".join(repr(one.name) for one in known)
        raise SystemExit(f"expected {choice}, got {', '.join(map(repr, sorted(unknown)))}")
    return [one for one in known if not names or one.name in names]


def parse_args() -> argparse.Namespace:
    parser = trainers.make_parser(__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="file of results")
    cpu = parser.add_argument_group("beside transformers' Trainer, on a CPU")
    names = list(trainers.TRAINERS)
    cpu.add_argument("--trainers", nargs="+", choices=names, default=names)
    tasks = ("classification", *language.CASES)
    cpu.add_argument("--task", nargs="+", choices=tasks, default=tasks[:1])
    cpu.add_argument("--turns", type=int, default=5, help="of lm and instruct")
    cpu.add_argument("--turn-steps", type=int, default=3, help="steps in a turn")
    side = parser.add_argument_group("side by side, on a GPU or with --tiny")
    side.add_argument("--tiny", action="store_true", help="a small model, on any device")
    side.add_argument("--minutes", type=float, default=60.0, help="for all workloads")
    side.add_argument("--workload", nargs="+", default=[], help="names; default: all")
    side.add_argument("--peers", nargs="+", default=[], help="names; default: all")
    side.add_argument("--blocks", type=int, default=5)
    side.add_argument("--steps", type=int, default=30, help="in a block")
    side.add_argument("--warm-up", type=int, default=40, help="untimed steps before all blocks")
    side.add_argument("--learning", type=int, nargs="?", const=200, default=0, metavar="STEPS",
                      help="whether all learn alike, over --seeds")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    if device.type == "cuda" and found == "cpu":
        raise SystemExit("expected a GPU, found none: --device cpu, or --tiny")
    if args.threads:
        torch.set_num_threads(args.threads)
    side_by_side = args.tiny or device.type == "cuda"
    if side_by_side:
        print(json.dumps(run(args, device)))
        return
    summary = language.run(args)
    if "classification" in args.task:
        summary |= trainers.run(args)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
