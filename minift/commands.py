"""What `train`, `inspect` and `merge` do and print, and what all commands share: results go to
stdout, progress to stderr."""

import argparse
import codecs
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from .adapters import merge as merge_adapter
from .config import RunConfig, TrainConfig
from .data import Columns, Row, read_texts
from .describe import describe, describe_adapter
from .errors import InputError, Notice
from .methods import rate_of
from .run import Evaluation, Finished, fine_tune
from .saving import adapter_over, load, save
from .train import Step

PLAIN_SECONDS = 10.0  # between lines of progress when stderr is no terminal
LOOK_SECONDS = 0.1  # between two looks at the loss
BLOCK = 256  # texts that are answered together


def run(args: argparse.Namespace) -> int:
    """Runs the command that `args` names; returns the exit status."""
    return {"train": train, "inspect": inspect, "merge": merge}[args.command](args)


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


def texts(args: argparse.Namespace, columns: Columns) -> Iterator[list[Row]]:
    """Texts to answer, in blocks; from a terminal or a slow pipe, line by line."""
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


def inspect(args: argparse.Namespace) -> int:
    """`minift inspect`: what a model folder holds and would do."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    config = TrainConfig(**rate_of(given) | given)
    if not args.adapter:
        print(describe(args.model, config, args.revision, args.token))
        return 0
    folder, base = adapter_over(args.model, args.adapter, args.revision, args.token)
    print(describe_adapter(folder, base))
    return 0


def merge(args: argparse.Namespace) -> int:
    """`minift merge`: a model whose weights hold what LoRA had learned beside them."""
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: is there already and not empty: choose another folder")
    folder, base = adapter_over(args.model, args.adapter)
    model, tokenizer = load(folder, base=base)
    merge_adapter(model)
    save(model, tokenizer, output)
    if not args.quiet:
        say(f"{output}: a model of its own, for minift and transformers")
    return 0
