"""A search for settings: trials of a grid, or drawn at random (Bergstra and Bengio 2012, "Random
Search for Hyper-Parameter Optimization"), one after the other.

OUTPUT/
  trial-001/ ...    a run each, or one of several seeds
  trials.jsonl      a line for each trial that has ended
"""

import itertools
import json
import math
import random
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .config import RunConfig, TrainConfig, as_setting
from .errors import InputError, Notice
from .files import cannot_write, make_folder, write_file
from .methods import rate_of
from .prepare import check_flags
from .run import Finished, check_given
from .trials import (
    Begun,
    Ended,
    Event,
    align,
    attempt,
    best_of,
    check_finished,
    fine_tune_seeds,
    metrics_shown,
    shown,
)

# The search's own to set, or what makes the metrics of two trials differ in kind.
FIXED = (
    "output_dir resume_from_checkpoint overwrite_output_dir seeds token task task_name "
    "metric_for_best_model"
).split()
RANDOM_TRIALS = 20


@dataclass(frozen=True)
class SearchConfig:
    """What is searched, and how: the table [search] of a TOML file."""

    space: dict[str, Any]  # setting -> list of values, or {low, high} and perhaps log: true
    method: str = "grid"  # all combinations; random: draws, also of ranges
    trials: int = 0  # 0: all of a grid, or 20 that are random
    seed: int = 0  # of the draws
    keep: str = "best"  # models of the best trial only; all

    def __post_init__(self):
        for name, choices in (("method", ("grid", "random")), ("keep", ("best", "all"))):
            if getattr(self, name) not in choices:
                wanted = " or ".join(choices)
                raise InputError(f"expected {name} {wanted}, got {getattr(self, name)!r}")
        for name in ("trials", "seed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise InputError(f"expected {name} as a number from 0, got {value!r}")
        if not self.space:
            raise InputError("expected settings to search in [search], got none")
        space: dict[str, Any] = {}
        for name, values in self.space.items():
            field, checked = _values(name, values)
            if field in FIXED or field in space:
                why = "given twice" if field in space else "the same in all trials"
                raise InputError(f"[search] {name}: is {why}: leave it out")
            if isinstance(checked, dict) and self.method == "grid":
                raise InputError(f'[search] {name}: a range needs method = "random", or give a '
                                 "list")  # fmt: skip
            space[field] = checked
        if self.method == "grid" and self.trials:
            raise InputError("[search] trials: a grid has as many as there are combinations: "
                             'leave it out, or method = "random"')  # fmt: skip
        object.__setattr__(self, "space", space)

    def settings(self) -> list[dict[str, Any]]:
        """The settings of every trial, in order; of a grid the last name changes fastest."""
        if self.method == "grid":
            return [
                dict(zip(self.space, values, strict=True))
                for values in itertools.product(*self.space.values())
            ]
        trials = range(1, (self.trials or RANDOM_TRIALS) + 1)
        return [{n: draw(v, f"{self.seed} {t} {n}") for n, v in self.space.items()} for t in trials]


def _values(name: str, values: Any) -> tuple[str, Any]:
    """A setting's field and what it may be, checked."""
    ends = isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}
    if not ends and not (isinstance(values, list) and values):
        wanted = "a list of values or {low = ..., high = ...}, with log = true perhaps"
        raise InputError(f"[search] {name}: expected {wanted}, got {values!r}")
    try:
        if not ends:
            return as_setting(name, values[0])[0], [as_setting(name, value)[1] for value in values]
        field, low = as_setting(name, values["low"])
        high, log = as_setting(name, values["high"])[1], values.get("log", False)
    except InputError as error:
        raise InputError(f"[search] {error}") from None
    numbers = type(low) in (int, float) and math.isfinite(low) and math.isfinite(high)
    if not numbers or not low < high or type(log) is not bool or (log and low <= 0):
        wanted = "numbers low < high" + (", above 0 for log = true" if log else "")
        raise InputError(f"[search] {name}: expected {wanted}, got {values!r}")
    return field, {"low": low, "high": high, "log": log}


def draw(values: list | dict, key: str) -> Any:
    """A value of a list or range, the same for the same key in any process."""
    source = random.Random(key)
    if isinstance(values, list):
        return values[source.randrange(len(values))]
    low, high = values["low"], values["high"]
    whole = isinstance(low, int)
    if not values["log"]:
        return source.randint(low, high) if whole else source.uniform(low, high)
    # A whole number k stands for [k, k + 1): else the ends would be drawn half as often.
    value = math.exp(source.uniform(math.log(low), math.log(high + whole)))
    return min(max(int(value) if whole else value, low), high)


