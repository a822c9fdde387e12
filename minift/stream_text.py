"""Texts that continue texts, in pieces as they come.

    for piece in stream_text(model, tokenizer, ["Once upon a time"], GenerateConfig(stop=("\\n",))):
        print(piece.text, end="", flush=True)

A piece never ends inside a character, whose bytes may come in several tokens, nor shows the
beginning of what may become a stop string.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from .generate import stream
from .sampling import GenerateConfig
from .tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what bytes that are no character yet are decoded to


class Piece(NamedTuple):
    """More text of an answer."""

    prompt: int  # which prompt it continues
    text: str
    end: str  # "", or why it is the answer's last: eos, length, positions or stop


class Pieces:
    """The text of one answer, which grows by a token at a time."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, stop
        self.stopped = False  # whether a stop string has come
        self._tokens: list[int] = []  # those before `_shown` are there as context alone
        self._shown, self._held = 0, ""

    def add(self, token: int) -> str:
        """What can be shown now, after one more token."""
        self._tokens.append(token)
        return self._grow(last=False)

    def rest(self) -> str:
        """What is left when no token will come."""
        text = self._grow(last=True) + self._held
        self._held = ""
        return text

    def _grow(self, last: bool) -> str:
        # A decoder may treat the first token in its own way: what is new is what a token adds.
        text = self.decode(self._tokens)
        if self.stopped or (text.endswith(UNFINISHED) and not last):
            return ""
        new = text[len(self.decode(self._tokens[: self._shown])) :]
        del self._tokens[: self._shown]
        self._shown = len(self._tokens)
        return self._before_stop(self._held + new)

    def _before_stop(self, text: str) -> str:
        """What can be shown of it; the end that a stop string may begin with is held back."""
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        if self.stopped:
            self._held = ""
            return text[: min(ends)[1]]  # of the one that is whole first
        begins = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1)
                  if text.endswith(stop[:n]))  # fmt: skip
        shown = len(text) - max(begins, default=0)
        self._held = text[shown:]
        return text[:shown]


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: GenerateConfig | None = None,
    **options,
) -> Iterator[Piece]:
    """The text that continues each text, in pieces; see `minift.generate.stream` for the options.
    The token that ends an answer is not in its text, nor is a stop string.

    Raises:
        InputError: a text has no tokens, or too many.
    """
    config = config or GenerateConfig()
    answers = [Pieces(tokenizer.decode, config.stop) for _ in texts]
    new_text = ""

    def stopped(prompt: int, token: int) -> bool:
        nonlocal new_text
        new_text = answers[prompt].add(token)
        return answers[prompt].stopped

    options = {"eos": tokenizer.eos, **options, "stopped": stopped}
    for new in stream(model, tokenizer.ids(texts), config, **options):
        text, new_text = new_text, ""
        text += answers[new.prompt].rest() if new.end else ""
        if text or new.end:
            yield Piece(new.prompt, text, new.end)


def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: GenerateConfig | None = None,
    **options,
) -> list[str]:
    """The text that continues each text; see `stream_text`."""
    answers = [""] * len(texts)
    for piece in stream_text(model, tokenizer, texts, config, **options):
        answers[piece.prompt] += piece.text
    return answers
