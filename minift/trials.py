"""Several runs one after the other: what the runs of some seeds and the trials of a search share.

OUTPUT/
  seed-0/ seed-1/   a run each, as by itself, to the same bits
  seeds.json        how they ended, their means and standard deviations
"""

import gc
import json
import math
import shutil
import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from .config import RunConfig, TrainConfig
from .data import fingerprint
from .errors import InputError, Notice
from .files import cannot_write, read_json, write_json
from .run import SMALLER, Evaluation, Finished, check_given, check_same, fine_tune
from .train import Diverged, Step

SHOWN = 5  # metrics in a table


@dataclass(frozen=True)
class Begun:
    """One of several runs begins, or goes on."""

    name: str  # of its folder
    title: str


@dataclass(frozen=True)
class Ended:
    """One of several runs has ended."""

    name: str  # of its folder
    status: str  # finished, diverged, out of memory, refused
    summary: dict[str, Any]  # of a finished run; a metric that is no finite number is None
    why: str = ""  # it has not finished, or has learned nothing


Event = Notice | Step | Evaluation | Finished | Begun | Ended


def attempt(
    run: RunConfig, config: TrainConfig, title: str, files: dict[str, str]
) -> Generator[Event, None, Ended]:
    """One of several runs; with resume_from_checkpoint it is skipped if it has finished, else it
    goes on where it was left.

    Args:
        run, config: of this run.
        title: for who is watching.
        files: path -> sha256, of those that are known; others are added.

    Raises:
        InputError: the folder holds a finished run of other settings or data.
    """
    folder, begun = Path(run.output_dir), False
    yield Begun(folder.name, title)
    if run.resume_from_checkpoint:
        if (summary := summary_of(folder)) is not None:
            check_finished(run, config, files)
            return Ended(folder.name, "finished", summary)
        begun = (folder / "run.json").is_file()
        # A run that was killed while its folder was made has left nothing to go on from.
        overwrites = run.overwrite_output_dir or not begun
        resume = "auto" if begun else ""
        run = replace(run, resume_from_checkpoint=resume, overwrite_output_dir=overwrites)
    try:
        done = None
        for event in fine_tune(run, config):
            if isinstance(event, Finished):
                done = event
            else:
                yield event
        return Ended(folder.name, "finished", finite(done.summary), done.verdict)
    except Diverged as error:
        return Ended(folder.name, "diverged", {}, str(error))
    except torch.OutOfMemoryError as error:
        return Ended(folder.name, "out of memory", {}, str(error).split("\n")[0])
    except InputError as error:
        return Ended(folder.name, "refused", {}, str(error))
    finally:
        event = None  # a step holds on to the device's memory
        gc.collect()  # and so do the cycles of a model


def summary_of(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, which is the last line of its metrics; None: there is none."""
    try:
        last = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[-1:]
    except OSError:
        return None
    if not last or not last[0].endswith(b"\n"):  # it was killed while it wrote
        return None
    event = json.loads(last[0])
    return {k: v for k, v in event.items() if k != "step"} if "output_dir" in event else None


def check_finished(run: RunConfig, config: TrainConfig, files: dict[str, str]) -> None:
    """Raises InputError when the run in run.output_dir was one of other settings or data."""
    folder = Path(run.output_dir)
    before = read_json(folder / "run.json", ("run", "config", "files"))
    for path in before["files"].keys() - files.keys():
        files[path] = fingerprint(path)
    given = {k: v for k, v in asdict(run).items() if k != "token"}
    check_same(folder, before, {"run": given, "config": asdict(config), "files": files})


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """The same, with None for what is not a finite number."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()
    }


def best_of(values: dict[str, float | None], metric: str) -> str | None:
    """The name of the best value, of equal ones the first; None: there is no value."""
    known = {name: value for name, value in values.items() if value is not None}
    sign = -1 if metric in SMALLER else 1
    return max(known, key=lambda name: sign * known[name]) if known else None