def from_table(table: Any) -> tuple[SearchConfig, int | None]:
    """The search of a table [search], and the seeds of each trial, where it says so.

    Lists and ranges are searched, all else says how: `method = "random"` is the search's, and
    `method = ["full", "bitfit"]` the training's.
    """
    if not isinstance(table, dict):
        raise InputError("expected a table [search], got none")
    space = {k: v for k, v in table.items() if isinstance(v, list | dict)}
    how = {k: v for k, v in table.items() if k not in space}
    seeds = how.pop("seeds", None)
    if seeds is not None:
        as_setting("seeds", seeds)
    known = [f.name for f in fields(SearchConfig) if f.name != "space"]
    for name, value in how.items():
        if name not in known:
            as_setting(name, value)  # raises where the name is unknown
            raise InputError(f"[search] {name}: expected a list of values, got {value!r}; what all "
                             "trials share stands above [search]")  # fmt: skip
    return SearchConfig(space, **how), seeds


@dataclass(frozen=True)
class Trial:
    """A trial that is to be run."""

    name: str  # of its folder
    settings: dict[str, Any]  # that are searched
    run: RunConfig
    config: TrainConfig


def trials_of(search: SearchConfig, run: RunConfig, config: TrainConfig) -> list[Trial]:
    """All trials, made and checked as far as can be without data.

    Raises:
        InputError: a trial has settings that cannot be.
    """
    found, ours = [], {f.name for f in fields(RunConfig)}
    for number, settings in enumerate(search.settings(), 1):
        name = f"trial-{number:03d}"
        of_run = {k: v for k, v in settings.items() if k in ours}
        of_config = {k: v for k, v in settings.items() if k not in ours}
        if config.learning_rate == TrainConfig.learning_rate:  # none is given
            of_config |= rate_of(settings)
        output = str(Path(run.output_dir) / name)
        try:
            one = replace(run, output_dir=output, resume_from_checkpoint="auto", **of_run)
            trial = Trial(name, settings, one, replace(config, **of_config))
            check_flags(trial.run, trial.config)
        except InputError as error:
            raise InputError(f"[search] {name} ({_words(settings)}): {error}") from None
        found.append(trial)
    return found


def search(
    space: SearchConfig, run: RunConfig, config: TrainConfig | None = None
) -> Iterator[Event]:
    """Runs `minift search`, yielding what happens; the last event is `Finished`, whose summary
    names the best trial. In the folder of an earlier search it goes on with that.

    Raises:
        InputError: something given is wrong, or no trial could be run.
    """
    check_given(run)
    for name in ("resume_from_checkpoint", "overwrite_output_dir"):
        if getattr(run, name) not in ("auto", "", False):
            raise InputError(f"--{name}: a search goes on in its folder by itself: leave it out")
    config, output = config or TrainConfig(), Path(run.output_dir)
    trials = trials_of(space, run, config)
    lines = read_trials(output, trials)
    _check_trials(trials, lines)
    if any(lines):
        yield Notice(f"{output}: {len(lines)} of {len(trials)} trials have ended before")
    files: dict[str, str] = {}
    for number, trial in enumerate(trials, 1):
        if trial.name in lines:
            continue
        title = f"trial {number} of {len(trials)}: {_words(trial.settings)}"
        ended = yield from _one(trial, title, files)
        yield ended
        refused = [line["why"] for line in lines.values() if line["status"] == "refused"]
        if ended.status == "refused" and len(refused) == len(lines) and ended.why in refused:
            raise InputError(ended.why)  # no setting's fault
        lines[trial.name] = line_of(trial, ended)
        make_folder(output)
        text = "".join(json.dumps(lines[t.name]) + "\n" for t in trials if t.name in lines)
        write_file(output / "trials.jsonl", text.encode())
        if space.keep == "best":
            tidy(output, lines)
    if all(line["status"] == "refused" for line in lines.values()):
        raise InputError(f"no trial could be run; the first: {next(iter(lines.values()))['why']}")
    yield report(run, config, trials, lines)


def _one(trial: Trial, title: str, files: dict[str, str]) -> Iterator[Event]:
    """Runs a trial, with all its seeds; returns how it ended."""
    folder = Path(trial.run.output_dir)
    if trial.run.seeds == 1:
        return (yield from attempt(trial.run, trial.config, title, files))
    yield Begun(trial.name, title)
    begun = folder.is_dir() and any(folder.iterdir())
    resume = "auto" if begun else ""
    done = None
    try:
        for event in fine_tune_seeds(replace(trial.run, resume_from_checkpoint=resume),
                                     trial.config):  # fmt: skip
            if isinstance(event, Finished):
                done = event.summary
            else:
                yield event
    except InputError as error:
        return Ended(trial.name, "refused", {}, str(error))
    if done["failed"]:  # a mean without them would be of the lucky ones
        why = f"{len(done['failed'])} of {trial.run.seeds} seeds have not finished"
        return Ended(trial.name, "diverged", {}, why)
    means = {k.removesuffix("_mean"): v for k, v in done.items() if k.endswith("_mean")}
    return Ended(trial.name, "finished", {**done, **means})


def line_of(trial: Trial, ended: Ended) -> dict[str, Any]:
    """What trials.jsonl says of a trial."""
    metric, kept = ended.summary.get("best_metric", ""), ("eval_", "test_")
    return {
        "trial": trial.name,
        "settings": trial.settings,
        "status": ended.status,
        "best_metric": metric,
        "value": ended.summary.get(f"eval_{metric}"),
        "std": ended.summary.get(f"eval_{metric}_std"),
        "seconds": ended.summary.get("train_runtime"),
        "why": ended.why,
        "metrics": {k: v for k, v in ended.summary.items() if k.startswith(kept)},
    }


