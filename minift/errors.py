"""What is said to the person at the keyboard: the one exception that is theirs to mend, and lines
to be shown on the way."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass


class InputError(ValueError):
    """Bad input: a file, a column, a flag, a model folder. The message is one line that says
    what was expected, what was found, where, and what to do. The command line prints it
    without a traceback and exits with status 2."""

    def __init__(self, message: str):
        # Names and labels from outside may hold line ends; the message is one line all the same.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


@dataclass(frozen=True)
class Notice:
    """A line or a table for the reader; `loud` ones must not be missed."""

    text: str
    loud: bool = False


def unknown(word: str, known: Sequence[str]) -> str:
    """What to say of a name that does not exist."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"unknown {word!r}" + (f": did you mean {close[0]!r}?" if close else "")
