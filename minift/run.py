"""One fine-tuning run from files to a model folder: a generator of what happens.

OUTPUT/
  config.json model.safetensors tokenizer.json tokenizer_config.json    the best model
  run.json          the configuration, versions, command, threads, data fingerprints
  metrics.jsonl     one event a line
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

import torch

from .batch import Batches, Example
from .checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint
from .config import RunConfig, TrainConfig
from .data import Columns, Row, fingerprint, read_rows, stratified_split
from .errors import InputError
from .files import cannot_write, read_json, remove_partial, write_json
from .methods import format_rules
from .ops import TABLES, Ops, ops_for
from .tasks.classification import Classification, label_names, logits_of
from .tokenizer import Tokenizer
from .train import Diverged, Step, TrainState, compute_dtype, train
from .weights import check_vocabulary, load_model, read_config, read_weights, save_model

# What may change between a run and its continuation without changing a bit of the result.
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "save_total_limit",
    "test_file",
    "device",
    "threads",
}


@dataclass(frozen=True)
class Notice:
    """A line or a table for the reader; `loud` ones must not be missed."""

    text: str
    loud: bool = False


@dataclass(frozen=True)
class Evaluation:
    """The metrics of the validation rows after a step."""

    step: int
    epoch: float
    metrics: dict[str, float | None]
    best: bool


@dataclass(frozen=True)
class Finished:
    """The summary of the run: what a script reads."""

    summary: dict[str, Any]
    labels: tuple[str, ...]
    target: list[int]  # of the validation rows
    predicted: list[int]  # of the best model


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


@dataclass(frozen=True)
class Data:
    """The rows of a run and their examples."""

    rows: dict[str, list[Row]]  # train, validation, test
    examples: dict[str, list[Example]]
    files: dict[str, str]  # path -> sha256


def pick_device(name: str) -> torch.device:
    """The device of a flag.

    Raises:
        InputError: it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"expected device cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name}: no GPU that torch can use is here: use --device cpu")
    return device


def pick_ops(name: str, device: torch.device) -> Ops:
    """The table of a flag."""
    return ops_for(device) if name == "auto" else TABLES[name]


def length_limit(run: RunConfig, max_len: int) -> int:
    """Tokens at which texts are cut.

    Raises:
        InputError: more are asked for than the model has positions.
    """
    if run.max_seq_length > max_len:
        raise InputError(
            f"max_seq_length {run.max_seq_length} is more than the model's {max_len} "
            "positions: lower it"
        )
    if run.max_seq_length and run.max_seq_length < 5:
        raise InputError(f"expected max_seq_length 5 or more, got {run.max_seq_length}")
    return run.max_seq_length or max_len