def fine_tune_seeds(run: RunConfig, config: TrainConfig | None = None) -> Iterator[Event]:
    """Runs `minift train --seeds N`, yielding what happens; the last event is `Finished`, whose
    summary has the means over the seeds.

    Args:
        run: whose output_dir gets a folder for each of `seeds` seeds.
        config: with the first of the seeds.

    Raises:
        InputError: something given is wrong, or no seed could be run.
    """
    check_given(run)
    config, output = config or TrainConfig(), Path(run.output_dir)
    configs = {f"seed-{s}": replace(config, seed=s) for s in seeds_of(run, config)}
    check_output(run)
    if not run.validation_file:
        yield Notice(
            "every seed draws its own validation rows, so part of what differs between seeds is "
            "theirs: --validation_file keeps them the same",
            loud=True,
        )
    files, ended = {}, recorded(output) if run.resume_from_checkpoint else {}
    ended = {name: old for name, old in ended.items() if name in configs}
    for number, (name, one) in enumerate(configs.items(), 1):
        alone = replace(run, seeds=1, output_dir=str(output / name))
        if name in ended:  # and has no summary, as it would not have again
            check_finished(alone, one, files)
        else:
            title = f"seed {one.seed}, {number} of {len(configs)}"
            ended[name] = yield from attempt(alone, one, title, files)
        if ended[name].status == "refused":  # so would be the others
            raise InputError(ended[name].why)
        yield ended[name]
        done = [ended[name] for name in configs if name in ended]
        write_json(output / "seeds.json", {"runs": [asdict(e) for e in done]})
    seeds = {name: one.seed for name, one in configs.items()}
    summary = summarise(done, seeds, output)
    write_json(output / "seeds.json", {"runs": [asdict(e) for e in done], "summary": summary})
    yield Finished(summary, seeds_table(done, seeds, summary), "")


def seeds_of(run: RunConfig, config: TrainConfig) -> range:
    """The seeds of the runs."""
    return range(config.seed, config.seed + run.seeds)


def check_output(run: RunConfig) -> None:
    """Deletes what is to be overwritten.

    Raises:
        InputError: the folder of the runs of some seeds holds something else, or runs that are not
            to be gone on with.
    """
    output, resume = Path(run.output_dir), run.resume_from_checkpoint
    if resume not in ("", "auto"):
        raise InputError(f"expected --resume_from_checkpoint auto with --seeds, got {resume!r}")
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    ours = {name for name in there if name.startswith("seed-") or name == "seeds.json"}
    if there and not (run.overwrite_output_dir or (resume and ours)):
        raise InputError(
            f"{output}: is there already and not empty: choose another folder, "
            "--resume_from_checkpoint auto, or --overwrite_output_dir"
        )
    if not resume:
        try:
            for old in output.glob("seed-*/run.json"):  # of other seeds too, which are not run now
                shutil.rmtree(old.parent)
            (output / "seeds.json").unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(output, error) from None


def recorded(output: Path) -> dict[str, Ended]:
    """The seeds that are known to diverge: they would again."""
    if not (output / "seeds.json").is_file():
        return {}
    runs = read_json(output / "seeds.json", ("runs",))["runs"]
    return {r["name"]: Ended(**r) for r in runs if r["status"] == "diverged"}


def summarise(ended: Sequence[Ended], seeds: dict[str, int], output: Path) -> dict[str, Any]:
    """Means and standard deviations (n - 1) of the metrics over the seeds that have finished."""
    done = [run for run in ended if run.status == "finished"]
    summary: dict[str, Any] = {}
    first = done[0].summary if done else {}
    for name in (n for n in first if n.startswith(("eval_", "test_"))):
        values = [run.summary.get(name) for run in done]
        whole = None not in values
        summary[f"{name}_mean"] = statistics.fmean(values) if whole else None
        summary[f"{name}_std"] = statistics.stdev(values) if whole and len(done) > 1 else None
    metric = first.get("best_metric", "")
    best = best_of({run.name: run.summary.get(f"eval_{metric}") for run in done}, metric)
    return summary | {
        "best_metric": metric,
        "seeds": list(seeds.values()),
        "finished": len(done),
        "failed": [seeds[run.name] for run in ended if run.status != "finished"],
        "best_seed": None if best is None else seeds[best],
        "train_runtime": sum(run.summary["train_runtime"] for run in done),
        "output_dirs": [str(output / name) for name in seeds],
    }


def metrics_shown(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Names of a few validation metrics, the one that decides first; none of single labels."""
    first = summaries[0] if summaries else {}
    decides = f"eval_{first.get('best_metric')}"
    others = [n for n in first if n.startswith("eval_") and "/" not in n and n != decides]
    return [n for n in (decides, *others) if n in first][:SHOWN]


def seeds_table(ended: Sequence[Ended], seeds: dict[str, int], summary: dict[str, Any]) -> str:
    """A line for each seed, then their mean and standard deviation."""
    names = metrics_shown([run.summary for run in ended if run.status == "finished"])
    lines = [["seed", *(name.removeprefix("eval_") for name in names)]]
    for run in ended:
        best = seeds[run.name] == summary["best_seed"]
        cells = [shown(run.summary.get(name)) for name in names]
        cells = cells if run.status == "finished" else [run.status]
        lines.append([str(seeds[run.name]), *cells, *["best"] * best])
    for what in ("mean", "std") if names else ():
        lines.append([what, *(shown(summary[f"{name}_{what}"]) for name in names)])
    return align(lines)


def shown(value: Any) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, as columns; the first is aligned to the left."""
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    rows = (
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)
