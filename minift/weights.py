"""Models on disk: Hugging Face names and ours, a strict load that reports, a save.

Loading accounts for every tensor of a file: loaded, new (a head that the file does not have), or
ignored (buffers, other heads); anything else stops.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .bert import BertClassifier
from .config import ModelConfig
from .errors import InputError
from .families import Family
from .files import make_folder, read_json, write_file, write_json
from .hub import locate
from .layers import init_weights
from .storage import open_tensors
from .tokenizer import Tokenizer

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
WRAPPERS = ("module", "_orig_mod")  # what DDP and torch.compile put into names
NEW_ALLOWED = ("pooler.", "head.")


def hf_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter names -> Hugging Face's; several are one after the other along rows."""
    kind, table = config.kind, "bert.embeddings.{}.weight".format
    theirs = kind.prefix + "embeddings.{}_embeddings.weight"
    tables = ("word", "position", "token_type")[: 3 if config.n_types else 2]
    pairs = {table(name): (theirs.format(name),) for name in tables}
    for end in (".weight", ".bias"):
        pairs["bert.embeddings.norm" + end] = (kind.prefix + "embeddings.LayerNorm" + end,)
        pairs["pooler" + end] = (kind.dense + end,)
        pairs["head" + end] = (kind.head + end,)
        for i in range(config.n_layer):
            for name, names in kind.layer.items():
                layer = f"{kind.prefix}{kind.layers}.{i}."
                pairs[f"bert.layers.{i}.{name}{end}"] = tuple(layer + n + end for n in names)
    return pairs


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor."""

    loaded: dict[str, int]  # our name -> numbers in it
    new: dict[str, int]  # random: not in the file
    ignored: list[str]  # names in the file that this model has no use for
    dtypes: dict[str, str]  # our name -> dtype in the file, of the loaded ones

    def __str__(self) -> str:
        def row(what, names, numbers=""):
            shown = ", ".join(names) if len(names) < 5 else f"{len(names)} tensors"
            return f"  {what:<8} {numbers:>12}  {shown}"

        dtypes = ", ".join(sorted(set(self.dtypes.values())))
        lines = [f"  weights       numbers  tensors, stored as {dtypes}"]
        lines.append(row("loaded", list(self.loaded), f"{sum(self.loaded.values()):,}"))
        if self.new:
            lines.append(row("new", list(self.new), f"{sum(self.new.values()):,}"))
        if self.ignored:
            lines.append(row("ignored", self.ignored))
        return "\n".join(lines)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder.

    Raises:
        InputError: there is no such folder or file, or it cannot be used.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a model folder, found none: check the path")
    begun = sorted(folder.glob("checkpoint-*/config.json"), key=os.path.getmtime)
    if begun and not (folder / "config.json").exists():
        raise InputError(
            f"{folder}: a run that was interrupted before it had a best model: go on with it, or "
            f"use {begun[-1].parent}"
        )
    raw = read_json(folder / "config.json")
    try:
        return ModelConfig.from_hf(raw)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def load_model(
    folder: str | Path, labels: tuple[str, ...] | None = None, seed: int = 0
) -> tuple[BertClassifier, LoadReport]:
    """A classifier from a model folder, in fp32.

    Args:
        folder: with config.json and weights, or a hub id.
        labels: names of the classes to learn; the folder's own order wins when they are the same
            names, otherwise the head is new. None: as the folder says, and its head must be there.
        seed: of the new head's weights.

    Raises:
        InputError: a file is missing or damaged, or a tensor is missing, unknown or of a shape
            that config.json does not give it.
    """
    folder = locate(folder)
    config = read_config(folder)
    keep = labels is None or (set(labels) == set(config.labels) and config.trained_head)
    config = config if keep else replace(config, labels=labels)
    if not config.labels:
        raise InputError(f"{folder}: config.json has no id2label: is this a trained classifier?")
    if labels is None and not config.trained_head:
        made_for = ", ".join(map(str, config.raw["architectures"]))
        raise InputError(
            f"{folder}: expected a classifier of texts, config.json is of {made_for}: train it"
        )
    model = make_model(config, folder / "config.json")
    init_weights(nn.ModuleList([model.pooler, model.head]), config.init_std, seed)
    return model, read_weights(model, folder, keep_head=keep, new=labels)


def make_model(config: ModelConfig, path: Path) -> BertClassifier:
    """A model whose memory holds anything yet.

    Raises:
        InputError: it does not fit into memory; `path` is where its configuration stands.
    """
    try:
        return BertClassifier(config)
    except RuntimeError:
        raise InputError(f"{path}: asks for more memory than there is") from None


@torch.no_grad()
def read_weights(
    model: BertClassifier, path: Path, keep_head: bool = True, new: object = None
) -> LoadReport:
    """Copies stored tensors into a model's own memory, strictly.

    Args:
        model: whose parameters are overwritten.
        path: a model folder, or a file of weights.
        keep_head: False ignores the file's head.
        new: None forbids parameters that the file does not have.

    Raises:
        InputError: see `load_model`.
    """
    kind, names = model.config.kind, hf_names(model.config)
    loaded, fresh, dtypes = {}, {}, {}
    with open_tensors(path) as tensors:
        stored = _stored(tensors.names, kind, tensors.path)
        found = {k: v for k, v in stored.items() if keep_head or not k.startswith(kind.head + ".")}
        for ours, parameter in model.named_parameters():
            parts = [found.pop(theirs, None) for theirs in names[ours]]
            if None not in parts:
                read = {part: tensors.get(part) for part in parts}
                _copy(parameter, read, ours, tensors.path)
                dtypes[ours] = str(read[parts[0]].dtype).removeprefix("torch.")
                loaded[ours] = parameter.numel()
            elif new is None or not ours.startswith(NEW_ALLOWED):
                raise InputError(
                    f"{tensors.path}: expected a tensor {names[ours][0]!r}, found none: "
                    f"is this a {model.config.family} for this task?"
                )
            else:
                fresh[ours] = parameter.numel()
        # Another task's classifier may have names of its own.
        ignored = (*kind.other_heads, *(() if keep_head else ("classifier.",)))
        unknown = sorted(n for n in found if not n.endswith(BUFFERS) and not n.startswith(ignored))
        if unknown:
            raise InputError(
                f"{tensors.path}: {len(unknown)} tensors that a {model.config.family} does not "
                f"have, the first {unknown[0]!r}: does config.json belong to it?"
            )
        used = {name for ours in loaded for name in names[ours]}
        left = sorted(name for today, name in stored.items() if today not in used)
    return LoadReport(loaded, fresh, left, dtypes)


def _stored(names: list[str], kind: Family, path: Path) -> dict[str, str]:
    """Names as files have them today -> as this file has them. Old ones say gamma and beta in
    norms, wrappers leave their own, and a bare encoder's lack the prefix of a classifier's."""
    bare = ("embeddings.", "pooler.", kind.layers.split(".")[0] + ".")
    found: dict[str, str] = {}
    for name in names:
        today = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        today = today.replace("LayerNorm.gamma", "LayerNorm.weight")
        today = today.replace("LayerNorm.beta", "LayerNorm.bias")
        today = kind.prefix + today if today.startswith(bare) else today
        if today in found:
            raise InputError(f"{path}: holds {today!r} twice, as {found[today]!r} and {name!r}")
        found[today] = name
    return found


def _copy(parameter: Tensor, parts: dict[str, Tensor], name: str, path: Path) -> None:
    rows = parameter.shape[0] // len(parts)
    for i, (theirs, tensor) in enumerate(parts.items()):
        part = parameter[i * rows : (i + 1) * rows]
        if tensor.shape != part.shape:
            raise InputError(
                f"{path}: config.json says {tuple(part.shape)} for {name}, the file "
                f"holds {tuple(tensor.shape)}: they are of different models"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: expected numbers with a fraction in {theirs}, got {tensor.dtype}"
            )
        part.copy_(tensor)


def hf_tensors(model: BertClassifier) -> dict[str, Tensor]:
    """The model's parameters under Hugging Face's names, on the CPU."""
    names, tensors = hf_names(model.config), {}
    for ours, parameter in model.named_parameters():
        parts = parameter.detach().cpu().chunk(len(names[ours]))
        # Parts of one packed tensor share storage, which the format refuses.
        parts = parts if len(parts) == 1 else [part.clone() for part in parts]
        tensors.update(zip(names[ours], parts, strict=True))
    return tensors


def save_model(model: nn.Module, folder: Path) -> None:
    """Writes config.json and model.safetensors, each whole or not at all.

    Raises:
        InputError: they cannot be written.
    """
    tensors = hf_tensors(model)
    write_file(folder / "model.safetensors", lambda p: save_file(tensors, p, {"format": "pt"}))
    write_json(folder / "config.json", model.config.to_hf())


def load(
    folder: str | Path,
    labels: tuple[str, ...] | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> tuple[BertClassifier, Tokenizer]:
    """A model folder's classifier and tokenizer, known to fit each other.

    Args:
        folder, labels, seed: as in `load_model`.
        max_length: tokens at which texts are cut; default, and at most, what the model takes.

    Raises:
        InputError: see `load_model` and `load_tokenizer`.
    """
    folder = locate(folder)
    model, _ = load_model(folder, labels, seed)
    limit = model.config.max_len
    return model, load_tokenizer(folder, model.config, min(max_length or limit, limit))


def load_tokenizer(folder: Path, config: ModelConfig, max_length: int) -> Tokenizer:
    """The tokenizer of a folder, known to fit a model.

    Raises:
        InputError: it cannot be read, or was not made for this model: see `Tokenizer.misfit`.
    """
    tokenizer = Tokenizer.load(folder, max_length, config.kind.tokenizer)
    if problem := tokenizer.misfit(config):
        raise InputError(f"{folder}: {problem}")
    return tokenizer


def save(model: nn.Module, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a model folder that `load` and transformers read.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(folder)
    make_folder(folder)
    tokenizer.save(folder)
    save_model(model, folder)
