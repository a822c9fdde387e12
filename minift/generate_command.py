"""`minift generate`: texts that continue texts, answers to stdout and all else to stderr."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from .cli import add_config
from .commands import say, texts
from .config import TrainConfig
from .data import Columns, Row
from .errors import InputError
from .prepare import pick_device
from .readers import JSON, TABLES, ending_of
from .sampling import FLAGS, GenerateConfig
from .saving import adapter_over, load, trained_config
from .stream_text import stream_text
from .tasks.instruct import prompt_of, prompts
from .tokenizer import Tokenizer
from .train import compute_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `minift generate`; those that every command has are the caller's."""
    parser.add_argument("text", nargs="*", help="to continue; none: --data, or lines of stdin")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="the same as a flag; may be given several times")  # fmt: skip
    parser.add_argument("--raw", action="store_true", help="continue texts as they are, also with "
                        "a model that has learned responses to prompts")  # fmt: skip
    parser.add_argument("--data", metavar="FILE", help="CSV, TSV, JSON lines, or a text a line")
    parser.add_argument("--text_column", help="name, or number from 1")
    parser.add_argument("--model", "--model_name_or_path", dest="model", metavar="DIR",
                        help="a GPT-2: a folder or a hub id; or the base of --adapter")  # fmt: skip
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR", help="over the "
                        "model, in place of its own base")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--token", help="of a private hub id; or HF_TOKEN, `hf auth login`")
    parser.add_argument("--stream", action="store_true", help="one text: its answer as it comes, "
                        "as plain text")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1")
    add_config(parser, GenerateConfig, FLAGS)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="ends an answer before it; may be given several times")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """A JSON object a text, in their order, and nothing else on stdout; with --stream the answer
    itself."""
    given = {name: getattr(args, name) for name in FLAGS if hasattr(args, name)}
    config = GenerateConfig(**given, stop=tuple(args.stop))
    args.text += args.prompt
    if args.stream and len(args.text) != 1:
        raise InputError(f"expected one text with --stream, got {len(args.text)}")
    # A person who asks one thing wants to read; a script wants JSON.
    args.stream |= len(args.text) == 1 and sys.stdout.isatty()
    device = pick_device(args.device)
    folder, base = adapter_over(args.model, args.adapter, args.revision, args.token)
    config_of = trained_config(folder, base)
    if config_of.head == "classifier" and config_of.trained_head:
        raise InputError(f"{args.model}: has learned labels and no texts: use minift predict")
    model, tokenizer = load(folder, head="lm", base=base)
    model = model.to(device)
    dtype = compute_dtype(TrainConfig(dtype=args.dtype), device)
    ends, made, start = Counter(), 0, time.perf_counter()
    template = None if args.raw or not model.config.template else model.config.template[0]
    for block in _blocks(args, template, tokenizer):
        room = model.config.room if args.data else None
        kept = [i for i, row in enumerate(block) if not _unfit(row, tokenizer, room)]
        numbers, written = [made + i for i in kept], [block[i].text for i in kept]
        pieces = stream_text(model, tokenizer, written, config, numbers=numbers, dtype=dtype)
        for answer in _shown(pieces) if args.stream else _in_order(pieces, block, kept):
            ends[answer["end"]] += 1
            if not args.stream:
                print(json.dumps(answer, ensure_ascii=False), flush=True)
        made += len(block)
    if unfit := ends["blank"] + ends["too long"]:
        say(f"WARNING: {unfit:,} of {made:,} texts are blank or too long: their answer is null")
    if ends["positions"]:
        say(
            f"WARNING: {ends['positions']:,} of {made:,} answers end where the model's "
            f"{model.config.room} positions end, before max_new_tokens {config.max_new_tokens}"
        )
    if not args.quiet:
        say(f"{made:,} texts in {time.perf_counter() - start:.2f} s")
    return 0


def _blocks(
    args: argparse.Namespace, template: str | None, tokenizer: Tokenizer
) -> Iterator[list[Row]]:
    """Rows to continue: all that are given at once, lines of stdin as they come. With a template
    the fields of a file's records, or a text, are put into it."""
    if template and args.data and ending_of(args.data) in TABLES + JSON and not args.text_column:
        found = prompts(args.data, template)
        yield [Row(turns.prompt(tokenizer), None, None, turns.line, turns.file) for turns in found]
        return
    blocks = texts(args, Columns(args.text_column, None, None))
    if args.text or args.data:
        blocks = iter([[row for block in blocks for row in block]])
    for block in blocks:
        for row in block:
            if not row.text and not args.data:
                raise InputError(f"text:{row.line}: expected a text to continue, got an empty one")
        if template:
            block = [replace(row, text=row.text and prompt_of(row.text, template)) for row in block]
        if block:
            yield block


def _unfit(row: Row, tokenizer: Tokenizer, room: int | None) -> str:
    """Why a row of a file cannot be continued, "" if it can; None: it is no row of a file."""
    if room is None:
        return ""
    if not row.text.strip():
        return "blank"
    return "too long" if len(tokenizer.ids([row.text])[0]) >= room else ""


def _in_order(pieces, block: list[Row], kept: list[int]) -> Iterator[dict]:
    """The answer to each row, in their order, as soon as those before it are there; null to those
    that are not kept."""
    answers, ends, done = {i: "" for i in kept}, {}, 0
    for piece in chain(pieces, [None]):
        if piece is not None:
            answers[kept[piece.prompt]] += piece.text
            if piece.end:
                ends[kept[piece.prompt]] = piece.end
        while done < len(block) and (done in ends or done not in answers):
            end = ends.pop(done, "too long" if block[done].text.strip() else "blank")
            yield {"text": block[done].text, "answer": answers.pop(done, None), "end": end}
            done += 1


def _shown(pieces) -> Iterator[dict]:
    """Writes the pieces of the one answer to stdout; then says how it ended."""
    for piece in pieces:
        sys.stdout.write(piece.text + ("\n" if piece.end else ""))
        sys.stdout.flush()
        if piece.end:
            yield {"end": piece.end}
