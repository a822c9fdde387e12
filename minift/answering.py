"""`minift eval` and `minift predict`: what a trained model makes of a file, whatever it learned.

Rows come in blocks, in the order of the file, so memory does not grow with it: of a block that has
been measured a few numbers a row stay, of one that has been answered nothing. Inside a block rows
of like length are computed together.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .batch import Example
from .cli import TRAINED
from .commands import say, texts
from .config import ModelConfig, RunConfig, TrainConfig
from .data import Columns
from .errors import InputError
from .files import write_file
from .prefetch import made_ahead
from .prepare import check_flags, length_limit, pick_device
from .responses import respond
from .sampling import FLAGS, GenerateConfig
from .saving import Adapters, adapter_over, base_of, load, trained_config
from .step_weights import cast_once
from .tasks import TASKS
from .tasks.instruct import Instruct
from .tasks.task import File, Said, Setup, Task
from .tokenizer import Tokenizer
from .train import compute_dtype


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready to answer."""

    model: nn.Module
    tokenizer: Tokenizer
    task: Task
    run: RunConfig
    dtype: torch.dtype


def run(args: argparse.Namespace) -> int:
    """Runs the command that `args` names; returns the exit status."""
    return {"eval": evaluate, "predict": predict}[args.command](args)


def load_trained(args: argparse.Namespace) -> Loaded:
    """The model of `args`, with the head and for the task that it was trained with.

    Raises:
        InputError: it cannot be loaded, or a setting does not fit it.
    """
    folder, base = adapter_over(args.model, args.adapter or [], args.revision, args.token)
    config = trained_config(folder, base)
    return _loaded(args, config, lambda limit: load(folder, None, limit, base=base))


def load_each(args: argparse.Namespace) -> Iterator[Loaded]:
    """The model of `args`, or each of its adapters over that, which is read once. The last one is
    over when the next comes.

    Raises:
        InputError: see `load_trained`.
    """
    if len(args.adapter or []) < 2:
        yield load_trained(args)
        return
    adapters = None
    for name in args.adapter:
        folder, base = adapter_over(args.model, [name], args.revision, args.token)
        adapters = adapters or Adapters(base or base_of(folder))
        config = trained_config(folder, adapters.base)
        yield _loaded(args, config, lambda limit: adapters.use(folder, limit))  # noqa: B023


def _loaded(
    args: argparse.Namespace,
    config: ModelConfig,
    load_it: Callable[[int], tuple[nn.Module, Tokenizer]],
) -> Loaded:
    settings = as_trained(args, config)
    device = pick_device(settings.device)
    limit = length_limit(settings.max_seq_length, config.room)
    model, tokenizer = load_it(limit)
    tokenizer.max_length = settings.max_seq_length or tokenizer.max_length  # what is asked for wins
    task = TASKS[settings.task].trained(Setup(settings, TrainConfig(), model, tokenizer))
    dtype = compute_dtype(TrainConfig(dtype=args.dtype), device)
    return Loaded(model.to(device), tokenizer, task, settings, dtype)


def as_trained(args: argparse.Namespace, config: ModelConfig) -> RunConfig:
    """The settings that files are read with: what is given, else what the model's folder notes.

    Raises:
        InputError: a setting is given that the task does not read.
    """
    kind, kinds = task_of(config), {f.name: f.type for f in fields(RunConfig)}
    given = {name: getattr(args, name) for name in TRAINED if hasattr(args, name)}
    check_flags(RunConfig(**given, task=kind.name), TrainConfig())
    noted = {k: v for k, v in config.settings.items() if type(v) is kinds.get(k)}
    if kind is Instruct:
        names = "prompt_template", "response_template"
        noted |= dict(zip(names, config.template or (), strict=False))
    return RunConfig(**noted | given | {"task": kind.name})


def task_of(config: ModelConfig) -> type[Task]:
    """What a model was trained for; another's model does not say, but its head does."""
    tokens = "lm" if config.kind.decoder else "mlm"
    of_head = {"lm": tokens, "tokens": "tagging", "span": "qa", "classifier": "classification"}
    return TASKS[config.task or of_head[config.head]]


# ---------------------------------------------------------------- eval


