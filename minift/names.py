"""Names of tensors: Hugging Face's and ours, and how what they name lies in a file."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .config import ModelConfig
from .errors import InputError
from .families import Family

WRAPPERS = ("module", "_orig_mod")  # what DDP and torch.compile put into names
ENDS = (".weight", ".bias")
OF_TOKENS = {"tokens": "classifier", "span": "qa_outputs"}  # head -> its name in all families


def hf_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter names -> Hugging Face's; several are one after the other along rows."""
    kind = config.kind
    pairs: dict[str, tuple[str, ...]] = {}
    for ours, theirs in kind.tables.items():
        if config.n_types or ours != "embeddings.token_type":
            for end in ENDS if ours.endswith("norm") else ENDS[:1]:
                pairs[kind.body + ours + end] = (kind.prefix + theirs + end,)
    for end in ENDS:
        for i in range(config.n_layer):
            layer = f"{kind.prefix}{kind.layers}.{i}."
            for ours, names in kind.layer.items():
                theirs = tuple(layer + name + end for name in names)
                pairs[f"{kind.body}layers.{i}.{ours}{end}"] = theirs
        if config.head == "classifier" and not kind.decoder:
            pairs["pooler" + end] = (kind.dense + end,)
            pairs["head" + end] = (kind.head + end,)
        if config.head == "lm" and not kind.decoder:
            pairs["head.dense" + end] = (kind.lm_head.dense + end,)
            pairs["head.norm" + end] = (kind.lm_head.norm + end,)
        if config.head in OF_TOKENS:
            pairs["head" + end] = (OF_TOKENS[config.head] + end,)
    if config.head == "lm" and not kind.decoder:
        pairs["head.bias"] = (kind.lm_head.bias,)
    if config.head == "classifier" and kind.decoder:
        pairs["head.weight"] = (kind.head + ".weight",)
    return pairs


def tied_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's names of what a file may store once more -> our names of the same numbers."""
    if config.head != "lm":
        return {}
    kind = config.kind
    copies = {kind.lm_head.decoder + ".weight": kind.body + "embeddings.word.weight"}
    if not kind.decoder:
        copies[kind.lm_head.decoder + ".bias"] = "head.bias"
    return copies


def ignored_names(config: ModelConfig, keep_head: bool) -> tuple[str, ...]:
    """How names begin that belong to the heads of other tasks."""
    kind = config.kind
    if config.head != "classifier":
        pooler = (kind.prefix + "pooler.", "pre_classifier.")
        return (*kind.other_heads, "classifier.", "qa_outputs.", kind.head + ".", *pooler)
    # Another task's classifier may have names of its own.
    others = () if keep_head and not kind.decoder else ("classifier.",)
    return (*kind.other_heads, "qa_outputs.", *others)


def head_name(config: ModelConfig) -> str:
    """How the names of the tensors of its last layer begin."""
    return OF_TOKENS.get(config.head, config.kind.head) + "."


def names_today(names: Iterable[str], kind: Family, path: Path) -> dict[str, str]:
    """Names as files have them today -> as this file has them. Old ones say gamma and beta in
    norms, wrappers leave their own, and a bare body's lack the prefix of a classifier's.

    Raises:
        InputError: two are one today; `path` is of the file.
    """
    starts = (kind.layers, *kind.tables.values(), "pooler")
    bare = tuple({start.split(".")[0] + "." for start in starts})
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


def in_file(parameter: Tensor, ours: str, config: ModelConfig) -> Tensor:
    """The part of a parameter that files hold: of a token table, the rows that are tokens."""
    return parameter[: config.vocab_size] if ours.endswith("embeddings.word.weight") else parameter


def is_transposed(ours: str, parameter: Tensor, config: ModelConfig) -> bool:
    """Whether files hold it as (in, out)."""
    return config.kind.transposed and ".layers." in ours and parameter.ndim == 2


def copy_parts(
    parameter: Tensor, parts: dict[str, Tensor], ours: str, config: ModelConfig, path: Path
) -> None:
    """Copies what a file holds into a parameter, part after part along its rows.

    Args:
        parameter: the part of it that files hold.
        parts: name in the file -> tensor.
        ours: its name.
        config: of its model.
        path: of the file, for messages.

    Raises:
        InputError: a part is of another shape, or of whole numbers.
    """
    rows = parameter.shape[0] // len(parts)
    for i, (theirs, tensor) in enumerate(parts.items()):
        part = parameter[i * rows : (i + 1) * rows]
        part = part.T if is_transposed(ours, part, config) else part
        if tensor.shape != part.shape:
            raise InputError(
                f"{path}: config.json says {tuple(part.shape)} for {ours}, the file "
                f"holds {tuple(tensor.shape)}: they are of different models"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: expected numbers with a fraction in {theirs}, got {tensor.dtype}"
            )
        part.copy_(tensor)
