"""One fine-tuning run from files to a model folder: a generator of what happens.

OUTPUT/
  config.json model.safetensors tokenizer.json tokenizer_config.json    the best model; of an
                   adapter its own files in place of model.safetensors
  run.json          the configuration, versions, command, threads, data fingerprints
  metrics.jsonl     one event a line
  dropped.jsonl     rows that could not be used, if there are any: file:line, and why
  checkpoint-N/     everything a resume needs
"""

import json
import math
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint
from .config import RunConfig, TrainConfig
from .errors import InputError, Notice
from .files import cannot_write, make_folder, read_json, remove_partial, write_file, write_json
from .glue import as_named
from .prepare import Job, prepare
from .saving import restore, save_trained
from .step_weights import cast_once
from .train import Diverged, Step, train

# What may change between a run and its continuation without changing a bit of the result.
FREE = set(
    "output_dir resume_from_checkpoint overwrite_output_dir save_total_limit test_file device "
    "threads graph gradient_checkpointing seeds".split()
)
SMALLER = (  # is better
    *("loss", "perplexity", "bits_per_byte", "loss_per_character", "mse", "mae", "hamming_loss"),
)
LATE = {"cpu": 1, "cuda": 50}  # steps whose losses are read at once: on a GPU reading waits
# What a run leaves in its folder besides checkpoints.
OWN = (
    "config.json model.safetensors tokenizer.json tokenizer_config.json run.json metrics.jsonl "
    "dropped.jsonl adapter_config.json adapter_model.safetensors prefix_projection.safetensors"
).split()


@dataclass(frozen=True)
class Evaluation:
    """The metrics of the validation rows after a step."""

    step: int
    epoch: float
    metrics: dict[str, float | None]
    best: bool
    headline: str  # what a line of progress shows


@dataclass(frozen=True)
class Finished:
    """The summary of the run: what a script reads."""

    summary: dict[str, Any]
    table: str  # of the validation rows and the best model; "": none
    verdict: str  # a warning, if the model has learned nothing; "": it has


@dataclass
class Progress:
    """What a run remembers besides weights and moments. Saved in every checkpoint."""

    best: float | None = None
    best_step: int = 0
    best_metrics: dict[str, Any] | None = None
    without_gain: int = 0
    stopped: bool = False
    loss_sum: float = 0.0
    seconds: float = 0.0
    log_bytes: int = 0


def find_checkpoint(run: RunConfig) -> Path | None:
    """The checkpoint to go on from, if the run is to go on from one.

    Raises:
        InputError: output_dir holds something else, or there is no such checkpoint.
    """
    wanted, output = run.resume_from_checkpoint, Path(run.output_dir)
    try:
        there = output.exists()
    except OSError as error:  # a name that is too long
        raise cannot_write(output, error) from None
    if there and not output.is_dir():
        raise InputError(f"{output}: expected a folder for the output, found a file")
    if output.resolve() == Path(run.model_name_or_path).resolve():
        raise InputError(f"{output}: is the model's folder: choose another for the output")
    if wanted and wanted != "auto":
        path = Path(wanted)
        if not (path / "state.json").is_file():
            raise InputError(f"{path}: expected a checkpoint, found none: try 'auto'")
        if path.resolve().parent != output.resolve():
            raise InputError(f"{path}: expected a checkpoint inside {output}")
        return path
    if wanted and (found := checkpoints(output)):
        return found[-1]
    # A run that was killed before its first checkpoint has left run.json, and begins again.
    begun = wanted and (output / "run.json").is_file()
    empty = not output.is_dir() or not any(output.iterdir())
    if not (begun or run.overwrite_output_dir or empty):
        raise InputError(
            f"{output}: is there already and not empty: choose another folder, "
            "--resume_from_checkpoint auto, or --overwrite_output_dir"
        )
    return None


def check_given(run: RunConfig) -> None:
    """Raises InputError when a model, rows to train on or a place for the output is missing."""
    if bool(run.model_name_or_path) == bool(run.config_name):
        raise InputError(
            "expected --model_name_or_path, or --config_name for a model of random weights, got "
            f"{'both' if run.config_name else 'none'}: see minift train --help"
        )
    for name in ("train_file", "output_dir"):
        if not getattr(run, name):
            raise InputError(f"expected --{name}: see minift train --help")