def read_trials(output: Path, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """The trials of a folder that have ended, without refused ones, which are tried again.

    Raises:
        InputError: the folder holds something else, or a search of other settings.
    """
    path, wanted = output / "trials.jsonl", {t.name: t.settings for t in trials}
    if not path.is_file():
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: expected a folder for the output, found a file")
        if output.is_dir() and any(p for p in output.iterdir() if not p.match("trial-*")):
            raise InputError(f"{output}: is there already and no search's: choose another folder")
        return {}
    lines = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = json.loads(text)
        name, was = line["trial"], line["settings"]
        if name in wanted and was != wanted[name]:
            raise InputError(f"{path}:{number}: {name} was {_words(was)}, is now "
                             f"{_words(wanted[name])}: choose another folder")  # fmt: skip
        if name in wanted and line["status"] != "refused":
            lines[name] = line
    return lines


def _check_trials(trials: Sequence[Trial], lines: dict[str, Any]) -> None:
    """Raises InputError when a trial that has ended had other settings or data."""
    files: dict[str, str] = {}
    for trial in (t for t in trials if t.name in lines):
        folder = Path(trial.run.output_dir)
        if trial.run.seeds == 1:
            if (folder / "run.json").is_file():  # else it has ended before it began
                check_finished(trial.run, trial.config, files)
        elif not (folder / "seeds.json").is_file():
            raise InputError(f"{folder}: is of another run: seeds was 1, is {trial.run.seeds}")


def tidy(output: Path, lines: dict[str, dict[str, Any]]) -> None:
    """Deletes the weights and checkpoints of trials that are not the best; metrics stay."""
    best = best_trial(lines)
    for name, line in lines.items():
        if name == best or line["status"] == "refused":  # which may go on where it was
            continue
        folder = output / name
        try:
            for path in [*folder.glob("checkpoint-*"), *folder.glob("*/checkpoint-*")]:
                shutil.rmtree(path)
            for path in folder.rglob("*model.safetensors"):
                path.unlink()
        except OSError as error:
            raise cannot_write(folder, error) from None


def best_trial(lines: dict[str, dict[str, Any]]) -> str | None:
    """The name of the best trial; of equal ones the first."""
    metric = next((line["best_metric"] for line in lines.values() if line["best_metric"]), "")
    return best_of({name: lines[name]["value"] for name in sorted(lines)}, metric)


def report(
    run: RunConfig, config: TrainConfig, trials: Sequence[Trial], lines: dict[str, dict[str, Any]]
) -> Finished:
    """The table of all trials that have ended, and the best one's command."""
    best = best_trial(lines)
    chosen = next((trial for trial in trials if trial.name == best), None)
    status = [line["status"] for line in lines.values()]
    summary = {
        "trials": len(trials),
        "ended": len(lines),
        "finished": status.count("finished"),
        "best_trial": best,
        "best_metric": lines[best]["best_metric"] if best else None,
        "best_value": lines[best]["value"] if best else None,
        "best_settings": chosen.settings if chosen else None,
        "best_command": command(chosen.run, chosen.config, run.output_dir) if chosen else None,
        "output_dir": run.output_dir,
    }
    return Finished(summary, table(lines), "")


def table(lines: dict[str, dict[str, Any]]) -> str:
    """A line for each trial, the best first; those that have not finished last."""
    left, order = dict(lines), []
    while best := best_trial(left):
        order.append(left.pop(best))
    order += left.values()
    if not order:
        return ""
    known = [{**x["metrics"], "best_metric": x["best_metric"]} for x in order if x["metrics"]]
    names = [n for n in metrics_shown(known) if not n.endswith(("_mean", "_std"))]
    heads = [name.removeprefix("eval_") for name in names]
    std = any(line["std"] is not None for line in order)
    rows = [["trial", *order[0]["settings"], *heads[:1], *["std"] * std, *heads[1:], "seconds"]]
    for line in order:
        numbers = [shown(line["metrics"].get(name)) for name in names]
        numbers[1:1] = [shown(line["std"])] * std
        numbers += [shown(line["seconds"])]
        numbers = numbers if line["status"] == "finished" else [line["status"]]
        rows.append([line["trial"], *map(shown, line["settings"].values()), *numbers])
    return align(rows)


def command(run: RunConfig, config: TrainConfig, output: str) -> str:
    """The `minift train` that repeats a trial in a new folder inside `output`."""
    words = ["minift", "train"]
    run = replace(run, output_dir=str(Path(output) / "best"), resume_from_checkpoint="", token="")
    for given in (run, config):
        for f in fields(given):
            value = getattr(given, f.name)
            if value != f.default:
                words += [f"--{f.name}"] + ([] if f.type is bool else [str(value)])
    return shlex.join(words)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in settings.items())
