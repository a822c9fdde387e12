"""Words to tokens, of which the first of each word has its target; long sentences to windows."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from .batch import Example
from .ops import IGNORE_INDEX
from .tagged import Sentence
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Window(Example):
    """A sentence, or a part of it, some words of which are scored: they follow each other."""

    row: int = 0  # number of the sentence among those that were encoded together


class Pieces:
    """The tokens of words, each kind of which is encoded once."""

    def __init__(self, tokenizer: Tokenizer, stride: int):
        self.backend, self.decoder, self.stride = tokenizer.backend, tokenizer.decoder, stride
        ends = self.backend.encode("").ids  # nothing, or one before and one behind
        self.before, self.behind = ends[: len(ends) // 2], ends[len(ends) // 2 :]
        self.room = tokenizer.max_length - len(ends)
        unknown = self.backend.token_to_id(tokenizer.special["unk"])
        self.unknown = [tokenizer.eos if unknown is None else unknown]
        self.known: dict[str, list[int]] = {}

    def of(self, row: Sentence) -> list[list[int]]:
        """The tokens of each word, one or more: of a word that is nothing to the tokenizer, such
        as a control character, the unknown one. To a vocabulary of bytes the blank before a word
        belongs to it."""
        words = [" " * s + word for s, word in zip(row.spaced(), row.words, strict=True)]
        new = list(dict.fromkeys(word for word in words if word not in self.known))
        for word, encoded in zip(
            new, self.backend.encode_batch_fast(new, add_special_tokens=False), strict=True
        ):
            self.known[word] = encoded.ids or self.unknown
        return [self.known[word] for word in words]

    def windows(self, row: Sentence, targets: Sequence[int], number: int) -> Iterator[Window]:
        """A sentence with the target of each word, in one window or several."""
        words = self.of(row)
        tokens = list(chain.from_iterable(words))
        wide = [IGNORE_INDEX] * len(tokens)
        for at, target in zip(accumulate(map(len, words), initial=0), targets, strict=False):
            wide[at] = target
        for begin, end, mine in cuts(len(tokens), self.room, self.stride, self.decoder):
            own = [IGNORE_INDEX] * (end - begin)
            own[mine.start - begin : mine.stop - begin] = wide[mine.start : mine.stop]
            if any(target != IGNORE_INDEX for target in own):
                ids = [*self.before, *tokens[begin:end], *self.behind]
                own = [*[IGNORE_INDEX] * len(self.before), *own, *[IGNORE_INDEX] * len(self.behind)]
                yield Window(array("i", ids), (), array("i", own), row=number)


def cuts(total: int, room: int, stride: int, decoder: bool) -> Iterator[tuple[int, int, range]]:
    """Windows of `total` tokens: begin, end, and which tokens are scored there, each in one window.

    Of two windows, each scores its half of what they share; a decoder sees nothing of what follows,
    so its first one scores all of that.

    Args:
        total: tokens of a sentence.
        room: of a window.
        stride: tokens that windows share, at most half of `room`; the last two may share more.
        decoder: see above.
    """
    step = room - min(stride, room // 2)
    begins = [*range(0, max(0, total - room), step), max(0, total - room)]
    mine = 0
    for begin, following in zip(begins, [*begins[1:], None], strict=True):
        end = min(begin + room, total)
        stop = end
        if following is not None and not decoder:
            stop = (following + end) // 2
        yield begin, end, range(mine, stop)
        mine = stop
