"""Templates with named fields: "English: {en}\\nChinese: "."""

import difflib
import string

from .data import value_at
from .errors import InputError
from .records import Record


class Template:
    """A text with the names of columns in braces; {{ and }} are braces, \\n and \\t what they
    are called."""

    def __init__(self, text: str, flag: str):
        """
        Args:
            text: the template.
            flag: where it was given, for messages.

        Raises:
            InputError: braces do not fit, or a name is empty.
        """
        # A shell hands over \\n as it is typed.
        text = text.replace("\\n", "\n").replace("\\t", "\t")
        self.text, self.flag = text, flag
        try:
            self.parts = [
                (before, name, bool(spec or conversion))
                for before, name, spec, conversion in string.Formatter().parse(text)
            ]
        except ValueError as error:
            raise InputError(f"{flag} {text!r}: {error}: write {{{{ for a brace") from None
        self.names = [name for _, name, _ in self.parts if name is not None]
        if not all(self.names) or any(odd for *_, odd in self.parts):
            raise InputError(f"{flag} {text!r}: expected names in braces, as {{prompt}}")

    def fill(self, record: Record) -> str:
        """The text of a record; null is nothing.

        Raises:
            InputError: it has no such field, or one that is no text or number.
        """
        return "".join(
            before + ("" if name is None else self._value(record, name))
            for before, name, _ in self.parts
        )

    def _value(self, record: Record, name: str) -> str:
        value, where = value_at(record.fields, name), f"{record.file}:{record.line}"
        if isinstance(value, str | int | float):
            return str(value)
        if value is None:
            return ""
        if isinstance(value, dict | list):
            raise InputError(f"{where}: expected a text in {name!r}, got a {type(value).__name__}")
        close = difflib.get_close_matches(name, record.fields, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        shown = ", ".join(map(str, list(record.fields)[:12]))
        hint = "" if record.file.endswith((".jsonl", ".json")) else "; {1}, {2} without a header"
        raise InputError(
            f"{where}: no field {name!r} for --{self.flag}: {guess}the fields are {shown}{hint}"
        )