def check_same(where: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InputError when a run cannot go on as another, or be taken for it.

    Args:
        where: what is to be gone on from.
        before, now: `run`, `config` and `files`, as in run.json.
    """
    differ = [
        f"{name} was {before[part].get(name)!r}, is {value!r}"
        for part in ("run", "config")
        for name, value in now[part].items()
        if name not in FREE and before[part].get(name) != value
    ]
    differ += [
        f"{file} has changed"
        for file, sha in before["files"].items()
        if now["files"].get(file, sha) != sha
    ]
    if differ:
        raise InputError(f"{where}: is of another run: {'; '.join(differ)}")


class Run:
    """A job, its folder, and what it remembers."""

    def __init__(self, job: Job, resume_from: Path | None):
        self.job, self.run, self.output = job, job.run, Path(job.run.output_dir)
        self.resume_from, self.progress = resume_from, Progress()

    def facts(self) -> dict[str, Any]:
        """The content of run.json."""
        job, gpu, token = self.job, self.job.device.type == "cuda", self.job.run.token
        packages = ("minift", "torch", "tokenizers", "numpy")
        return {
            "run": {k: v for k, v in asdict(job.run).items() if k != "token"},
            "config": asdict(job.config),
            "model": str(job.source.folder or job.run.config_name),  # a hub id's commit is in it
            "labels": job.model.config.labels,
            "max_length": job.tokenizer.max_length,
            "files": job.files,
            "command": [w.replace(token, "***") if token else w for w in sys.argv],
            "versions": {name: version(name) for name in packages},
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(job.device) if gpu else "cpu",
            "threads": torch.get_num_threads(),
        }

    def open_output(self) -> Iterator[Notice]:
        """Makes OUTPUT, or goes on in it."""
        path, facts = self.output / "run.json", self.facts()
        if self.resume_from is None:
            make_folder(self.output)
            try:
                for old in self.output.glob("checkpoint-*"):
                    shutil.rmtree(old)
                for name in OWN:
                    (self.output / name).unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self.output, error) from None
            write_json(path, facts)
            if self.job.dropped:
                lines = (json.dumps({"row": row, "why": why}) for row, why in self.job.dropped)
                write_file(self.output / "dropped.jsonl", "".join(f"{x}\n" for x in lines).encode())
            return
        before = read_json(path, ("run", "config", "files"))
        check_same(self.resume_from, before, facts)
        saved = load_checkpoint(self.resume_from, self.job.model, self.job.state)
        self.progress = Progress(**saved["run"])
        remove_partial(self.output)
        with open(self.output / "metrics.jsonl", "ab") as log:
            self.progress.log_bytes = min(self.progress.log_bytes, log.tell())
            log.truncate(self.progress.log_bytes)
        yield Notice(f"going on from {self.resume_from}")
        if saved["threads"] != torch.get_num_threads():
            yield Notice(
                f"saved with {saved['threads']} threads, now {torch.get_num_threads()}: the "
                f"last bits will differ; --threads {saved['threads']} keeps them",
                loud=True,
            )

    def log(self, event: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl; what is not a finite number becomes null."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in event.items()
        }
        line = (json.dumps(clean, allow_nan=False) + "\n").encode()
        try:
            with open(self.output / "metrics.jsonl", "ab") as log:
                log.write(line)
        except OSError as error:
            raise cannot_write(self.output / "metrics.jsonl", error) from None
        self.progress.log_bytes += len(line)

    @property
    def metric(self) -> str:
        """What the best model is chosen by."""
        return (self.run.metric_for_best_model or self.job.task.best).removeprefix("eval_")

    def outputs(self, part: str) -> np.ndarray:
        """What the model makes of the rows of train, validation or test."""
        job = self.job
        with cast_once(job.model, job.dtype):  # as `minift eval` computes it
            return job.task.outputs(job.model, job.examples[part], job.dtype, job.ops)

    def evaluate(self, step: Step) -> Evaluation:
        """Metrics of the validation rows; a better model than ever is written to OUTPUT."""
        start, job, progress = time.perf_counter(), self.job, self.progress
        outputs = self.outputs("validation")
        task = job.task.tuned(outputs)
        metrics = task.metrics(outputs)
        seconds = time.perf_counter() - start
        name, value = self.metric, metrics[self.metric]
        gain = -1e300 if value is None else -value if name in SMALLER else value
        gained = progress.best is None or gain > progress.best
        # Of two models that are as good, the surer one: small validation sets tie early.
        lower = math.inf if metrics["loss"] is None else metrics["loss"]
        least = (progress.best_metrics or {}).get("eval_loss")
        least = math.inf if least is None else least
        best = gained or (gain == progress.best and lower < least)
        progress.without_gain = 0 if gained else progress.without_gain + 1
        events = {f"eval_{k}": v for k, v in metrics.items()}
        if best:
            progress.best, progress.best_step, progress.best_metrics = gain, step.index, events
            job.model.config = task.noted(job.model.config)
            save_trained(job.model, self.output)
            job.tokenizer.save(self.output)
        patience = self.run.early_stopping_patience
        progress.stopped = bool(patience) and progress.without_gain >= patience
        self.log({"step": step.index, "epoch": step.epoch, **events, "eval_runtime": seconds})
        return Evaluation(step.index, step.epoch, metrics, best, job.task.headline(metrics))

    def steps(self) -> Iterator[Step | Evaluation | Notice]:
        """Trains, evaluates, saves."""
        job, progress, clock = self.job, self.progress, time.perf_counter()
        said = ""
        eval_every = self.run.eval_steps or len(job.batches)
        save_every = self.run.save_steps or eval_every
        if progress.stopped:
            return
        late: list[Step] = []  # those that are not logged yet
        for step in train(job.model, job.batches, job.config, job.task, job.state, job.ops):
            late.append(step)
            last = step.index == step.total
            evaluates = step.index % eval_every == 0 or last
            saves = step.index % save_every == 0 or last
            if evaluates or saves or len(late) == LATE[job.device.type]:
                self.log_steps(late, clock)
                late = []
            yield step
            if step.eager != said and job.device.type == "cuda":
                said = step.eager  # from the first step on, or since a capture has failed
                text = f"steps are launched kernel by kernel: {said}"
                yield Notice(text, loud=step.index > 1)
            if evaluates:
                yield self.evaluate(step)
            if saves or progress.stopped:
                remembered = asdict(progress)
                save_checkpoint(self.output, job.model, job.tokenizer, job.state, remembered)
                prune(self.output, self.run.save_total_limit)
            if progress.stopped:
                return
            clock = clock if late else time.perf_counter()

    def log_steps(self, steps: list[Step], since: float) -> None:
        """A line for each of the steps launched `since` then; waits for the last of them."""
        steps[-1].numbers.loss  # noqa: B018, raises nothing: the first bad step is the one to name
        rate = sum(step.tokens for step in steps) / (time.perf_counter() - since)
        for step in steps:
            self.progress.loss_sum += step.loss
            self.progress.seconds += step.tokens / rate
            facts = {n: getattr(step, n) for n in ("epoch", "loss", "grad_norm", "learning_rate")}
            self.log(
                {"step": step.index, **facts, "tokens": step.tokens, "tokens_per_second": rate}
            )

    def finish(self) -> Finished:
        """The best model's numbers, on the test rows too."""
        job, progress = self.job, self.progress
        restore(job.model, self.output)
        task, table, test = job.task, "", {}
        if task.tabled or task.tunes:
            outputs = self.outputs("validation")
            task = task.tuned(outputs)
            table = task.table(outputs)
        if "test" in job.examples:
            test = task.metrics(self.outputs("test"))
        epochs, seconds = job.state.step / len(job.batches), max(progress.seconds, 1e-9)
        tokens = sum(len(e.tokens) for e in job.examples["train"])
        summary = {
            **(progress.best_metrics or {}),
            **{f"test_{k}": v for k, v in test.items()},
            "train_loss": progress.loss_sum / max(1, job.state.step),
            "train_runtime": progress.seconds,
            "train_tokens_per_second": tokens * epochs / seconds,
            "train_samples_per_second": len(job.examples["train"]) * epochs / seconds,
            "epoch": epochs,
            "steps": job.state.step,
            "best_metric": self.metric,
            "best_step": progress.best_step,
            "early_stopped": progress.stopped,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "output_dir": str(self.output),
        }
        self.log({"step": job.state.step, **summary})
        best = {k.removeprefix("eval_"): v for k, v in (progress.best_metrics or {}).items()}
        return Finished(summary, table, task.verdict(best))


def fine_tune(
    run: RunConfig, config: TrainConfig | None = None
) -> Iterator[Notice | Step | Evaluation | Finished]:
    """Runs `minift train`, yielding what happens; the last event is `Finished`.

    Raises:
        InputError: something given is wrong; before the first step wherever it can be seen.
        Diverged: the loss is not finite; the message names the newest checkpoint.
    """
    check_given(run)
    run = as_named(run)
    if run.seeds > 1:
        raise InputError(f"expected seeds 1 of one run, got {run.seeds}: use fine_tune_seeds")
    resume_from = find_checkpoint(run)
    if run.resume_from_checkpoint and resume_from is None:
        yield Notice(f"{run.output_dir}: no checkpoint there, so this is a new run", loud=True)
    job = yield from prepare(run, config or TrainConfig())
    running = Run(job, resume_from)
    yield from running.open_output()
    try:
        yield from running.steps()
    except Diverged as error:
        good = checkpoints(running.output)
        last = good[-1] if good else "none yet"
        raise Diverged(f"{error}; last good checkpoint: {last}") from None
    yield running.finish()