class Run:
    """The state of one run, and its parts in the order in which they happen."""

    def __init__(self, run: RunConfig, config: TrainConfig):
        for name in ("model_name_or_path", "train_file", "output_dir"):
            if not getattr(run, name):
                raise InputError(f"expected --{name}: see minift train --help")
        self.run, self.config, self.progress = run, config, Progress()
        self.output = Path(run.output_dir)
        if run.threads:
            torch.set_num_threads(run.threads)
        self.device = pick_device(run.device)
        self.ops = pick_ops(run.ops, self.device)
        self.resume_from = self.check_output()

    def check_output(self) -> Path | None:
        """The checkpoint to go on from. Raises InputError when OUTPUT holds another run."""
        wanted, found = self.run.resume_from_checkpoint, []
        if self.output.is_dir():
            found = checkpoints(self.output)
        elif self.output.exists():
            raise InputError(f"{self.output}: expected a folder for the output, found a file")
        if wanted == "auto":
            return found[-1] if found else None
        if wanted:
            path = Path(wanted)
            if not (path / "state.json").is_file():
                raise InputError(f"{path}: expected a checkpoint, found none: try 'auto'")
            if path.resolve().parent != self.output.resolve():
                raise InputError(f"{path}: expected a checkpoint inside {self.output}")
            return path
        if (
            self.output.is_dir()
            and any(self.output.iterdir())
            and not self.run.overwrite_output_dir
        ):
            raise InputError(
                f"{self.output}: is there already and not empty: choose another folder, "
                "--resume_from_checkpoint auto, or --overwrite_output_dir"
            )
        return None

    def read(self) -> Iterator[Notice]:
        """Rows of all files; labels; the validation part."""
        run = self.run
        columns = Columns(
            run.text_column or None, run.pair_column or None, run.label_column or None
        )
        files = {"train": run.train_file, "validation": run.validation_file, "test": run.test_file}
        rows = {part: read_rows(path, columns) for part, path in files.items() if path}
        self.label_set = label_names(rows["train"], run.train_file)
        if not run.validation_file:
            rows["train"], rows["validation"] = stratified_split(
                rows["train"], run.validation_split, self.config.seed
            )
            if not rows["validation"]:
                raise InputError(
                    f"{run.train_file}: too few rows to keep some for validation: "
                    "give --validation_file"
                )
            yield Notice(
                f"no --validation_file: {len(rows['validation']):,} of the training rows, "
                f"drawn by label with seed {self.config.seed}, are kept for validation"
            )
        self.rows = rows
        self.files = {path: fingerprint(path) for path in files.values() if path}
        counts = ", ".join(f"{part} {len(r):,}" for part, r in rows.items())
        yield Notice(f"rows: {counts}; labels: {len(self.label_set)}")

    def load(self) -> Iterator[Notice]:
        """Tokenizer, model, examples, optimizer; everything that can fail before step 0."""
        run, config = self.run, self.config
        folder = Path(run.model_name_or_path)
        model_config = read_config(folder)
        self.tokenizer = Tokenizer.load(folder, length_limit(run, model_config.max_len))
        check_vocabulary(self.tokenizer, model_config, folder)
        self.model, report = load_model(folder, self.label_set, config.seed)
        yield Notice(str(report))
        labels = self.model.config.labels
        weights = Classification.weights(run.class_weights, labels, self.rows["train"])
        self.task = Classification(labels, weights, config.label_smoothing_factor)
        self.examples, paths = (
            {},
            {
                "train": run.train_file,
                "test": run.test_file,
                "validation": run.validation_file or run.train_file,
            },
        )
        for part, rows in self.rows.items():
            self.examples[part] = self.task.encode(rows, self.tokenizer, paths[part])
            cut = sum(len(e.tokens) >= self.tokenizer.max_length for e in self.examples[part])
            if cut:
                yield Notice(
                    f"{part}: {cut:,} of {len(rows):,} texts reach {self.tokenizer.max_length} "
                    "tokens and are cut there",
                    loud=cut * 20 > len(rows),
                )
        self.model.to(self.device)
        self.state = TrainState.new(self.model, config, self.ops)
        yield Notice(format_rules(self.state.groups))
        self.batches = Batches(
            self.examples["train"],
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
        )
        self.dtype = compute_dtype(config, self.device)

    def facts(self) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "run": asdict(self.run),
            "config": asdict(self.config),
            "labels": self.model.config.labels,
            "max_length": self.tokenizer.max_length,
            "files": self.files,
            "command": sys.argv,
            "versions": {
                name: version(name) for name in ("minift", "torch", "tokenizers", "numpy")
            },
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else "cpu",
            "threads": torch.get_num_threads(),
        }

    def open_output(self) -> Iterator[Notice]:
        """Makes OUTPUT, or goes on in it."""
        path, facts = self.output / "run.json", self.facts()
        if self.resume_from is None:
            try:
                if self.run.overwrite_output_dir and self.output.is_dir():
                    shutil.rmtree(self.output)
                self.output.mkdir(parents=True, exist_ok=True)
                for old in self.output.glob("checkpoint-*"):
                    shutil.rmtree(old)
                (self.output / "metrics.jsonl").write_bytes(b"")
            except OSError as error:
                raise cannot_write(self.output, error) from None
            write_json(path, facts)
            return
        before = read_json(path)
        differ = [
            f"{name} was {before[part].get(name)!r}, is {value!r}"
            for part in ("run", "config")
            for name, value in facts[part].items()
            if name not in FREE and before[part].get(name) != value
        ]
        differ += [
            f"{file} has changed"
            for file, sha in before["files"].items()
            if self.files.get(file, sha) != sha
        ]
        if differ:
            raise InputError(f"{self.resume_from}: is of another run: {'; '.join(differ)}")
        saved = load_checkpoint(self.resume_from, self.model, self.state)
        self.progress = Progress(**saved["run"])
        remove_partial(self.output)
        with open(self.output / "metrics.jsonl", "ab") as log:
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

    def evaluate(self, step: Step) -> Evaluation:
        """Metrics of the validation rows; a better model than ever is written to OUTPUT."""
        start, progress = time.perf_counter(), self.progress
        logits = logits_of(self.model, self.examples["validation"], self.dtype, self.ops)
        metrics = self.task.metrics(logits, self.examples["validation"])
        seconds = time.perf_counter() - start
        name = self.run.metric_for_best_model.removeprefix("eval_")
        value = metrics.get(name)
        gain = math.nan if value is None else -value if name == "loss" else value
        best = gain > -math.inf if progress.best is None else gain > progress.best
        progress.without_gain = 0 if best else progress.without_gain + 1
        events = {f"eval_{k}": v for k, v in metrics.items()}
        if best:
            progress.best, progress.best_step, progress.best_metrics = gain, step.index, events
            save_model(self.model, self.output)
            self.tokenizer.save(self.output)
        patience = self.run.early_stopping_patience
        progress.stopped = bool(patience) and progress.without_gain >= patience
        self.log({"step": step.index, "epoch": step.epoch, **events, "eval_runtime": seconds})
        return Evaluation(step.index, step.epoch, metrics, best)

    def check_metric(self) -> None:
        """Raises InputError when metric_for_best_model is not among the metrics."""
        examples = self.examples["validation"][:1]
        known = self.task.metrics(torch.zeros(1, len(self.task.labels)).numpy(), examples)
        name = self.run.metric_for_best_model.removeprefix("eval_")
        if name not in known:
            raise InputError(
                f"metric_for_best_model {name!r} is unknown: expected one of {', '.join(known)}"
            )

    def steps(self) -> Iterator[Step | Evaluation]:
        """Trains, evaluates, saves."""
        run, progress, clock = self.run, self.progress, time.perf_counter()
        eval_every = run.eval_steps or len(self.batches)
        save_every = run.save_steps or eval_every
        if progress.stopped:
            return
        for step in train(self.model, self.batches, self.config, self.task, self.state, self.ops):
            progress.loss_sum += step.loss
            now = time.perf_counter()
            self.log(
                {
                    "step": step.index,
                    "epoch": step.epoch,
                    "loss": step.loss,
                    "grad_norm": step.grad_norm,
                    "learning_rate": step.learning_rate,
                    "tokens": step.tokens,
                    "tokens_per_second": step.tokens / (now - clock),
                }
            )
            progress.seconds += now - clock
            yield step
            last = step.index == step.total
            if step.index % eval_every == 0 or last:
                yield self.evaluate(step)
            if step.index % save_every == 0 or last or progress.stopped:
                save_checkpoint(
                    self.output, self.model, self.tokenizer, self.state, asdict(progress)
                )
                prune(self.output, run.save_total_limit)
            if progress.stopped:
                return
            clock = time.perf_counter()

    def finish(self) -> Finished:
        """The best model's numbers, on the test rows too."""
        progress = self.progress
        read_weights(self.model, self.output / "model.safetensors")
        parts = {
            part: logits_of(self.model, self.examples[part], self.dtype, self.ops)
            for part in ("validation", "test")
            if part in self.examples
        }
        test = self.task.metrics(parts["test"], self.examples["test"]) if "test" in parts else {}
        tokens = sum(len(e.tokens) for e in self.examples["train"])
        done = self.state.step / len(self.batches)
        summary = {
            **(progress.best_metrics or {}),
            **{f"test_{k}": v for k, v in test.items()},
            "train_loss": progress.loss_sum / max(1, self.state.step),
            "train_runtime": progress.seconds,
            "train_tokens_per_second": tokens * done / max(progress.seconds, 1e-9),
            "train_samples_per_second": len(self.batches.examples)
            * done
            / max(progress.seconds, 1e-9),
            "epoch": done,
            "steps": self.state.step,
            "best_step": progress.best_step,
            "early_stopped": progress.stopped,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "output_dir": str(self.output),
        }
        self.log({"step": self.state.step, **summary})
        target = [e.target for e in self.examples["validation"]]
        return Finished(summary, self.task.labels, target, parts["validation"].argmax(-1).tolist())


def fine_tune(
    run: RunConfig, config: TrainConfig | None = None
) -> Iterator[Notice | Step | Evaluation | Finished]:
    """Runs `minift train`, yielding what happens; the last event is `Finished`.

    Raises:
        InputError: something given is wrong; before the first step wherever it can be seen.
        Diverged: the loss is not finite; the message names the newest checkpoint.
    """
    job = Run(run, config or TrainConfig())
    yield from job.read()
    yield from job.load()
    job.check_metric()
    yield from job.open_output()
    try:
        yield from job.steps()
    except Diverged as error:
        good = checkpoints(job.output)
        raise Diverged(
            f"{error}; last good checkpoint: {good[-1] if good else 'none yet'}"
        ) from None
    yield job.finish()
