"""Texts to token ids: a thin reader, and maker, of vocabularies around `tokenizers`.

tokenizer.json holds any kind; without it vocab.txt is WordPiece (BERT, DistilBERT), vocab.json and
merges.txt, or encoder.json and vocab.bpe, are byte-level BPE (RoBERTa, GPT-2). An encoder's puts
special tokens around a text, a decoder's only one between the texts of a pair.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from .config import ModelConfig
from .errors import InputError
from .files import read_json, write_file, write_json

FILES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),  # GPT-2's own
)
EOS = "<|endoftext|>"  # what ends a text, where nothing else is said
SPECIAL = {  # kind of vocabulary -> its usual special tokens, in the order of a new vocabulary
    "WordPiece": dict(pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]"),
    "BPE": dict(cls="<s>", pad="<pad>", sep="</s>", unk="<unk>", mask="<mask>"),
}
WORDS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")  # how WordPiece sees a text
NORMALIZER = ("lowercase", "strip_accents", "handle_chinese_chars")  # the same, in the library
BYTES = ("add_prefix_space", "trim_offsets")
BLOCK = 1024  # texts that are encoded together: the library's encodings take kilobytes each


class Tokenizer:
    """A tokenizer and the number of tokens at which it cuts."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: dict,
        max_length: int,
        decoder: bool = False,
    ):
        self.backend, self.settings, self.max_length = backend, settings, max_length
        self.decoder = decoder
        if decoder:
            eos = self.special["eos"]
            backend.add_special_tokens([eos])  # written out in a text it is what it says
            backend.post_processor = TemplateProcessing(
                single="$A", pair=["$A", eos, "$B:0"], special_tokens=[(eos, self.eos)]
            )

    @staticmethod
    def load(
        folder: str | Path, max_length: int, kind: str = "BertTokenizer", decoder: bool = False
    ) -> "Tokenizer":
        """Reads the vocabulary, and tokenizer_config.json if it is there.

        Args:
            folder: a model folder.
            max_length: tokens at which a text is cut, at most what the folder's file allows.
            kind: transformers' class, where the folder does not say.
            decoder: whether it is a decoder's, which puts nothing around a text.

        Raises:
            InputError: there is no tokenizer, or a file is damaged.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        limit = settings.get("model_max_length")
        if type(limit) in (int, float) and limit < max_length:
            max_length = int(limit)
        files = next((f for f in FILES if all((folder / name).is_file() for name in f)), None)
        if files is None:
            wanted = ", or ".join(" and ".join(f) for f in FILES)
            raise InputError(f"{folder}: expected {wanted}, found none of them")
        path = folder / files[0]
        try:
            backend = _read(path, settings, decoder)
            # A file may store truncation and padding (MiniLM's: both at 128): ours are arguments.
            backend.no_padding()
            backend.no_truncation()
            empty, pair = backend.encode("").ids, backend.num_special_tokens_to_add(is_pair=True)
            backend.encode("\u2603")  # a word that no vocabulary has: [UNK] must be there
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: not a tokenizer ({reason}): copy it again") from None
        if not decoder and len(empty) != 2:
            raise InputError(
                f"{path}: expected a special token before a text and one behind it, as [CLS] and "
                f"[SEP] or <s> and </s>, got ids {empty}"
            )
        if decoder and backend.token_to_id(_end_of(settings)) is None:
            raise InputError(
                f"{path}: expected the token {_end_of(settings)!r}, which ends a text, found none: "
                "is it in tokenizer_config.json as eos_token?"
            )
        least = 1 if decoder else pair
        if max_length < least:
            raise InputError(
                f"{folder}: expected room for {least} tokens or more, got {max_length}"
            )
        return Tokenizer(backend, {"tokenizer_class": kind, **settings}, max_length, decoder)

    @staticmethod
    def train(
        texts: Sequence[str], config: ModelConfig, max_length: int, cased: bool = False
    ) -> "Tokenizer":
        """A vocabulary made from texts: byte-level BPE for the families that read such, else
        WordPiece. The same texts give the same vocabulary.

        Args:
            texts: what it is to be good at.
            config: of the model that it is for: at most `vocab_size` tokens.
            max_length: tokens at which a text will be cut.
            cased: whether WordPiece keeps capitals and accents (BPE always does).
        """
        family, size = config.kind, config.vocab_size
        if family.vocabulary == "BPE":
            kind = "GPT2Tokenizer" if family.decoder else "RobertaTokenizer"
            backend = _train_bpe(texts, size, family.decoder)
        else:
            kind, backend = family.tokenizer, _train_wordpiece(texts, size, cased)
        return Tokenizer(backend, {"tokenizer_class": kind}, max_length, family.decoder)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def special(self) -> dict[str, str]:
        """The special tokens by role: as tokenizer_config.json has them, or as they usually are."""
        usual = SPECIAL.get(type(self.backend.model).__name__, SPECIAL["BPE"])
        if self.decoder:
            usual = dict.fromkeys(("bos", "eos", "unk", "pad"), _end_of(self.settings))
        return {role: _content(self.settings, role) or usual[role] for role in usual}

    @property
    def eos(self) -> int | None:
        """The id that ends a text, if there is one."""
        names = _end_of(self.settings), self.special.get("sep", "")
        ids = (self.backend.token_to_id(name) for name in names)
        return next((number for number in ids if number is not None), None)

    def misfit(self, config: ModelConfig) -> str | None:
        """Why this tokenizer cannot belong to a model, if it cannot.

        Nothing else would show it: a wrong vocabulary trains, only badly.
        """
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        if self.vocab_size > config.vocab_size:
            return (
                f"the tokenizer has ids up to {self.vocab_size - 1}, the embedding "
                f"{config.vocab_size} rows: they are of different models"
            )
        if self.decoder:
            return self._other_end(config.raw.get("eos_token_id"))
        pad, ends = vocabulary.get(self.special["pad"]), self.backend.encode("").ids
        if pad is not None and pad != config.pad:
            return (
                f"the tokenizer's {self.special['pad']} is {pad}, config.json says pad_token_id "
                f"{config.pad}: they are of different models"
            )
        wanted = [config.raw.get("bos_token_id"), config.raw.get("eos_token_id")]
        if config.kind.offset_positions and None not in wanted and wanted != ends:
            return (
                f"the tokenizer puts ids {ends} around a text, config.json says bos_token_id and "
                f"eos_token_id {wanted}: they are of different models"
            )
        types = self.backend.encode("a", "b").type_ids
        if max(types) >= config.n_types > 1:
            return f"the tokenizer knows {max(types) + 1} types of text, the model {config.n_types}"
        return self._casing(vocabulary) if type(self.backend.model) is models.WordPiece else None

    def _other_end(self, named: int | list[int] | None) -> str | None:
        if named is None or self.eos in (named if isinstance(named, list) else [named]):
            return None
        return (
            f"the tokenizer's {self.special['eos']} is {self.eos}, config.json says eos_token_id "
            f"{named}: they are of different models"
        )

    def _casing(self, vocabulary: dict[str, int]) -> str | None:
        words = [piece for piece in vocabulary if re.fullmatch("(##)?[A-Za-z]{2,}", piece)]
        capitals = sum(piece.lower() != piece for piece in words)
        normalizer = self.backend.normalizer
        lowers = normalizer is not None and normalizer.normalize_str("A").strip() == "a"
        if lowers and capitals > len(words) / 20:
            return (
                f"the vocabulary has {capitals:,} pieces with capitals, but the tokenizer turns "
                "texts to small letters: set do_lower_case to false in tokenizer_config.json"
            )
        # Chinese vocabularies have few Latin pieces, no capitals, and no lower-casing by design.
        if not lowers and not capitals and len(words) > max(1000, len(vocabulary) / 2):
            return (
                "the vocabulary has no capitals, but the tokenizer keeps them, so such words are "
                "unknown: set do_lower_case to true in tokenizer_config.json"
            )
        return None

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[tuple[list[int], list[int], bool]]:
        """Token ids, type ids, and whether it was cut, of each text or pair of texts.

        Special tokens are included. What is longer than `max_length` is cut to it, the longer text
        of a pair first. All are in memory at once: for many, see `BLOCK`.
        """
        inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
        self.backend.enable_truncation(self.max_length, strategy="longest_first")
        encodings = self.backend.encode_batch_fast(inputs)
        self.backend.no_truncation()
        return [(e.ids, e.type_ids, bool(e.overflowing)) for e in encodings]

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (L,) int32 of each text: nothing is put around it and nothing is cut. Special
        tokens that are written out in a text are what they say."""
        found = []
        for begin in range(0, len(texts), BLOCK):
            block = self.backend.encode_batch_fast(
                texts[begin : begin + BLOCK], add_special_tokens=False
            )
            found += [np.array(encoding.ids, np.int32) for encoding in block]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, with the length limit."""
        write_file(folder / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        settings = {f"{role}_token": token for role, token in self.special.items()}
        settings |= {name: self.settings[name] for name in BYTES if name in self.settings}
        normalizer = self.backend.normalizer
        if isinstance(normalizer, normalizers.BertNormalizer):
            # transformers makes its own normalizer of these, and lower-cases where they are absent.
            values = [getattr(normalizer, name) for name in NORMALIZER]
            settings |= dict(zip(WORDS, values, strict=True))
        settings |= {"tokenizer_class": self.settings["tokenizer_class"]}
        write_json(
            folder / "tokenizer_config.json", settings | {"model_max_length": self.max_length}
        )


def _content(settings: dict, role: str) -> str:
    """The token that has a role in tokenizer_config.json: a string, or an object that holds it."""
    token = settings.get(f"{role}_token")
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _end_of(settings: dict) -> str:
    return _content(settings, "eos") or EOS


def _read(path: Path, settings: dict, decoder: bool) -> tokenizers.Tokenizer:
    if path.name == "vocab.txt":
        return BertWordPieceTokenizer(
            str(path),
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )._tokenizer
    if path.name in ("vocab.json", "encoder.json"):
        merges = path.with_name("merges.txt" if path.name == "vocab.json" else "vocab.bpe")
        bpe = models.BPE.from_file(str(path), str(merges))
        prefix_space, trim = (settings.get(name, name != BYTES[0]) for name in BYTES)
        names = [_end_of(settings)] if decoder else list(SPECIAL["BPE"].values())
        return _byte_level(bpe, names, prefix_space, trim)
    json.loads(path.read_text(encoding="utf-8"))  # a plainer message than the library's
    backend = tokenizers.Tokenizer.from_file(str(path))
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        # Where the two files differ transformers believes tokenizer_config.json.
        for name, given in zip(NORMALIZER, WORDS, strict=True):
            if given in settings:
                setattr(normalizer, name, settings[given])
        backend.normalizer = normalizer
    return backend


def _byte_level(
    bpe: models.BPE, special: list[str], prefix_space: bool = False, trim: bool = True
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    names = SPECIAL["BPE"]
    if special == list(names.values()):
        ends = [(names[role], backend.token_to_id(names[role])) for role in ("sep", "cls")]
        backend.post_processor = RobertaProcessing(*ends, trim, prefix_space)
    return backend


def _train_bpe(texts: Sequence[str], vocab_size: int, decoder: bool) -> tokenizers.Tokenizer:
    special = [EOS] if decoder else list(SPECIAL["BPE"].values())
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _byte_level(backend.model, special)


def _bert_words(model: models.WordPiece, cased: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _train_wordpiece(texts: Sequence[str], vocab_size: int, cased: bool) -> tokenizers.Tokenizer:
    backend = _bert_words(models.WordPiece(unk_token="[UNK]"), cased)
    # The library numbers the pieces inside words as it meets them in a hash table, so every run
    # would make another vocabulary. As special tokens they come first, in our order.
    inside: set[str] = set()
    for text in texts:
        normal = backend.normalizer.normalize_str(text)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal):
            inside.update(word[1:])
    special = list(SPECIAL["WordPiece"].values())
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special + sorted(f"##{c}" for c in inside),
        limit_alphabet=max(1, vocab_size - len(special) - len(inside)),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    vocabulary = backend.get_vocab()
    backend = _bert_words(models.WordPiece(vocabulary, unk_token="[UNK]"), cased)
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(special)
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return backend
