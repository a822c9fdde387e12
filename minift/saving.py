"""Trained models on disk: a whole model, or an adapter over one that is elsewhere. Whoever saves,
loads or goes on need not know which."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .adapter_files import (
    CONFIG,
    NO_BASE,
    TASK_TYPES,
    WEIGHTS,
    attach_adapter,
    fill_adapter,
    is_adapter,
    save_adapter,
)
from .adapters import adapter_of, remove_adapter
from .config import LABELLED, ModelConfig
from .errors import InputError
from .files import make_folder, read_json
from .hub import locate
from .layers import body_of, init_weights
from .names import copy_parts, hf_names, names_today
from .storage import open_tensors
from .tokenizer import Tokenizer
from .weights import (
    CLASSES,
    load_model,
    load_tokenizer,
    make_model,
    read_config,
    read_weights,
    save_model,
)

_OF = {False: ("model.safetensors",), True: (CONFIG,)}  # whether it is an adapter -> files
TOKENIZERS = "tokenizer.json", "vocab.txt", "vocab.json"


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes a model, or its adapter alone, each file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    adapts = adapter_of(model) is not None
    if other := next((x for x in _OF[not adapts] if (folder / x).exists()), None):
        what = "an adapter" if adapts else "a model"
        raise InputError(f"{folder}: holds {other}, {what} would not be found: save it elsewhere")
    (save_adapter if adapts else save_model)(model, folder)


def restore(model: nn.Module, folder: Path) -> None:
    """Puts what `save_trained` wrote of this model back into it.

    Raises:
        InputError: a file is missing or damaged, or is of another model.
    """
    if adapter_of(model) is None:
        read_weights(model, folder / "model.safetensors")
    else:
        fill_adapter(model, folder)


def trained_config(folder: Path, base: str | Path | None = None) -> ModelConfig:
    """The configuration of a trained model; of an adapter that PEFT made, which has none, that of
    its base with the head that its file holds.

    Args:
        folder: of a model or an adapter.
        base: of an adapter, in place of what it names.

    Raises:
        InputError: a file is missing or cannot be used.
    """
    if not is_adapter(folder) or (folder / "config.json").is_file():
        return read_config(folder)
    raw = read_json(folder / CONFIG, ("peft_type",))
    config = read_config(base_of(folder, base))
    heads = {theirs: ours for ours, theirs in TASK_TYPES.items()} | {"CAUSAL_LM": "lm"}
    head = heads.get(raw.get("task_type"))
    if head is None:
        known = ", ".join(heads)
        raise InputError(
            f"{folder / CONFIG}: expected task_type {known}, got {raw.get('task_type')!r}"
        )
    count = raw.get("num_virtual_tokens")
    adapter = {"count": count, "method": ""} if isinstance(count, int) else {"method": "lora"}
    config = replace(config, head=head, adapter=adapter, task="", settings={}, template=None)
    if head not in LABELLED:
        return replace(config, labels=())
    ends = {"classifier": config.kind.head + ".weight", "tokens": "classifier.weight"}
    with open_tensors(folder / WEIGHTS) as tensors:
        found = [name for name in tensors.names if name.endswith(ends[head])]
        if not found:
            raise InputError(f"{folder / WEIGHTS}: holds no head {ends[head]!r}: is it saved?")
        count = len(tensors.get(found[0]))
    if count != len(config.labels):
        config = replace(config, labels=tuple(f"LABEL_{i}" for i in range(count)))
    return config


def base_of(folder: Path, base: str | Path | None = None) -> Path:
    """The folder of an adapter's base model.

    Args:
        folder: of the adapter.
        base: in place of what it names.

    Raises:
        InputError: there is none.
    """
    named = base or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not named:
        raise InputError(f"{folder}: names no base model: give it as --model, this as --adapter")
    try:
        return locate(named)
    except InputError as error:
        if base:
            raise
        raise InputError(
            f"{folder}: its base model is not where it was ({error}): give another place as "
            "--model, this as --adapter"
        ) from None


def adapter_over(
    model: str | None,
    adapters: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Path, str | None]:
    """What a command line names: the folder to load, and the base in place of what it names.

    Args:
        model: a folder or hub id: a model, or an adapter alone, or the base of one.
        adapters: one at most.
        revision, token: of `model` on the hub.

    Raises:
        InputError: they cannot be meant.
    """
    if len(adapters) > 1:
        raise InputError(f"expected one --adapter, got {len(adapters)}: predict takes several")
    if not adapters:
        if not model:
            raise InputError("expected --model, or --adapter with its own base, got none")
        return locate(model, revision, token), None
    folder = locate(adapters[0])
    if not is_adapter(folder):
        raise InputError(f"{folder}: is no adapter, it has no {CONFIG}: give it as --model")
    if not model:
        return folder, None
    base = locate(model, revision, token)
    if is_adapter(base):
        raise InputError(f"{base}: is an adapter itself: give its base as --model, or it alone")
    return folder, str(base)


def load(
    folder: str | Path,
    labels: tuple[str, ...] | None = None,
    max_length: int | None = None,
    seed: int = 0,
    head: str | None = None,
    base: str | None = None,
) -> tuple[nn.Module, Tokenizer]:
    """A model folder's model and tokenizer, known to fit each other; or those of an adapter.

    Args:
        folder: of a model or an adapter, or a hub id.
        labels, seed, head: as in `load_model`; an adapter has its own labels.
        max_length: tokens at which texts are cut; default, and at most, what the model takes.
        base: of an adapter, in place of what it names.

    Raises:
        InputError: see `load_model` and `load_tokenizer`; or an adapter does not fit its base.
    """
    folder = locate(folder)
    if not is_adapter(folder):
        model, _ = load_model(folder, labels, seed, head)
        source = folder
    elif labels is not None:
        raise InputError(f"{folder}: {NO_BASE}")
    else:
        source = base_of(folder, base)
        model = load_adapted(folder, source, head)
    return model, tokenizer_of(folder, source, model.config, max_length)


def tokenizer_of(
    folder: Path, base: Path, config: ModelConfig, max_length: int | None
) -> Tokenizer:
    """The tokenizer of a folder, or of its base if it has none; see `load`."""
    own = any((folder / name).is_file() for name in TOKENIZERS)
    limit = min(max_length or config.room, config.room)
    return load_tokenizer(folder if own else base, config, limit)


def _fitting(folder: Path, place: Path, head: str | None = None) -> ModelConfig:
    """The configuration of an adapter's model, which fits its base."""
    config, below = trained_config(folder, place), read_config(place)
    if head is not None and config.head != head:
        raise InputError(f"{folder}: is of a model with another head, {config.head}, not {head}")
    for name in ("family", "dim", "n_layer", "n_head", "vocab_size"):
        ours, theirs = getattr(config, name), getattr(below, name)
        if ours != theirs:
            raise InputError(
                f"{folder}: is an adapter of another base: of {name} {ours}, {place} has {theirs}"
            )
    return config