@dataclass(eq=False)
class Encoded:
    """The examples of a file, a block of rows at a time, and what is found on the way."""

    task: Task
    file: File
    model: ModelConfig
    tokenizer: Tokenizer
    rows: int = 0  # that are kept
    cut: int = 0  # examples
    heard: list[list[str]] = field(default_factory=list)  # warnings, of each block

    def __iter__(self) -> Iterator[Sequence[Example]]:
        for rows in self.task.blocks(self.file):
            check_pairs(rows, self.model, self.file.path)
            dropped, heard = len(self.file.dropped), []
            examples = listen(self.task.encode_file(self.file, rows, self.tokenizer), heard)
            self.heard.append(heard)
            self.rows += len(rows) - (len(self.file.dropped) - dropped)
            self.cut += sum(e.cut for e in getattr(examples, "whole", examples))
            if len(examples):
                yield examples

    def warnings(self) -> Iterator[str]:
        """What a person should know, once for the whole file.

        Raises:
            InputError: too many rows cannot be used.
        """
        if len(self.heard) == 1:
            yield from self.heard[0]
        else:  # the same words in each block, with other numbers
            others = [text for heard in self.heard for text in heard if " cut there" not in text]
            yield from dict.fromkeys(others)
            if self.cut:
                limit = self.tokenizer.max_length
                yield (
                    f"{self.file.path}: {self.cut:,} of {self.rows:,} texts are longer than "
                    f"{limit} tokens and cut there"
                )
        yield from (notice.text for notice in self.file.tell(self.rows))


def listen(said: Said, heard: list[str]) -> Any:
    """What is returned at the end; the warnings on the way are `heard`."""
    while True:
        try:
            notice = next(said)
        except StopIteration as done:
            return done.value
        if notice.loud:
            heard.append(notice.text)


def check_pairs(rows: Sequence[Any], config: ModelConfig, path: str) -> None:
    """Raises InputError when a model of single texts is given pairs, or the other way round."""
    if not rows or config.pairs in (None, getattr(rows[0], "pair", None) is not None):
        return
    where = f"{rows[0].file or path}:{rows[0].line}"
    learned, todo = "single texts", "name the text's column with --text_column"
    if config.pairs:
        learned, todo = "pairs of texts", "give two text columns in --data"
    raise InputError(f"{where}: the model was trained on {learned}, got others: {todo}")


def measure(loaded: Loaded, encoded: Encoded) -> np.ndarray:
    """`Task.outputs` of a whole file, in the order of its blocks; what was found on the way is
    said.

    Raises:
        InputError: the file is not as it should be.
    """
    model, outputs = loaded.model, []
    blocks: Iterable[Sequence[Example]] = encoded
    if next(model.parameters()).device.type == "cuda":  # a CPU has no core to spare for it
        blocks = made_ahead(encoded, 1)
    with cast_once(model, loaded.dtype):
        for examples in blocks:
            outputs.append(loaded.task.outputs(model, examples, loaded.dtype, None))
    for text in encoded.warnings():
        say("WARNING: " + text)
    return np.concatenate(outputs)


def evaluate(args: argparse.Namespace) -> int:
    """`minift eval`: what the task measures; the last line of stdout is JSON."""
    loaded, start = load_trained(args), time.perf_counter()
    task, file = loaded.task, File(loaded.run, args.data, args.data)
    outputs = measure(loaded, Encoded(task, file, loaded.model.config, loaded.tokenizer))
    measured = task.metrics(outputs)
    if isinstance(task, Instruct):
        measured = measured | responses(args, loaded)
    metrics = {f"eval_{k}": v for k, v in measured.items()}
    metrics["eval_runtime"] = time.perf_counter() - start
    if (table := task.table(outputs)) and not args.quiet:
        say(table)
    if text := task.verdict(measured):
        say("WARNING: " + text)
    print(json.dumps(metrics))
    return 0


def responses(args: argparse.Namespace, loaded: Loaded) -> dict[str, float]:
    """The text metrics of a model's answers to the prompts of a file."""
    answers = GenerateConfig(**{n: getattr(args, n) for n in FLAGS if hasattr(args, n)})
    blocks = loaded.task.blocks(File(loaded.run, args.data, args.data))
    rows = [row for block in blocks for row in block]
    found = respond(loaded.model, loaded.tokenizer, rows, answers, loaded.dtype)
    for count, what in (
        (found.left_out, "prompts are too long to be answered: they are in no text metric"),
        (found.unfinished, f"answers were cut at {answers.max_new_tokens} new tokens, or where "
                           "the positions end"),
    ):  # fmt: skip
        if count:
            say(f"WARNING: {count:,} of {found.left_out + len(found.answers):,} {what}")
    return found.metrics()


