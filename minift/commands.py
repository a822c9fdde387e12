"""What each command does and prints: results to stdout, progress to stderr."""

import argparse
import codecs
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from .config import ModelConfig, RunConfig, TrainConfig
from .data import Columns, Row, read_texts
from .describe import describe
from .errors import InputError, Notice
from .hub import locate
from .prepare import length_limit, pick_device
from .responses import respond
from .run import Evaluation, Finished, fine_tune
from .sampling import FLAGS, GenerateConfig
from .tasks import TASKS
from .tasks.classification import Classification, predict
from .tasks.instruct import Instruct
from .tasks.task import Said, Task
from .tokenizer import Tokenizer
from .train import Step, compute_dtype
from .weights import load, read_config

COLUMNS = "text_column", "pair_column", "label_column"
PLAIN_SECONDS = 10.0  # between lines of progress when stderr is no terminal
LOOK_SECONDS = 0.1  # between two looks at the loss
BLOCK = 256  # texts that are predicted together


def run(args: argparse.Namespace) -> int:
    """Runs the command that `args` names; returns the exit status."""
    return {"train": train, "eval": evaluate, "predict": label, "inspect": inspect}[args.command](
        args
    )


def say(text: str) -> None:
    """A line for the person, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """Progress of training on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, quiet: bool):
        self.quiet, self.bar, self.tty = quiet, None, sys.stderr.isatty()
        self.start = self.shown = time.perf_counter()
        self.first, self.tokens, self.loss, self.read, self.looked = 0, 0, 0.0, 0, 0.0

    def step(self, step: Step) -> None:
        """Shows a step: running loss, real tokens/s, time left."""
        if self.quiet:
            return
        self.first = self.first or step.index
        self.tokens += step.tokens
        done, now = step.index - self.first + 1, time.perf_counter()
        if now - self.looked > LOOK_SECONDS or step.index == step.total:
            # Reading a loss waits for a GPU. Adam's kind of average: the first count as they are.
            self.looked, self.read = now, self.read + 1
            self.loss += (step.numbers.loss - self.loss) / min(self.read, 20)
        rate = self.tokens / (now - self.start)
        if self.tty:
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=step.total, initial=step.index - 1, unit="step", leave=False)
            note = f"loss {self.loss:.4f}, {rate:,.0f} tokens/s"
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
        elif now - self.shown > PLAIN_SECONDS or step.index == step.total:
            self.shown = now
            left = (step.total - step.index) * (self.shown - self.start) / done
            say(
                f"step {step.index}/{step.total}  loss {self.loss:.4f}  "
                f"lr {step.learning_rate:.2e}  {rate:,.0f} tokens/s  {left:.0f} s left"
            )

    def line(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self.bar is not None:
            self.bar.clear()
        say(text)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def follow(run: RunConfig, config: TrainConfig, quiet: bool) -> Finished:
    """Runs a fine-tuning and shows what happens."""
    bar, finished = Bar(quiet), None
    try:
        for event in fine_tune(run, config):
            if isinstance(event, Step):
                bar.step(event)
            elif isinstance(event, Notice) and (event.loud or not quiet):
                bar.line(("WARNING: " if event.loud else "") + event.text)
            elif isinstance(event, Evaluation) and not quiet:
                text = f"{event.headline}{'  (best so far: saved)' if event.best else ''}"
                bar.line(f"epoch {event.epoch:.2f}  step {event.step}  validation: {text}")
            elif isinstance(event, Finished):
                finished = event
    finally:
        bar.close()
    return finished


def train(args: argparse.Namespace) -> int:
    """`minift train`: the last line of stdout is the summary."""
    done = follow(*args.configurations, args.quiet)
    report(done, args.quiet)
    print(json.dumps(done.summary))
    return 0


def report(done: Finished, quiet: bool) -> None:
    """The table and the verdict of a finished run."""
    if done.table and not quiet:
        say("\nvalidation, best model\n" + done.table)
    if done.verdict:
        say("WARNING: " + done.verdict)


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready to answer."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    dtype: torch.dtype
    columns: Columns


def load_trained(args: argparse.Namespace) -> Loaded:
    """The model of `eval` and `predict`, with the head that it was trained with."""
    device = pick_device(args.device)
    folder = locate(args.model, args.revision, args.token)
    config = read_config(folder)
    limit = length_limit(args.max_seq_length, config.max_len)
    model, tokenizer = load(folder, max_length=limit, head=config.head)
    tokenizer.max_length = args.max_seq_length or tokenizer.max_length  # what is asked for wins
    columns = Columns(*(getattr(args, name) for name in COLUMNS))
    dtype = compute_dtype(TrainConfig(dtype=args.dtype), device)
    return Loaded(model.to(device), tokenizer, dtype, columns)


def check_pairs(rows: list[Row], config: ModelConfig, path: str) -> None:
    """Raises InputError when a model of single texts is given pairs, or the other way round."""
    if not rows or config.pairs in (None, rows[0].pair is not None):
        return
    where = f"{rows[0].file or path}:{rows[0].line}"
    learned, todo = "single texts", "name the text's column with --text_column"
    if config.pairs:
        learned, todo = "pairs of texts", "give two text columns in --data"
    raise InputError(f"{where}: the model was trained on {learned}, got others: {todo}")


def evaluate(args: argparse.Namespace) -> int:
    """`minift eval`: what the task measures; the last line of stdout is JSON."""
    loaded = load_trained(args)
    model, tokenizer = loaded.model, loaded.tokenizer
    run, kind = as_trained(args, model.config), task_of(model.config)
    rows = hear(kind.read_file(run, args.data, args.data))
    if kind is Classification:
        check_pairs(rows, model.config, args.data)
    task = kind.of(run, TrainConfig(), model, tokenizer, rows)
    examples = hear(task.encode_file(run, args.data, args.data, rows, tokenizer))
    start = time.perf_counter()
    outputs = task.outputs(model, examples, loaded.dtype, None)
    measured = task.metrics(outputs, examples)
    metrics = {f"eval_{k}": v for k, v in measured.items()}
    if kind is Instruct:
        answers = GenerateConfig(**{n: getattr(args, n) for n in FLAGS if hasattr(args, n)})
        found = respond(model, tokenizer, rows, answers, loaded.dtype)
        metrics |= {f"eval_{k}": v for k, v in found.metrics().items()}
        for count, what in (
            (found.left_out, "prompts are too long to be answered: they are in no text metric"),
            (found.unfinished, f"answers were cut at {answers.max_new_tokens} new tokens, or where "
                               "the positions end"),
        ):  # fmt: skip
            if count:
                say(f"WARNING: {count:,} of {found.left_out + len(found.answers):,} {what}")
    metrics["eval_runtime"] = time.perf_counter() - start
    if (table := task.table(outputs, examples)) and not args.quiet:
        say(table)
    if text := task.verdict(measured):
        say("WARNING: " + text)
    print(json.dumps(metrics))
    return 0


def task_of(config: ModelConfig) -> type[Task]:
    """What a model was trained for; another's model does not say, but its head does."""
    tokens = "lm" if config.kind.decoder else "mlm"
    return TASKS[config.task or (tokens if config.head == "lm" else "classification")]


def as_trained(args: argparse.Namespace, config: ModelConfig) -> RunConfig:
    """The settings that a file is read with: what is given, and the model's own templates."""
    given = {name: getattr(args, name) or "" for name in COLUMNS}
    names = "prompt_template", "response_template"
    given |= dict(zip(names, config.template or (), strict=False))
    return RunConfig(**given, overflow=args.overflow)


def hear(said: Said) -> Any:
    """Prints the warnings on the way to what is returned."""
    while True:
        try:
            notice = next(said)
        except StopIteration as done:
            return done.value
        if notice.loud:
            say("WARNING: " + notice.text)


def texts(args: argparse.Namespace, columns: Columns) -> Iterator[list[Row]]:
    """What `predict` is to label, in blocks; from a terminal or a slow pipe, line by line."""
    if args.text and args.data:
        raise InputError("expected texts or --data, got both: leave one out")
    if args.text or args.data:
        rows = [Row(t, None, None, i) for i, t in enumerate(args.text, 1)]
        rows = rows or read_texts(args.data, columns)
        for row in rows:
            if any("\ud800" <= c <= "\udfff" for c in row.text):  # how argv holds other bytes
                raise InputError(f"text:{row.line}: expected UTF-8, got {row.text!r}")
        yield from (rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK))
        return
    if sys.stdin is None:
        raise InputError("expected texts, --data or lines of stdin, got a closed stdin")
    if sys.stdin.isatty():
        say("reading lines from the terminal; end with Ctrl-D")
    number, rest = 0, b""
    # os.read returns what is there: a person sees an answer to each line, a file goes in blocks.
    while chunk := os.read(sys.stdin.fileno(), 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        rows = [stdin_row(line, number + i) for i, line in enumerate(lines, 1)]
        number += len(lines)
        yield [row for row in rows if row.text.strip()]
    if rest.strip():
        yield [stdin_row(rest, number + 1)]


def stdin_row(line: bytes, number: int) -> Row:
    """A line of stdin as a row."""
    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    try:
        return Row(line.decode().removesuffix("\r"), None, None, number)
    except UnicodeDecodeError as error:
        raise InputError(
            f"stdin:{number}: expected UTF-8, got byte {line[error.start]:#x}: "
            "convert it with iconv"
        ) from None


def label(args: argparse.Namespace) -> int:
    """`minift predict`: a JSON object a text, in order, and nothing else on stdout."""
    loaded, count, cut, start = load_trained(args), 0, 0, time.perf_counter()
    limit = loaded.tokenizer.max_length
    if task_of(loaded.model.config) is not Classification:
        raise InputError(
            f"{args.model}: knows no labels, it predicts tokens: use minift generate, or train it"
        )
    for block in texts(args, loaded.columns):
        rows = [row for row in block if row.text.strip()]
        check_pairs(rows, loaded.model.config, args.data or "text")
        answers = predict(loaded.model, loaded.tokenizer, rows, loaded.dtype, args.top_k)
        for row in block:  # a line for each row, so that both stay side by side
            answer = next(answers) if row.text.strip() else {"text": row.text, "label": None}
            cut += answer.get("cut", False)
            if cut and args.overflow == "error":
                where = f"{row.file or args.data or 'text'}:{row.line}"
                raise InputError(f"{where}: longer than {limit} tokens: or --overflow cut")
            print(json.dumps(answer, ensure_ascii=False))
        sys.stdout.flush()
        count += len(block)
    if cut:
        say(f"WARNING: {cut:,} of {count:,} texts are longer than {limit} tokens and cut there")
    if not args.quiet:
        say(f"{count:,} texts in {time.perf_counter() - start:.2f} s")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """`minift inspect`: what a model folder holds and would do."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    print(describe(args.model, TrainConfig(**given), args.revision, args.token))
    return 0
