"""Models on disk: Hugging Face names and ours, a strict load that reports, a save.

A model folder holds config.json and model.safetensors. Loading accounts for every tensor: loaded,
new (a head that the file does not have), or ignored (buffers, other heads); anything else stops.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .bert import BertClassifier
from .config import ModelConfig
from .errors import InputError
from .files import make_folder, read_json, write_file, write_json
from .layers import init_weights
from .tokenizer import Tokenizer

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
OTHER_HEADS = ("cls.", "qa_outputs.")
NEW_ALLOWED = ("pooler.", "head.")


def hf_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter names -> Hugging Face's; several are one after the other along rows."""
    pairs = {
        "bert.embeddings.word.weight": ("bert.embeddings.word_embeddings.weight",),
        "bert.embeddings.position.weight": ("bert.embeddings.position_embeddings.weight",),
        "bert.embeddings.token_type.weight": ("bert.embeddings.token_type_embeddings.weight",),
    }
    for end in (".weight", ".bias"):
        pairs["bert.embeddings.norm" + end] = ("bert.embeddings.LayerNorm" + end,)
        pairs["pooler" + end] = ("bert.pooler.dense" + end,)
        pairs["head" + end] = ("classifier" + end,)
        for i in range(config.n_layer):
            ours, theirs = f"bert.layers.{i}.", f"bert.encoder.layer.{i}."
            for name, names in (
                ("attention.qkv", [f"attention.self.{x}" for x in ("query", "key", "value")]),
                ("attention.out", ["attention.output.dense"]),
                ("attention.norm", ["attention.output.LayerNorm"]),
                ("mlp.up", ["intermediate.dense"]),
                ("mlp.down", ["output.dense"]),
                ("mlp.norm", ["output.LayerNorm"]),
            ):
                pairs[ours + name + end] = tuple(theirs + n + end for n in names)
    return pairs


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor."""

    loaded: dict[str, int]  # our name -> numbers in it
    new: dict[str, int]  # random: not in the file
    ignored: list[str]  # names in the file that this model has no use for

    def __str__(self) -> str:
        def row(what, names, numbers=""):
            shown = ", ".join(names) if len(names) < 5 else f"{len(names)} tensors"
            return f"  {what:<8} {numbers:>12}  {shown}"

        lines = ["  weights       numbers  tensors"]
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
        folder: with config.json and model.safetensors.
        labels: names of the classes to learn; the folder's own order wins when they are the same
            names, otherwise the head is new. None: as the folder says, and its head must be there.
        seed: of the new head's weights.

    Raises:
        InputError: a file is missing or damaged, or a tensor is missing, unknown or of a shape
            that config.json does not give it.
    """
    folder = Path(folder)
    config = read_config(folder)
    same = labels is None or set(labels) == set(config.labels)
    config = config if same else replace(config, labels=labels)
    if not config.labels:
        raise InputError(f"{folder}: config.json has no id2label: is this a trained classifier?")
    try:
        model = BertClassifier(config)
    except RuntimeError:
        raise InputError(f"{folder / 'config.json'}: asks for more memory than there is") from None
    init_weights(nn.ModuleList([model.pooler, model.head]), config.init_std, seed)
    return model, read_weights(model, folder / "model.safetensors", keep_head=same, new=labels)


@torch.no_grad()
def read_weights(
    model: BertClassifier, path: Path, keep_head: bool = True, new: object = None
) -> LoadReport:
    """Copies a safetensors file into a model's own storage, strictly.

    Args:
        model: whose parameters are overwritten.
        path: of the file.
        keep_head: False ignores the file's head.
        new: None forbids parameters that the file does not have.

    Raises:
        InputError: see `load_model`.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected the model's weights, found no file: check the folder")
    names, parameters = hf_names(model.config), dict(model.named_parameters())
    loaded, fresh = {}, {}
    try:
        with safe_open(path, "pt") as file:
            stored = {_today(name): name for name in file.keys()}  # noqa: SIM118
            if not keep_head:
                stored = {k: v for k, v in stored.items() if not k.startswith("classifier.")}
            for ours, parameter in parameters.items():
                parts = [stored.pop(theirs, None) for theirs in names[ours]]
                if None not in parts:
                    tensors = [file.get_tensor(part) for part in parts]
                    _copy(parameter, tensors, ours, path)
                    loaded[ours] = parameter.numel()
                elif new is None or not ours.startswith(NEW_ALLOWED):
                    raise InputError(
                        f"{path}: expected a tensor {names[ours][0]!r}, found none: "
                        "is this a BERT for this task?"
                    )
                else:
                    fresh[ours] = parameter.numel()
            ignored = _ignored(list(file.keys()), stored, keep_head, path)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: damaged or cut short ({reason}): copy it again") from None
    return LoadReport(loaded, fresh, ignored)


def _today(name):
    """A name as files have it today: old ones say gamma and beta in norms, and a bare encoder's
    (`encoder.layer.0...`) lacks the prefix that a classifier's has."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
    bare = name.startswith(("embeddings.", "encoder.", "pooler."))
    return "bert." + name if bare else name


def _copy(parameter: Tensor, tensors: list[Tensor], name: str, path: Path) -> None:
    rows = parameter.shape[0] // len(tensors)
    for i, tensor in enumerate(tensors):
        part = parameter[i * rows : (i + 1) * rows]
        if tensor.shape != part.shape:
            raise InputError(
                f"{path}: config.json says {tuple(part.shape)} for {name}, the file "
                f"holds {tuple(tensor.shape)}: they are of different models"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: expected numbers with a fraction in {name}, got {tensor.dtype}"
            )
        part.copy_(tensor)


def _ignored(names, left, keep_head, path):
    known = {n for n in left if n.endswith(BUFFERS) or n.startswith(OTHER_HEADS)}
    unknown = sorted(set(left) - known)
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} tensors that a BERT does not have, the first "
            f"{unknown[0]!r}: does config.json belong to it?"
        )
    head = [] if keep_head else [n for n in names if n.startswith("classifier.")]
    return sorted(left[n] for n in known) + head


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
        InputError: see `load_model`; or the tokenizer makes ids that the embedding does not have.
    """
    model, _ = load_model(folder, labels, seed)
    limit = model.config.max_len
    tokenizer = Tokenizer.load(folder, min(max_length or limit, limit))
    check_vocabulary(tokenizer, model.config, folder)
    return model, tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, folder: str | Path) -> None:
    """Raises InputError when the tokenizer makes ids that the embedding does not have."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding "
            f"{config.vocab_size} rows: they are of different models"
        )


def save(model: nn.Module, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a model folder that `load` and transformers read.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(folder)
    make_folder(folder)
    tokenizer.save(folder)
    save_model(model, folder)
