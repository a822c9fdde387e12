"""From the settings of a run to everything that its first step needs: what can fail, fails here."""

import math
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from .adapter_files import NO_BASE, is_adapter, note_base
from .adapters import ADAPTERS, Adapter, adapt, begin
from .batch import Batches, Example
from .config import RunConfig, TrainConfig
from .data import fingerprint
from .errors import InputError, Notice
from .hub import locate
from .layers import body_of
from .methods import check_read, format_rules
from .ops import TABLES, Ops, ops_for
from .scratch import make_tokenizer, random_model, read_new_config
from .tasks import TASKS
from .tasks.task import File, Setup, Task
from .tokenizer import Tokenizer
from .train import TrainState, compute_dtype, total_steps
from .weights import load_model, load_tokenizer, read_config

FEW_STEPS, FEW_JUDGED, FEW_IN_EPOCH = 20, 20, 3  # of a run, validation rows, steps of an epoch


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
    task: Task
    state: TrainState
    examples: dict[str, Sequence[Example]]  # train, validation and, if there are any, test
    batches: Batches
    files: dict[str, str]  # path -> sha256
    dropped: list[tuple[str, str]]  # rows that are left out: file:line, why


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


def check_flags(run: RunConfig, config: TrainConfig) -> None:
    """Raises InputError when a setting is given that the task does not read."""
    check_read({f.name: v for f in fields(config) if (v := getattr(config, f.name)) != f.default})
    unread = "prompt_init_text" if config.prefix_projection else "prefix_hidden_size"
    if getattr(config, unread):
        beside = "beside" if config.prefix_projection else "without"
        raise InputError(f"--{unread} is not read {beside} --prefix_projection: leave it out")
    if config.prompt_init_text and config.prompt_init != "vocab":
        raise InputError("--prompt_init_text says the words: leave --prompt_init out")
    mine = TASKS[run.task].flags
    known = {name for task in TASKS.values() for name in task.flags}
    for given in (run, config):
        for f in fields(given):
            if f.name in known and f.name not in mine and getattr(given, f.name) != f.default:
                raise InputError(f"--{f.name} is not read by --task {run.task}: leave it out")


def files_of(run: RunConfig) -> dict[str, File]:
    """The files of a run by part: train, validation and test, where there are such."""
    paths = {"train": run.train_file, "validation": run.validation_file, "test": run.test_file}
    return {part: File(run, part, path) for part, path in paths.items() if path}


def find_source(run: RunConfig, train: TrainConfig) -> Generator[Notice, None, Source]:
    """Finds a run's model, or its configuration, and its vocabulary, before any row is read.

    Raises:
        InputError: one is missing, they do not fit, or the length limit does not fit the model.
    """
    adapts = train.method in ADAPTERS
    token = run.token or None
    vocabulary = locate(run.tokenizer_name, None, token) if run.tokenizer_name else None
    if run.config_name and adapts:
        raise InputError(f"expected --model for method {train.method}: it is trained beside one")
    if run.config_name:
        config = read_new_config(Path(run.config_name))
        TASKS[run.task].check(config)
        return Source(None, vocabulary, None, length_limit(run.max_seq_length, config.room))
    name = run.model_name_or_path
    if not Path(name).expanduser().is_dir() and not name.startswith(("/", ".", "~")):
        yield Notice(f"{run.model_name_or_path}: no folder here, looking on the hub")
    folder = locate(run.model_name_or_path, run.model_revision or None, token)
    if is_adapter(folder):
        raise InputError(f"{folder}: {NO_BASE}")
    config = read_config(folder)
    TASKS[run.task].check(config)
    if adapts:
        adapter = Adapter.of(train, config)
        config = replace(config, adapter={"method": train.method, "count": adapter.count})
    limit = length_limit(run.max_seq_length, config.room)
    tokenizer = load_tokenizer(vocabulary or folder, config, limit)
    tokenizer.max_length = run.max_seq_length or tokenizer.max_length  # what is asked for wins
    return Source(folder, vocabulary or folder, tokenizer, limit)


