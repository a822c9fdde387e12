"""Texts to token ids: a thin reader of tokenizer.json or vocab.txt around `tokenizers`."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from .errors import InputError
from .files import read_json, write_file, write_json

SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
KEPT = (
    *(f"{name}_token" for name in SPECIAL),
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
)


class Tokenizer:
    """A tokenizer and the number of tokens at which it cuts."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict, max_length: int):
        self.backend, self.settings, self.max_length = backend, settings, max_length

    @staticmethod
    def load(folder: str | Path, max_length: int) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.txt, and tokenizer_config.json if it is there.

        Args:
            folder: a model folder.
            max_length: tokens at which a text is cut, at most what the folder's file allows.

        Raises:
            InputError: there is no tokenizer, or a file is damaged.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        limit = settings.get("model_max_length")
        if type(limit) in (int, float) and limit < max_length:
            max_length = int(limit)
        if max_length < 3:  # a pair's special tokens
            raise InputError(f"{folder}: expected room for 3 tokens or more, got {max_length}")
        path = next(
            (folder / n for n in ("tokenizer.json", "vocab.txt") if (folder / n).is_file()), None
        )
        if path is None:
            raise InputError(f"{folder}: expected tokenizer.json or vocab.txt, found neither")
        try:
            backend = _read(path, settings)
            # A file may store truncation and padding (MiniLM's: both at 128): ours are arguments.
            backend.no_padding()
            backend.no_truncation()
            empty = backend.encode("").ids
            backend.encode("\u2603")  # a word that no vocabulary has: [UNK] must be there
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: not a tokenizer ({reason}): copy it again") from None
        if len(empty) != 2:
            raise InputError(f"{path}: expected [CLS] and [SEP] around a text, got ids {empty}")
        return Tokenizer(backend, settings, max_length)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[tuple[list[int], list[int], bool]]:
        """Token ids, type ids, and whether it was cut, of each text or pair of texts.

        Special tokens are included. What is longer than `max_length` is cut to it, the longer text
        of a pair first.
        """
        inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
        self.backend.enable_truncation(self.max_length, strategy="longest_first")
        encodings = self.backend.encode_batch_fast(inputs)
        self.backend.no_truncation()
        return [(e.ids, e.type_ids, bool(e.overflowing)) for e in encodings]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, with the length limit."""
        write_file(folder / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        settings = {f"{name}_token": token for name, token in SPECIAL.items()}
        settings |= {name: self.settings[name] for name in KEPT if name in self.settings}
        settings |= {"tokenizer_class": "BertTokenizer", "model_max_length": self.max_length}
        write_json(folder / "tokenizer_config.json", settings)


def _read(path, settings):
    if path.name == "tokenizer.json":
        json.loads(path.read_text(encoding="utf-8"))  # a plainer message than the library's
        return tokenizers.Tokenizer.from_file(str(path))
    return BertWordPieceTokenizer(
        str(path),
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )._tokenizer