# ---------------------------------------------------------------- predict


def predict(args: argparse.Namespace) -> int:
    """`minift predict`: a JSON object a row, in their order, and nothing else on stdout."""
    start = time.perf_counter()
    answers = Answers(args)
    if len(args.adapter or []) > 1 and not (args.data or args.text):
        raise InputError("expected texts or --data for several adapters: lines come but once")
    if args.output_file:
        write_file(answers_file(args.output_file, args.data), answers.write_to)
    else:
        answers.write(sys.stdout)
    if cut := answers.cut:
        limit = answers.loaded.tokenizer.max_length
        text = f"{cut:,} of {answers.count:,} texts are longer than {limit} tokens and cut there"
        say(f"WARNING: {text}")
    if not args.quiet:
        say(f"{answers.count:,} texts in {time.perf_counter() - start:.2f} s")
    return 0


def answers_file(name: str, data: str | None) -> Path:
    """Where the answers go.

    Raises:
        InputError: it is a folder or a device, or the rows themselves, which would be lost.
    """
    path = Path(name)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: expected a file for the answers, found something else")
    if data and path.exists() and os.path.exists(data) and path.samefile(data):
        raise InputError(f"{path}: is --data: choose another file for the answers")
    return path


@dataclass(eq=False)
class Answers:
    """The answers to all rows, and how many there are."""

    args: argparse.Namespace
    loaded: Loaded | None = None
    count: int = 0
    cut: int = 0

    def write(self, out: Any) -> None:
        """A line for each row, with the row's id if it has one; whole blocks of them. Of several
        adapters one after the other, and each line says whose it is.

        Args:
            out: a file of text, which stays open.

        Raises:
            InputError: a row is not as it should be, or the model has no answers.
        """
        several = self.args.adapter if len(self.args.adapter or []) > 1 else [None]
        for name, loaded in zip(several, load_each(self.args), strict=True):
            self.loaded, said = loaded, {} if name is None else {"adapter": name}
            if type(loaded.task).predict is Task.predict:
                raise InputError(
                    f"{name or self.args.model}: knows no labels, it predicts tokens: use minift "
                    "generate, or train it"
                )
            try:
                self.write_rows(out, said)
            except InputError as error:
                raise error if name is None else InputError(f"{name}: {error}") from None

    def write_rows(self, out: Any, said: dict[str, str]) -> None:
        """The answers of the loaded model to all rows, each with what is `said` of it."""
        for rows in self.rows():
            with cast_once(self.loaded.model, self.loaded.dtype):
                found = [said | answer for answer in self.answer(rows)]
            lines = (json.dumps(answer, ensure_ascii=False) for answer in found)
            out.write("".join(f"{line}\n" for line in lines))
            out.flush()

    def write_to(self, path: Path) -> None:
        """`write`, into a file."""
        with open(path, "w", encoding="utf-8", newline="\n") as out:
            self.write(out)

    def rows(self) -> Iterator[list[Any]]:
        """Blocks of rows: of a file, of the command line, or of stdin."""
        args, kind = self.args, self.loaded.task
        if args.data and not args.text:
            yield from kind.blocks(File(self.loaded.run, args.data, args.data), labelled=False)
            return
        for block in texts(args, Columns()):
            yield [kind.row_of(row.text, row.line) for row in block]

    def answer(self, rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """The answers to a block of rows."""
        loaded, where = self.loaded, self.args.data or "text"
        check_pairs(rows, loaded.model.config, where)
        self.count += len(rows)
        top_k, model, tokenizer = self.args.top_k, loaded.model, loaded.tokenizer
        found = loaded.task.predict(model, tokenizer, rows, loaded.dtype, top_k)
        for row, answer in zip(rows, found, strict=True):
            self.cut += answer.get("cut", False)
            if self.cut and loaded.run.overflow == "error":
                line, limit = f"{row.file or where}:{row.line}", tokenizer.max_length
                todo = "raise --max_seq_length, or --overflow cut"
                raise InputError(f"{line}: longer than {limit} tokens: {todo}")
            name = getattr(row, "id", None)
            yield answer if name is None else {"id": name} | answer
