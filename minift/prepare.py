"""From the settings of a run to everything that its first step needs: what can fail, fails here."""

import re
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .batch import Batches, Example
from .config import RunConfig, TrainConfig
from .data import Columns, Row, fingerprint, read_rows
from .errors import InputError
from .hub import locate
from .methods import format_rules
from .ops import TABLES, Ops, ops_for
from .readers import show
from .scratch import make_tokenizer, random_model, read_new_config
from .splits import overlap, stratified_split, with_texts
from .tasks.classification import Classification, label_names
from .tokenizer import Tokenizer
from .train import TrainState, compute_dtype
from .weights import load_model, load_tokenizer, read_config


@dataclass(frozen=True)
class Notice:
    """A line or a table for the reader; `loud` ones must not be missed."""

    text: str
    loud: bool = False


@dataclass(frozen=True)
class Source:
    """Where a run's model comes from."""

    folder: Path | None  # None: it is made from a configuration
    vocabulary: Path | None  # folder of the tokenizer; None: it is made of the training texts
    tokenizer: Tokenizer | None  # known to fit the model of `folder`
    limit: int  # tokens at which texts are cut


@dataclass(frozen=True)
class Job:
    """A run that is ready for its first step."""

    run: RunConfig
    config: TrainConfig
    source: Source
    device: torch.device
    dtype: torch.dtype
    ops: Ops
    model: nn.Module
    tokenizer: Tokenizer
    task: Classification
    state: TrainState
    examples: dict[str, list[Example]]  # train, validation and, if there are any, test
    batches: Batches
    files: dict[str, str]  # path -> sha256