def load_adapted(folder: Path, place: Path, head: str | None = None) -> nn.Module:
    """A base with an adapter and the head that belongs to it.

    Args:
        folder: of the adapter.
        place: of the base.
        head: that it must have.

    Raises:
        InputError: a file is missing or damaged, or they do not fit each other.
    """
    config, below = _fitting(folder, place, head), read_config(place)
    model = make_model(config, place / "config.json")
    heads = (getattr(model, name, None) for name in ("pooler", "head"))
    init_weights(nn.ModuleList(filter(None, heads)), config.init_std, 0)
    keeps = below.head == config.head
    keeps &= config.head not in LABELLED or len(below.labels) == len(config.labels)
    report = read_weights(model, place, keeps, may_be_new=True)
    attach_adapter(model, folder, tuple(report.new))
    return model


class Adapters:
    """A base that is read once, and adapters over it, one at a time.

    adapters = Adapters("BASE_DIR")
    model, tokenizer = adapters.use("sentiment")
    model, tokenizer = adapters.use("names")      # the same body; the first model is over
    """

    def __init__(self, base: str | Path):
        """
        Args:
            base: a model folder or a hub id.
        """
        self.base = str(base)
        self.model: nn.Module | None = None

    def use(self, folder: str | Path, max_length: int | None = None) -> tuple[nn.Module, Tokenizer]:
        """The base with the adapter of a folder and the head that belongs to it.

        Raises:
            InputError: see `load`.
        """
        folder = locate(folder)
        if not is_adapter(folder):
            raise InputError(f"{folder}: expected an adapter, found no {CONFIG}")
        if self.model is None:
            self.model, tokenizer = load(folder, None, max_length, base=self.base)
            return self.model, tokenizer
        place = base_of(folder, self.base)
        config = _fitting(folder, place)
        remove_adapter(self.model)
        name = config.kind.body.removesuffix(".")
        body, device = body_of(self.model), next(self.model.parameters()).device
        with torch.device("meta"):
            model = CLASSES[config.kind.decoder, config.head](config)
        setattr(model, name, body)
        for part in model.children():
            if part is not body:
                part.to_empty(device=device)
        self.model = model
        attach_adapter(model, folder, _read_head(model, place))
        return model, tokenizer_of(folder, place, model.config, max_length)


def _read_head(model: nn.Module, place: Path) -> tuple[str, ...]:
    """Reads what a base's file has of a model's head; returns what it does not have."""
    config, new = model.config, []
    body = config.kind.body
    with open_tensors(place) as tensors:
        stored = names_today(tensors.names, config.kind, tensors.path)
        for ours, p in model.named_parameters():
            if ours.startswith(body):
                continue
            names = [stored.get(theirs) for theirs in hf_names(config)[ours]]
            if None in names or tensors.get(names[0]).shape != p.shape:
                nn.init.zeros_(p)
                new.append(ours)
            else:
                copy_parts(p.detach(), {names[0]: tensors.get(names[0])}, ours, config, place)
    return tuple(new)


def save(model: nn.Module, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a folder that `load` reads, and transformers or PEFT.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(folder)
    make_folder(folder)
    tokenizer.save(folder)
    save_trained(model, folder)
