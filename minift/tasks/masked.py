"""Masked words: a model that reads both ways learns a domain by filling in what is left out.

    tokens     [CLS] the [MASK] was river [SEP]
    targets                film     a

Of the tokens 15 % have a target; of those 80 % are masked, 10 % are some token and 10 % stand as
they are. Which is a function of (seed, epoch, row). Devlin et al. 2018, arXiv:1810.04805, section
3.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..batch import Example
from ..config import ModelConfig
from ..data import Row
from ..errors import InputError, Notice
from ..ops import IGNORE_INDEX
from ..tokenizer import BLOCK, Tokenizer
from .language import TokenTask
from .task import File, Said, Setup

MASKED, OTHER = 0.8, 0.1  # shares of the tokens with a target


@dataclass(frozen=True)
class MaskedWords(TokenTask):
    """What stood where something is masked."""

    name: ClassVar = "mlm"
    flags: ClassVar = ("text_column", "mlm_probability")

    mask: int  # id
    vocab: int  # ids that may stand in for a token
    probability: float = 0.15
    seed: int = 0

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """See `Task.check`."""
        if config.kind.decoder:
            raise InputError("--task mlm wants a model that reads both ways: try --task lm")

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Row]) -> "MaskedWords":
        """See `Task.of`."""
        setup.model.config = replace(setup.model.config, task=cls.name, template=None)
        return cls.trained(setup)

    @classmethod
    def trained(cls, setup: Setup) -> "MaskedWords":
        """See `Task.trained`."""
        tokenizer = setup.tokenizer
        mask = tokenizer.backend.token_to_id(tokenizer.special["mask"])
        if mask is None:
            name = tokenizer.special["mask"]
            raise InputError(f"--task mlm: the vocabulary has no {name}: choose another tokenizer")
        return cls(mask, tokenizer.vocab_size, setup.run.mlm_probability, setup.config.seed)

    def encode_file(self, file: File, rows: Sequence[Row], tokenizer: Tokenizer) -> Said:
        """Pieces, masked as in an epoch before the first. See `Task.encode_file`."""
        pieces = self.encode(rows, tokenizer)
        tokens = sum(len(piece.tokens) for piece in pieces)
        yield Notice(
            f"{file.part}: {tokens:,} tokens in pieces of at most {tokenizer.max_length}, "
            f"{self.probability:.0%} of them to be found"
        )
        masked = Masked(pieces, self, 0)
        if not any((example.target != IGNORE_INDEX).any() for example in masked):
            raise InputError(f"{file.path}: too short, no word of it is masked: give more text")
        return masked

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Example]:
        """Documents, cut at the tokenizer's `max_length`; each piece has the special tokens around
        it. Nothing is masked yet."""
        first, last = tokenizer.backend.encode("").ids
        size, pieces = tokenizer.max_length - 2, []
        for i in range(0, len(rows), BLOCK):
            for ids in tokenizer.ids([row.text for row in rows[i : i + BLOCK]]):
                for begin in range(0, len(ids), size):
                    tokens = np.array([first, *ids[begin : begin + size], last], np.int32)
                    pieces.append(Example(tokens, (), tokens))
        return pieces

    def masked(self, example: Example, row: int, epoch: int) -> Example:
        """The example with words left out, as a function of (seed, epoch, row)."""
        key = np.random.Philox(key=self.seed, counter=[0, row, 2, epoch])
        chance, how = np.random.Generator(key).random((2, len(example.tokens)))
        other = (how - MASKED) / OTHER * self.vocab  # of those that become some token
        found = chance < self.probability
        found[[0, -1]] = False
        tokens = np.where(found & (how < MASKED), self.mask, example.tokens)
        becomes = found & (how >= MASKED) & (how < MASKED + OTHER)
        tokens = np.where(becomes, other.astype(np.int32), tokens).astype(np.int32)
        return Example(tokens, (), np.where(found, example.target, IGNORE_INDEX))

    def vary(self, examples: "Masked", seed: int) -> Callable[[int], Sequence[Example]]:
        """Other words are left out in each epoch."""
        return lambda epoch: Masked(examples.whole, self, 1 + epoch)


class Masked(Sequence[Example]):
    """Examples, each masked when it is asked for."""

    def __init__(self, whole: Sequence[Example], task: MaskedWords, epoch: int):
        self.whole, self.task, self.epoch = whole, task, epoch

    @property
    def lengths(self) -> list[int]:
        """Tokens of each; nothing is masked to know that."""
        return [len(example.tokens) for example in self.whole]

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return self.task.masked(self.whole[row], row, self.epoch)
