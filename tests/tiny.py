"""A BERT small enough to train in a second, and a file it can learn: what tests of the command
line start from."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minift.bert import BertClassifier
from minift.cli import main
from minift.config import ModelConfig
from minift.layers import init_weights
from minift.weights import save_model

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Pieces for any word of Latin letters, and whole words for the data of `write_rows`.
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-"
WORDS = (
    *("good", "bad", "fine", "awful", "great", "poor", "film", "book", "meal", "day", "boom"),
    *("the", "a", "was", "is", "very", "and", "it", "we", "saw", "ate", "read", "today"),
)
VOCABULARY = (*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS)
ROOM = 200  # rows of the token table: a few more than there are pieces


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of a model without a trained head."""
    config = dict(model_type="bert", architectures=["BertModel"], vocab_size=ROOM, hidden_size=32)
    config |= dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config |= dict(max_position_embeddings=32, type_vocab_size=2, hidden_act="gelu")
    config |= dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, layer_norm_eps=1e-12)
    return config | dict(initializer_range=0.2, pad_token_id=0) | overrides


def tiny_model(folder: Path, **overrides: Any) -> Path:
    """Writes config.json, model.safetensors and vocab.txt of a random BERT.

    Args:
        folder: made if it is not there.
        overrides: of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = tiny_config(**overrides)
    config = ModelConfig.from_hf({**raw, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    model = BertClassifier(config)
    init_weights(model, config.init_std, seed=1)
    save_model(model, folder)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


def rows(n: int) -> list[tuple[str, str]]:
    """`n` texts and their labels, half of each; one word of a text decides."""
    what, kinds = ("film", "book", "meal", "day"), ("pos", "neg")
    words = {"pos": ("good", "fine", "great"), "neg": ("bad", "awful", "poor")}
    made = []
    for i in range(n):
        label = kinds[i % 2]
        rest = " and it is" if i % 5 == 0 else ""
        made.append((f"the {what[i // 2 % 4]} was {words[label][i // 3 % 3]}{rest}", label))
    return made


def write_rows(path: Path, n: int) -> Path:
    """Writes `rows(n)` as CSV with a header, or as JSON lines where the name says so."""
    if path.suffix == ".jsonl":
        # With a full stop: rows that stand in both files would be warned of.
        lines = [json.dumps({"text": f"{text}.", "label": label}) for text, label in rows(n)]
    else:
        lines = ["text,label", *(f"{text},{label}" for text, label in rows(n))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def words(model: Path, data: Path, output: Path, *more: object) -> list[str]:
    """A command line of `train` on the two files of `data`; one thread, for the same bits however
    busy the machine is."""
    files = ("--train", data / "train.csv", "--validation", data / "validation.jsonl")
    flags = ("--threads", 1, "--batch_size", 8, "--lr", 5e-3, *more)
    return [str(w) for w in ("train", "--model", model, *files, "--output", output, *flags)]


@dataclass(frozen=True)
class Result:
    """What a command line gave."""

    status: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def answers(self) -> list[dict[str, Any]]:
        """All of stdout, as JSON lines."""
        return [json.loads(line) for line in self.out.removesuffix("\n").split("\n")]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> Result:
    """Runs `minift WORDS` in this process."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    return Result(status, *capsys.readouterr())


def assert_one_line(result: Result, *parts: str, status: int = 2) -> None:
    """A command failed with one line on stderr that holds `parts`, and nothing on stdout."""
    assert (result.status, result.out) == (status, "")
    assert result.err.startswith("minift: ")
    assert result.err.endswith("\n")
    assert len(result.err.splitlines()) == 1, result.err
    for part in parts:
        assert part in result.err


@contextmanager
def settings_kept() -> Iterator[None]:
    """Puts back what `main` sets in the process: a signal handler, an environment, threads."""
    handler, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
