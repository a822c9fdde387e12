"""Training texts that differ a little in every epoch: words are left out, swapped, masked.

    [CLS] the film was sur ##pris ##ing [SEP]
    [CLS] film the [MASK] sur ##pris ##ing [SEP]

Whole words, as a function of (seed, epoch, row). Left out and swapped as Wei & Zou 2019,
arXiv:1901.11196, do it; masked as Devlin et al. 2018, arXiv:1810.04805, mask to pretrain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from .batch import Example
from .errors import InputError
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Augment:
    """Shares of the words that something is done to."""

    drop: float = 0.0
    swap: float = 0.0  # with the word behind
    mask: float = 0.0

    @staticmethod
    def parse(text: str) -> "Augment | None":
        """From --augment: 'drop=0.1,swap=0.05,mask=0.1', any of them; '' for none.

        Raises:
            InputError: a name is unknown or there twice, or a share is not in [0, 1).
        """
        if not text:
            return None
        names = {f.name for f in fields(Augment)}
        parts = [part.partition("=")[::2] for part in text.split(",")]
        try:
            given = {name.strip(): float(share) for name, share in parts}
        except ValueError:
            given = {}
        fits = given and set(given) <= names and len(given) == len(parts)
        if not fits or not all(0 <= share < 1 for share in given.values()):
            raise InputError(f"expected augment as 'drop=0.1,swap=0.05,mask=0.1', got {text!r}")
        return Augment(**given)


class Augmenter:
    """What is done to the examples of a tokenizer."""

    def __init__(self, augment: Augment, tokenizer: Tokenizer, fixed: bool = False):
        """Looks through the vocabulary once.

        Args:
            augment: how much.
            tokenizer: of the examples.
            fixed: every token must stay where it is, since targets say where they are.

        Raises:
            InputError: tokens must stay, or there is no token to mask with.
        """
        backend, self.augment = tokenizer.backend, augment
        if fixed and (augment.drop or augment.swap):
            raise InputError(
                "--augment drop and swap move words that answers point to: use mask alone"
            )
        mask = backend.token_to_id(tokenizer.special.get("mask", ""))
        if augment.mask and mask is None:
            raise InputError("--augment mask: the vocabulary has no token to mask with: use drop")
        self.mask = mask
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.begins = np.ones(tokenizer.vocab_size, bool)  # (V,) of a word
        byte_level = type(backend.model).__name__ == "BPE"
        inside = [
            i
            for piece, i in vocabulary.items()
            if (piece[:1] != "Ġ" if byte_level else piece.startswith("##"))
        ]
        self.begins[inside] = False
        self.special = np.zeros(tokenizer.vocab_size, bool)  # (V,) never touched
        added = backend.get_added_tokens_decoder()
        self.special[[i for i, token in added.items() if token.special]] = True
        unknown = backend.token_to_id(tokenizer.special["unk"])
        if unknown is not None and not byte_level:  # stands for a word
            self.special[unknown] = False

    def words(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each token the number of its word, (L,); and whether a word is a special token, (W,).
        Numbers count special tokens as words."""
        special = self.special[tokens]
        starts = self.begins[tokens] | special
        starts[1:] |= special[:-1]
        starts[0] = True
        return np.cumsum(starts) - 1, special[starts]

    def vary(self, example: Example, seed: int, row: int, epoch: int) -> Example:
        """The example with words left out, swapped or masked: a function of (seed, epoch, row)."""
        tokens = np.asarray(example.tokens, np.int32)
        if not len(tokens):
            return example
        number, special = self.words(tokens)
        key = np.random.Philox(key=seed, counter=[0, row, 3, epoch])
        dropping, swapping, masking = np.random.Generator(key).random((3, len(special)))
        keep = special | (dropping >= self.augment.drop)
        _keep_one(keep, special, dropping)
        masked = ~special & (masking < self.augment.mask)
        if self.mask is not None:
            tokens = np.where(masked[number], np.int32(self.mask), tokens)
        place, left = np.arange(len(special)), np.flatnonzero(keep)
        first, second = left[:-1], left[1:]
        swaps = ~special[first] & ~special[second] & (swapping[first] < self.augment.swap)
        swaps[1:] &= ~swaps[:-1]  # no word twice
        place[first[swaps]], place[second[swaps]] = second[swaps], first[swaps]
        order = np.argsort(place[number], kind="stable")
        order = order[keep[number[order]]]
        types = np.asarray(example.types)[order] if len(example.types) else ()
        return Example(tokens[order], types, example.target, example.cut)


def _keep_one(keep: np.ndarray, special: np.ndarray, chance: np.ndarray) -> None:
    """Of a text that would lose all of its words the one with the highest chance stays."""
    ends = [-1, *np.flatnonzero(special), len(special)]
    for begin, end in pairwise(ends):
        if begin + 1 < end and not keep[begin + 1 : end].any():
            keep[begin + 1 + chance[begin + 1 : end].argmax()] = True


class Augmented(Sequence[Example]):
    """Examples, each varied when it is asked for."""

    def __init__(self, whole: Sequence[Example], augmenter: Augmenter, seed: int, epoch: int):
        self.whole, self.augmenter, self.seed, self.epoch = whole, augmenter, seed, epoch

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return self.augmenter.vary(self.whole[row], self.seed, row, self.epoch)


def augmented(
    examples: Sequence[Example], augmenter: Augmenter, seed: int
) -> Callable[[int], Sequence[Example]]:
    """The examples as a function of the epoch, as `Task.vary` gives them."""
    return lambda epoch: Augmented(examples, augmenter, seed, epoch)