def load_parts(
    run: RunConfig,
    train: TrainConfig,
    source: Source,
    texts: Iterable[str],
    labels: tuple[str, ...],
) -> Generator[Notice, None, tuple[nn.Module, Tokenizer]]:
    """Model and tokenizer, with the adapter that is trained, if one is; says what became of every
    tensor of the file.

    Raises:
        InputError: they cannot be loaded or made.
    """
    seed = train.seed
    if source.folder is not None:
        model, report = load_model(source.folder, labels, seed, TASKS[run.task].head)
        yield Notice(str(report))
        if train.method in ADAPTERS:
            adapt(model, Adapter.of(train, model.config), tuple(report.new))
            begin(model, train, source.tokenizer)
            named = Path(run.model_name_or_path).expanduser()
            base = str(named.resolve()) if named.is_dir() else run.model_name_or_path
            note_base(model, base)
        return model, source.tokenizer
    path = Path(run.config_name)
    head = TASKS[run.task].head
    tokenizer, config = make_tokenizer(
        path, source.vocabulary, texts, run.cased, source.limit, head
    )
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
    check_flags(run, config)
    if run.threads:
        torch.set_num_threads(run.threads)
    device = pick_device(run.device)
    ops = ops_for(device) if run.ops == "auto" else TABLES[run.ops]
    source = yield from find_source(run, config)
    kind = TASKS[run.task]
    files = files_of(run)
    rows = yield from kind.read(files, config.seed)
    train, labels = rows["train"], kind.labels_of(rows["train"], run)
    texts = kind.texts(train)
    model, tokenizer = yield from load_parts(run, config, source, texts, labels)
    task = kind.of(Setup(run, config, model, tokenizer), train)
    examples = yield from task.encode_all(files, rows, tokenizer)
    check_metric(run.metric_for_best_model, task, model, examples["validation"], ops)
    yield from task.strange(rows, examples, tokenizer)
    model.to(device)
    state = TrainState.new(model, config, ops)
    yield Notice(format_rules(state.groups))
    paths = *(file.path for file in files.values()), run.config_name
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    vary = task.vary(examples["train"], config.seed)
    weights = task.sampling(examples["train"])
    virtual = body_of(model).virtual
    batches = Batches(examples["train"], size, accumulation, config.seed, vary, weights, virtual)
    buckets, slack = batches.buckets()
    yield Notice(
        f"batches of {buckets} different numbers of rows; {slack:.1%} of all rows are empty"
    )
    yield from little(run, config, len(examples["validation"]), len(batches))
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
        files={path: fingerprint(path) for path in paths if path},
        dropped=[lost for file in files.values() for lost in file.dropped],
    )


def little(run: RunConfig, config: TrainConfig, judged: int, epoch: int) -> Iterator[Notice]:
    """Says what goes wrong with few rows.

    Args:
        run, config: the settings.
        judged: number of validation rows.
        epoch: optimizer steps of an epoch.
    """
    steps = total_steps(config, epoch)
    if steps < FEW_STEPS and not config.max_steps:  # else they are what is wanted
        text = f"the run has {steps:,} optimizer step{'s' * (steps != 1)}"
        yield Notice(f"{text}, too few to learn much: --max_steps 60 makes more")
    if judged < FEW_JUDGED and TASKS[run.task].head != "lm":  # whose rows are many targets
        text = f"metrics of {judged:,} validation row{'s' * (judged != 1)} say little"
        yield Notice(f"{text}: give more by --validation_file")
    if epoch < FEW_IN_EPOCH and steps >= FEW_STEPS and not run.eval_steps:
        text = f"an epoch has {epoch} step{'s' * (epoch != 1)}: {math.ceil(steps / epoch):,}"
        yield Notice(f"{text} evaluations and checkpoints; --eval_steps 20 makes fewer")


def check_metric(
    name: str, task: Task, model: nn.Module, examples: Sequence[Example], ops: Ops
) -> None:
    """Raises InputError when `name` is not among the metrics."""
    if not name:
        return
    outputs = task.outputs(model, examples[:1], torch.float32, ops_for(torch.device("cpu")))
    known = task.metrics(outputs)
    if name.removeprefix("eval_") not in known:
        raise InputError(
            f"metric_for_best_model {name!r} is unknown: expected one of {', '.join(known)}"
        )