def pick_device(name: str) -> torch.device:
    """The device of a flag.

    Raises:
        InputError: it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"expected device cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name}: no GPU that torch can use is here: use --device cpu")
    return device


def read_data(run: RunConfig, seed: int) -> Generator[Notice, None, dict[str, list[Row]]]:
    """Rows of train, validation and test; says how many, and where validation comes from.

    Raises:
        InputError: a file is not as it should be.
    """
    columns = Columns(run.text_column or None, run.pair_column or None, run.label_column or None)
    files = {"train": run.train_file, "validation": run.validation_file, "test": run.test_file}
    rows = {}
    for part, path in files.items():
        if path:
            rows[part], blank = with_texts(read_rows(path, columns))
            if text := left_out(blank, rows[part], path):
                yield Notice(f"{part}: {text}", loud=True)
    labels = label_names(rows["train"], run.train_file)
    if not run.validation_file:
        train, validation = stratified_split(rows["train"], run.validation_split, seed)
        if not validation:
            hint = "" if len(labels) < len(train) / 2 else ", or is it another column"
            raise InputError(
                f"{run.train_file}: too few rows of each of {len(labels):,} labels to keep some "
                f"for validation: give --validation_file{hint}"
            )
        rows |= {"train": train, "validation": validation}
        yield Notice(
            f"no --validation_file: {len(validation):,} of the training rows, drawn by label with "
            f"seed {seed}, are kept for validation"
        )
    counts = ", ".join(f"{part} {len(rows[part]):,}" for part in files if part in rows)
    kind = "pairs of texts" if rows["train"][0].pair is not None else "texts"
    often = Counter(row.label for row in rows["train"]).most_common()
    shown = ", ".join(f"{name} {n:,}" for name, n in often[:8]) + (", ..." if often[8:] else "")
    first = rows["train"][0]
    texts = show(first.text) if first.pair is None else f"{show(first.text)} and {show(first.pair)}"
    yield Notice(
        f"rows: {counts}; {kind}; {len(labels)} labels\n"
        f"  labels     {shown}\n  first row  {texts}: {first.label}"
    )
    alike = Counter(label.casefold() for label in labels)
    if twice := [label for label in labels if alike[label.casefold()] > 1]:
        yield Notice(f"labels that differ only in case: {', '.join(twice[:8])}", loud=True)
    return rows


def left_out(blank: list[Row], kept: list[Row], path: str) -> str | None:
    """What to say of rows without a text, if there are any.

    Raises:
        InputError: there are no others.
    """
    if not blank:
        return None
    first = f"{blank[0].file or path}:{blank[0].line}"
    if not kept:
        raise InputError(f"{first}: expected a text in some row, every one is blank")
    what = "1 row is" if len(blank) == 1 else f"{len(blank):,} rows are"
    return f"{what} left out for having no text, the first at {first}"


def encode(
    run: RunConfig, rows: dict[str, list[Row]], task: Classification, tokenizer: Tokenizer
) -> Generator[Notice, None, dict[str, list[Example]]]:
    """The examples of all parts; says how many texts were cut.

    Raises:
        InputError: a label is one that the training rows do not have, or a text is too long and
            is not to be cut.
    """
    validation = run.validation_file or run.train_file
    paths = {"train": run.train_file, "validation": validation, "test": run.test_file}
    examples = {}
    for part in rows:
        examples[part] = task.encode(rows[part], tokenizer, paths[part])
        if text := overflow(run.overflow, rows[part], examples[part], tokenizer, paths[part]):
            yield Notice(f"{part}: {text}", loud=True)
    return examples


def overflow(
    how: str, rows: list[Row], examples: list[Example], tokenizer: Tokenizer, path: str
) -> str | None:
    """What to say of texts that are longer than the limit, if there are any.

    Raises:
        InputError: there are some, and `how` is "error".
    """
    long = [row for row, example in zip(rows, examples, strict=True) if example.cut]
    if not long:
        return None
    limit = tokenizer.max_length
    if how == "error":
        raise InputError(
            f"{long[0].file or path}:{long[0].line}: longer than {limit} tokens, as {len(long):,} "
            f"of {len(rows):,} texts are: raise --max_seq_length, or --overflow cut"
        )
    return f"{len(long):,} of {len(rows):,} texts are longer than {limit} tokens and cut there"


def length_limit(wanted: int, max_len: int) -> int:
    """Tokens at which texts are cut.

    Args:
        wanted: 0 for as many as there are.
        max_len: what the model has positions for.

    Raises:
        InputError: more are wanted than there are, or too few to hold a text.
    """
    if wanted > max_len:
        raise InputError(
            f"max_seq_length {wanted} is more than the model's {max_len} positions: lower it"
        )
    if wanted and wanted < 5:
        raise InputError(f"expected max_seq_length 5 or more, got {wanted}")
    return wanted or max_len


def warn_of_data(
    rows: dict[str, list[Row]], examples: dict[str, list[Example]], tokenizer: Tokenizer
) -> Iterator[Notice]:
    """What is strange about the data, and no mistake."""
    for part in ("validation", "test"):
        if n := overlap(rows["train"], rows.get(part, [])):
            text = f"{n:,} of {len(rows[part]):,} {part} rows stand in the training rows too"
            yield Notice(f"{text}: results on them look better than they are", loud=True)
    unknown = tokenizer.backend.token_to_id(tokenizer.special["unk"])
    tokens = sum(len(example.tokens) for example in examples["train"])
    share = sum(example.tokens.count(unknown) for example in examples["train"]) / tokens
    if share > 0.05:
        text = f"{share:.0%} of the tokens of the training rows are unknown to the vocabulary"
        yield Notice(f"{text}: is it of another language, or of small letters only?", loud=True)


def find_source(run: RunConfig) -> Generator[Notice, None, Source]:
    """Finds a run's model, or its configuration, and its vocabulary, before any row is read.

    Raises:
        InputError: one is missing, they do not fit, or the length limit does not fit the model.
    """
    token = run.token or None
    vocabulary = locate(run.tokenizer_name, None, token) if run.tokenizer_name else None
    if run.config_name:
        config = read_new_config(Path(run.config_name))
        return Source(None, vocabulary, None, length_limit(run.max_seq_length, config.max_len))
    name = run.model_name_or_path
    if not Path(name).expanduser().is_dir() and not name.startswith(("/", ".", "~")):
        yield Notice(f"{run.model_name_or_path}: no folder here, looking on the hub")
    folder = locate(run.model_name_or_path, run.model_revision or None, token)
    config = read_config(folder)
    limit = length_limit(run.max_seq_length, config.max_len)
    tokenizer = load_tokenizer(vocabulary or folder, config, limit)
    return Source(folder, vocabulary or folder, tokenizer, limit)


def load_parts(
    run: RunConfig, source: Source, rows: list[Row], labels: tuple[str, ...], seed: int
) -> Generator[Notice, None, tuple[nn.Module, Tokenizer]]:
    """Model and tokenizer; says what became of every tensor of the file.

    Raises:
        InputError: they cannot be loaded or made.
    """
    if source.folder is not None:
        model, report = load_model(source.folder, labels, seed)
        yield Notice(str(report))
        return model, source.tokenizer
    texts = [text for row in rows for text in (row.text, row.pair) if text]
    path = Path(run.config_name)
    tokenizer, config = make_tokenizer(path, source.vocabulary, texts, run.cased, source.limit)
    model = random_model(config, labels, seed)
    made = "" if source.vocabulary else ", made of the training texts"
    yield Notice(
        f"from random weights: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"a vocabulary of {tokenizer.vocab_size:,} tokens{made}"
    )
    return model, tokenizer


def prepare(run: RunConfig, config: TrainConfig) -> Generator[Notice, None, Job]:
    """Reads, checks and loads everything; returns the job.

    Raises:
        InputError: something is wrong with what was given.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    device = pick_device(run.device)
    ops = ops_for(device) if run.ops == "auto" else TABLES[run.ops]
    source = yield from find_source(run)
    rows = yield from read_data(run, config.seed)
    labels = label_names(rows["train"], run.train_file)
    model, tokenizer = yield from load_parts(run, source, rows["train"], labels, config.seed)
    labels, pairs = model.config.labels, rows["train"][0].pair is not None
    model.config = replace(model.config, pairs=pairs)
    weights = Classification.weights(run.class_weights, labels, rows["train"])
    task = Classification(labels, weights, config.label_smoothing_factor)
    examples = yield from encode(run, rows, task, tokenizer)
    check_metric(run.metric_for_best_model, task, examples["validation"])
    yield from warn_of_data(rows, examples, tokenizer)
    model.to(device)
    state = TrainState.new(model, config, ops)
    yield Notice(format_rules(state.groups))
    files = run.train_file, run.validation_file, run.test_file
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    batches = Batches(examples["train"], size, accumulation, config.seed)
    buckets, slack = batches.buckets()
    yield Notice(f"batches of {buckets} different sizes; {slack:.1%} of their rows are empty")
    return Job(
        run=run,
        config=config,
        source=source,
        device=device,
        dtype=compute_dtype(config, device),
        ops=ops,
        model=model,
        tokenizer=tokenizer,
        task=task,
        state=state,
        examples=examples,
        batches=batches,
        files={file: fingerprint(file) for file in files if file},
    )


def check_metric(name: str, task: Classification, examples: list[Example]) -> None:
    """Raises InputError when `name` is not among the metrics."""
    known = task.metrics(torch.zeros(1, len(task.labels)).numpy(), examples[:1])
    if name.removeprefix("eval_") not in known:
        raise InputError(
            f"metric_for_best_model {name!r} is unknown: expected one of {', '.join(known)}"
        )
