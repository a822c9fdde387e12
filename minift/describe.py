"""What a model folder, or a configuration, would become: before anything is trained."""

import re
from pathlib import Path

from torch import nn

from .adapter_files import in_peft, is_adapter
from .adapters import ADAPTERS, Adapter, adapt
from .config import ModelConfig, TrainConfig
from .hub import locate
from .methods import format_rules, group_of
from .saving import base_of, load
from .scratch import random_model, read_new_config
from .tokenizer import Tokenizer
from .train import TrainState
from .weights import LoadReport, load_model, load_tokenizer, read_config

TWO = ("label 0", "label 1")  # what is without a trained head is described as if for two labels


def describe(
    name: str,
    config: TrainConfig,
    revision: str | None = None,
    token: str | None = None,
    head: str | None = None,
) -> str:
    """Size, vocabulary, limits, what would load and what would train, as text.

    Args:
        name: a model folder, a hub id, or the path of a configuration file.
        config: its rules say what would train.
        revision, token: of a hub id.
        head: as what it would load, see `load_model`; None: as what it is.

    Raises:
        InputError: it cannot be loaded, or the rules do not fit it.
    """
    path = Path(name)
    if path.is_file():
        new = read_new_config(path)
        model = random_model(new, TWO, config.seed, head or _usual_head(new))
        parts = [_sizes(name, model.config), "  a configuration: the weights would be random"]
        return "\n".join([*parts, _groups(model, None), _rules(model, config)])
    folder = locate(name, revision, token)
    if is_adapter(folder):
        return describe_adapter(folder)
    read = read_config(folder)
    tokenizer = load_tokenizer(folder, read, read.max_len)
    head = head or _usual_head(read)
    trained = read.trained_head and read.head == head
    model, report = load_model(folder, None if trained else TWO, head=head)
    return "\n".join(
        [
            _sizes(name, read),
            _vocabulary(tokenizer, read),
            _predicts(read, head, trained),
            str(report),
            _groups(model, report),
            _rules(model, config, tuple(report.new)),
        ]
    )


def _usual_head(c: ModelConfig) -> str:
    """What the configuration is of: a decoder that is no classifier predicts tokens."""
    return "lm" if c.kind.decoder and not c.trained_head else c.head


def _predicts(c: ModelConfig, head: str, trained: bool) -> str:
    if head == "lm":
        what = "tokens, each from those before it" if c.kind.decoder else "masked tokens"
        trained_for = f" (trained for {c.task})" if trained and c.task else ""
        return f"  predicts   {what}{trained_for}"
    if head == "span":
        return "  predicts   where in a text the answer to a question stands"
    if not trained:
        return "  labels     none: not a classifier yet, shown as if for 2"
    if c.task == "regression" and len(c.labels) == 1:
        return f"  predicts   a number: {c.labels[0]}"
    labels = ", ".join(c.labels[:20]) + (", ..." if len(c.labels) > 20 else "")
    several = ""
    if c.task == "multilabel":
        several = f"; any number of them, threshold {c.settings.get('threshold', 0.5)}"
    return f"  labels     {len(c.labels)}: {labels}{several}"


def _sizes(name: str, c: ModelConfig) -> str:
    return (
        f"{name}: {c.family}, {c.n_layer} layers, width {c.dim}, {c.n_head} heads of "
        f"{c.dim // c.n_head}, MLP {c.ffn_dim} ({c.activation}), at most {c.max_len} tokens"
    )


def _vocabulary(tokenizer: Tokenizer, c: ModelConfig) -> str:
    special = ", ".join(f"{role} {token}" for role, token in tokenizer.special.items())
    kind = type(tokenizer.backend.model).__name__
    return (
        f"  vocabulary {kind}, {tokenizer.vocab_size:,} tokens of {c.vocab_size:,} rows\n"
        f"  specials   {special}\n"
        f"  texts      are cut at {tokenizer.max_length} tokens of {c.max_len} positions"
    )


def _groups(model: nn.Module, report: LoadReport | None) -> str:
    numbers: dict[str, int] = {}
    stored: dict[str, dict[str, None]] = {}
    for name, parameter in model.named_parameters():
        group = group_of(name)
        numbers[group] = numbers.get(group, 0) + parameter.numel()
        dtype = report.dtypes.get(name, "new") if report else "new"
        stored.setdefault(group, {})[dtype] = None
    lines = [f"  {group:<12} {n:>12,}  {', '.join(stored[group])}" for group, n in numbers.items()]
    return "\n".join(["  group          parameters  stored as", *lines])


def describe_adapter(folder: Path, base: str | None = None) -> str:
    """What an adapter's folder holds, as text.

    Args:
        folder: of the adapter.
        base: in place of the one that it names.

    Raises:
        InputError: it cannot be loaded, or does not fit the base.
    """
    model, _ = load(folder, base=base)
    adapter, config = model.adapter, model.config
    what = f"{adapter.count} virtual tokens"
    if adapter.method == "lora":
        what = f"rank {adapter.r}, alpha {adapter.alpha:g}, of {', '.join(adapter.targets)}"
    elsewhere = "" if in_peft(config, adapter) else "; PEFT has no model for it"
    own = ", ".join(model.head_groups) or "no head"
    added = [p for n, p in model.named_parameters() if re.search(r"\.(lora|prompt|prefix)\.", n)]
    heads = [p for n, p in model.named_parameters() if n in adapter.whole]
    counts = [sum(p.numel() for p in part) for part in (added, heads)]
    return "\n".join(
        [
            _sizes(str(folder), config),
            f"  adapter    {adapter.method}, {what}{elsewhere}",
            f"  base       {base or config.adapter.get('base') or base_of(folder)}",
            f"  parameters {counts[0]:,} of the adapter, {counts[1]:,} of {own}",
            _predicts(config, config.head, True),
        ]
    )


def _rules(model: nn.Module, config: TrainConfig, new: tuple[str, ...] = ()) -> str:
    if config.method in ADAPTERS:
        adapt(model, Adapter.of(config, model.config), new)
    return "  the rules of `minift train`\n" + format_rules(TrainState.new(model, config).groups)
