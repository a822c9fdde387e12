"""A model made from nothing: a configuration, a vocabulary, random weights."""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import LABELLED, ModelConfig
from .errors import InputError
from .files import read_json
from .layers import init_weights
from .tokenizer import Tokenizer
from .weights import Model, load_tokenizer, make_model

OF_A_HEAD = "architectures", "id2label", "label2id", "task", "template", "task_settings"
VOCABULARY = 8000  # tokens at most, where the configuration does not say


def read_new_config(
    path: Path, vocabulary: int = VOCABULARY, head: str = "classifier"
) -> ModelConfig:
    """The configuration of a model that is to be made.

    Args:
        path: of a config.json, of a TOML file with the same names, or of a folder with the former.
        vocabulary: rows of the token table, where the file does not say.
        head: as for `load_model`.

    Raises:
        InputError: it is missing or cannot be used.
    """
    path = path / "config.json" if path.is_dir() else path
    raw = _read_toml(path) if path.suffix == ".toml" else read_json(path)
    # What it says of a head, or of where its weights were, is not about this model.
    raw = {k: v for k, v in raw.items() if k not in OF_A_HEAD}
    try:
        return replace(ModelConfig.from_hf({"vocab_size": vocabulary, **raw}), head=head)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:  # not TOML, not UTF-8
        raise InputError(f"{path}: expected TOML, got {error}") from None


def make_tokenizer(
    path: Path,
    vocabulary: Path | None,
    texts: Sequence[str],
    cased: bool,
    max_length: int,
    head: str = "classifier",
) -> tuple[Tokenizer, ModelConfig]:
    """A vocabulary for a new model, and the model's configuration, which has as many rows.

    Args:
        path: of the configuration, as for `read_new_config`.
        vocabulary: folder of a tokenizer; None: it is made from `texts`.
        texts: of the training rows.
        cased: whether a WordPiece vocabulary that is made keeps capitals.
        max_length: tokens at which texts are cut; 0: what the model takes.
        head: as for `read_new_config`.

    Raises:
        InputError: a file cannot be read, or the two do not fit.
    """
    config = read_new_config(path, head=head)
    if vocabulary is not None:
        kind = config.kind
        ids = Tokenizer.load(vocabulary, 512, kind.tokenizer, kind.decoder).vocab_size
        config = read_new_config(path, ids, head)
        limit = min(max_length or config.max_len, config.max_len)
        tokenizer = load_tokenizer(vocabulary, _ended(config, None), limit)
        return tokenizer, _ended(config, tokenizer)
    limit = min(max_length or config.max_len, config.max_len)
    tokenizer = Tokenizer.train(texts, config, limit, cased)
    config = _ended(replace(config, vocab_size=tokenizer.vocab_size), tokenizer)
    if problem := tokenizer.misfit(config):
        raise InputError(f"{path}: {problem}, or leave out --cased")
    return tokenizer, config


def _ended(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """With the tokenizer's id for the end of a text, or none, in what becomes config.json."""
    if not config.kind.decoder:
        return config
    eos = tokenizer and tokenizer.eos
    return replace(config, raw={**config.raw, "bos_token_id": eos, "eos_token_id": eos})


def random_model(
    config: ModelConfig, labels: tuple[str, ...], seed: int, head: str | None = None
) -> Model:
    """A model of random weights: normal(0, init_std) matrices, zero biases, unit norms.

    Args:
        config: of the model.
        labels: of a classifier.
        seed: the weights are a function of it.
        head: as for `load_model`; None: as the configuration says.

    Raises:
        InputError: it does not fit into memory.
    """
    head = head or config.head
    labels = labels if head in LABELLED else ()
    model = make_model(replace(config, labels=labels, head=head), Path("config.json"))
    init_weights(model, config.init_std, seed)
    return model
