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

from .bert import BertClassifier, BertMasked, BertTokens
from .config import LABELLED, ModelConfig
from .errors import InputError
from .files import read_json, write_file, write_json
from .gpt import GPTClassifier, GPTLanguageModel, GPTTokens
from .hub import locate
from .layers import init_weights
from .names import (
    copy_parts,
    head_name,
    hf_names,
    ignored_names,
    in_file,
    is_transposed,
    names_today,
    tied_names,
)
from .storage import Tensors, open_tensors
from .tokenizer import Tokenizer

Model = BertClassifier | BertMasked | BertTokens | GPTClassifier | GPTLanguageModel | GPTTokens
CLASSES = {  # by whether it is a decoder, and its head
    (False, "classifier"): BertClassifier,
    (False, "lm"): BertMasked,
    (False, "tokens"): BertTokens,
    (False, "span"): BertTokens,
    (True, "classifier"): GPTClassifier,
    (True, "lm"): GPTLanguageModel,
    (True, "tokens"): GPTTokens,
    (True, "span"): GPTTokens,
}
NEW_ALLOWED = ("pooler.", "head.")


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
    folder: str | Path,
    labels: tuple[str, ...] | None = None,
    seed: int = 0,
    head: str | None = None,
) -> tuple[Model, LoadReport]:
    """A model from its folder, in fp32.

    Args:
        folder: with config.json and weights, or a hub id.
        labels: names of the classes to learn; the folder's own order wins when they are the same
            names, otherwise the head is new. None: as the folder says, and its head must be there.
        seed: of the new head's weights.
        head: "classifier" of texts, or "tokens", of tokens; "span" to find one; "lm" to predict
            tokens: new, if the folder is of another model. None: a classifier of texts where labels
            are given, else what the folder holds.

    Raises:
        InputError: a file is missing or damaged, or a tensor is missing, unknown or of a shape
            that config.json does not give it.
    """
    folder = locate(folder)
    config = read_config(folder)
    head = head or (config.head if labels is None else "classifier")
    if config.head != head:
        config = replace(config, head=head, task="", template=None, settings={})
    labelled = head in LABELLED
    keep = not labelled or labels is None
    keep = keep or (set(labels) == set(config.labels) and config.trained_head)
    if not labelled:
        config = replace(config, labels=())
    elif not keep:
        config = replace(config, labels=labels)
    if labelled:
        _check_classifier(folder, config, labels)
    model = make_model(config, folder / "config.json")
    heads = (getattr(model, name, None) for name in ("pooler", "head"))
    init_weights(nn.ModuleList(filter(None, heads)), config.init_std, seed)
    may_be_new = labels is not None if labelled else not config.trained_head
    return model, read_weights(model, folder, keep, may_be_new)


def _check_classifier(folder, config, labels):
    if not config.labels:
        raise InputError(f"{folder}: config.json has no id2label: is this a trained classifier?")
    if labels is None and not config.trained_head:
        made_for = ", ".join(map(str, config.raw["architectures"]))
        raise InputError(
            f"{folder}: expected a trained classifier, config.json is of {made_for}: train it"
        )


def make_model(config: ModelConfig, path: Path) -> Model:
    """A model whose memory holds anything yet.

    Raises:
        InputError: it does not fit into memory; `path` is where its configuration stands.
    """
    try:
        return CLASSES[config.kind.decoder, config.head](config)
    except RuntimeError:
        raise InputError(f"{path}: asks for more memory than there is") from None


@torch.no_grad()
def read_weights(
    model: Model, path: Path, keep_head: bool = True, may_be_new: bool = False
) -> LoadReport:
    """Copies stored tensors into a model's own memory, strictly.

    Args:
        model: whose parameters are overwritten.
        path: a model folder, or a file of weights.
        keep_head: False ignores the file's head.
        may_be_new: whether the head may have parameters that the file does not have.

    Raises:
        InputError: see `load_model`.
    """
    config, names = model.config, hf_names(model.config)
    loaded, fresh, dtypes = {}, {}, {}
    with open_tensors(path) as tensors:
        stored = names_today(tensors.names, config.kind, tensors.path)
        dropped = "?" if keep_head else head_name(config)
        found = {k: v for k, v in stored.items() if not k.startswith(dropped)}
        for ours, parameter in model.named_parameters():
            parts = [found.pop(theirs, None) for theirs in names[ours]]
            inside = in_file(parameter, ours, config)
            if None not in parts:
                read = {part: tensors.get(part) for part in parts}
                copy_parts(inside, read, ours, config, tensors.path)
                parameter[len(inside) :] = 0
                dtypes[ours] = str(read[parts[0]].dtype).removeprefix("torch.")
                loaded[ours] = inside.numel()
            elif not may_be_new or not ours.startswith(NEW_ALLOWED):
                raise InputError(
                    f"{tensors.path}: expected a tensor {names[ours][0]!r}, found none: "
                    f"is this a {config.family} for this task?"
                )
            else:
                fresh[ours] = parameter.numel()
        _check_tied(model, {ours: found.get(n) for n, ours in tied_names(config).items()}, tensors)
        ignored, buffers = ignored_names(config, keep_head), config.kind.buffers
        unknown = sorted(n for n in found if not n.endswith(buffers) and not n.startswith(ignored))
        if unknown:
            raise InputError(
                f"{tensors.path}: {len(unknown)} tensors that a {config.family} does not "
                f"have, the first {unknown[0]!r}: does config.json belong to it?"
            )
        used = {name for ours in loaded for name in names[ours]}
        left = sorted(name for today, name in stored.items() if today not in used)
    return LoadReport(loaded, fresh, left, dtypes)


def _check_tied(model: Model, copies: dict[str, str | None], tensors: Tensors) -> None:
    """What a file stores twice is one parameter here: other numbers would be lost."""
    for ours, name in copies.items():
        own = in_file(model.get_parameter(ours), ours, model.config)
        if name is not None and not torch.equal(tensors.get(name).to(own.dtype), own):
            raise InputError(
                f"{tensors.path}: expected the numbers of {ours} in {name!r}, found others: "
                "projections of their own are not built"
            )


def hf_tensors(model: Model) -> dict[str, Tensor]:
    """The model's parameters under Hugging Face's names, on the CPU."""
    config, names, tensors = model.config, hf_names(model.config), {}
    for ours, parameter in model.named_parameters():
        stored = in_file(parameter.detach(), ours, config).cpu()
        stored = stored.T if is_transposed(ours, stored, config) else stored
        parts = stored.contiguous().chunk(len(names[ours]))
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


def load_tokenizer(folder: Path, config: ModelConfig, max_length: int) -> Tokenizer:
    """The tokenizer of a folder, known to fit a model.

    Raises:
        InputError: it cannot be read, or was not made for this model: see `Tokenizer.misfit`.
    """
    kind = config.kind
    tokenizer = Tokenizer.load(folder, max_length, kind.tokenizer, kind.decoder)
    if problem := tokenizer.misfit(config):
        raise InputError(f"{folder}: {problem}")
    return tokenizer
