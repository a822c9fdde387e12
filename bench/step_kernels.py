"""Where the time of an optimizer step goes: eager, kernel by kernel on a GPU, else by operator.

    python -m bench.step_kernels
    python -m bench.step_kernels --workload "tiny short" --device cpu

The workloads of `bench.finetune`, in minift's own loop: bf16, clipping, dropout of a BERT. Some
steps pass first, so that all is compiled; then torch's profiler sees STEPS of them. Each kernel is
a line of bench/results/step_kernels.jsonl: `ms` and `launches` a step, and its `share` of the time
of all kernels. Gaps between kernels are in none. One of ours is named after its file; kernels of
one name are one line, named after all their files. The last line printed is JSON: ms a step in
kernels.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.codegen import find_launches
from bench.measure import ROOT, append, fingerprint
from bench.workloads import DROPOUT, LARGE, TINY, WORKLOADS, Data, model_of, train_config
from minift import train
from minift.train import Step

RESULTS = ROOT / "bench" / "results" / "step_kernels.jsonl"
WARM_UP, STEPS = 5, 5
FIRST = 3  # workloads


def steps_of(name: str, device: torch.device) -> Iterator[Step]:
    """Training, as many steps as are wanted, kernel by kernel."""
    known = {workload.name: workload for workload in (*WORKLOADS, *LARGE, TINY)}
    if name not in known:
        raise SystemExit(f"expected --workload of {', '.join(known)}, got {name!r}")
    workload, n = known[name], WARM_UP + STEPS
    model = model_of(workload.model, 0.0 if workload.predicts else DROPOUT, seed=0)
    batches = Data.make(workload, n, seed=0).batches
    settings = replace(train_config(workload, n, seed=0), graph="off")
    return train(model.to(device), batches, settings)


def profile_steps(steps: Iterator[Step], device: torch.device) -> list[dict]:
    """What each kernel of a step takes, the slowest first.

    Args:
        steps: at least WARM_UP + STEPS of them.
        device: kernels of a GPU, or operators of a CPU with what they call left out.
    """
    cuda = device.type == "cuda"
    finish = torch.cuda.synchronize if cuda else (lambda: None)
    for _ in range(WARM_UP):
        next(steps)
    finish()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            next(steps)
        finish()
    files = files_of_kernels()
    found = []
    for event in seen.key_averages():
        on_device = event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        # What a name with "#" spans (an optimizer's step) is there in its kernels once more.
        if on_device and us > 0 and not event.is_user_annotation and "#" not in event.key:
            ours = ", ".join(files.get(event.key, []))
            name = f"{ours}.{event.key}" if ours else event.key
            found.append((-us / 1e3 / STEPS, name, event.count / STEPS))
    total = sum(ms for ms, _, _ in found)
    return [
        {"kernel": name, "ms": -ms, "launches": count, "share": ms / total}
        for ms, name, count in sorted(found)
    ]


def files_of_kernels() -> dict[str, list[str]]:
    """Name of a kernel of ours -> the files that have one of that name."""
    files: dict[str, list[str]] = {}
    for launch in find_launches("minift.kernels"):
        file, _, kernel = launch.name.split()[0].partition(".")
        if file not in files.setdefault(kernel, []):
            files[kernel].append(file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    first = [workload.name for workload in WORKLOADS[:FIRST]]
    parser.add_argument("--workload", nargs="+", default=first, help="a model and lengths")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended to it")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    machine, totals = fingerprint(device), {}
    for workload in args.workload:
        rows = profile_steps(steps_of(workload, device), device)
        for row in rows:
            append(args.out, {"bench": "step_kernels", "workload": workload, **row, **machine})
        totals[workload] = sum(row["ms"] for row in rows)
        print(f"\n{workload}: {totals[workload]:.3f} ms a step in {len(rows)} kernels")
        for row in rows[:15]:
            print(f"{row['ms']:10.4f} ms {row['share']:5.0%} {row['launches']:6.4g} "
                  f"times  {row['kernel'][:70]}")  # fmt: skip
    print(json.dumps(totals))


if __name__ == "__main__":
    main()
