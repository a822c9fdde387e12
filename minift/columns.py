"""Which columns hold text, pair, label and id: as asked, by usual names, or by what stands in them.

What cannot be found is an InputError that names the flag to set.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from .errors import InputError
from .readers import Record, show, wrong

ABSENT = object()  # what an object of JSON does not have; null is something

USUAL = {  # what the columns are called in the files of the world, the likeliest first
    role: tuple(names.split())
    for role, names in (
        ("text", "text sentence sentence1 review content question question1 premise query tweet "
                 "comment utterance document"),
        ("pair", "sentence2 text_pair text2 question2 hypothesis answer"),
        ("label", "label labels category class target intent sentiment label_text"),
        ("id", "id idx guid uid row_id example_id"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Which columns to read: names, or 1-based numbers as text ("2") in a CSV or TSV.

    In JSON a name may lead through objects and lists, "messages.0.content", unless a key is called
    so. None: find the column. A pair is not looked for when `text` is given, or `pair` is empty; a
    label is not when `label` is empty, nor an id when `id` is; an id has a name, or there is none.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    id: str | None = None


Indices = list[int | None]  # of the columns of text, pair, label and id


def value_at(record: dict[str, object], name: str) -> object:
    """What stands under a key, or at the end of a dotted path."""
    if name in record or "." not in name:
        return record.get(name, ABSENT)
    value: object = record
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part, ABSENT)
        elif isinstance(value, list) and part.isdecimal():
            index = int(part[:9])  # no list is as long, and int() refuses thousands of digits
            value = value[index] if index < len(value) else ABSENT
        elif value is not None:  # of null every part is null
            return ABSENT
    return value


def json_names(objects: list[dict[str, object]], columns: Columns) -> list[str]:
    """The keys of objects, and the dotted paths below them that may be meant."""
    names = dict.fromkeys(key for record in objects for key in record)
    names |= dict.fromkeys(path for record in objects[:100] for path in _paths(record))
    for name in filter(None, vars(columns).values()):
        if "." in name and any(value_at(record, name) is not ABSENT for record in objects):
            names.setdefault(name)  # a path that may go deeper
    return list(names)


def _paths(value: object, above: str = "", depth: int = 4) -> Iterator[str]:
    """The dotted names of what stands below the keys."""
    if isinstance(value, list):
        value = {"0": value[0]} if value else {}
    for key, below in value.items():
        if isinstance(below, dict | list) and depth:
            yield from _paths(below, f"{above}{key}.", depth - 1)
        elif above:
            yield f"{above}{key}"


def is_header(names: list[str], columns: Columns) -> bool:
    """Whether the first record alone says so."""
    if not all(name.isdecimal() for name in vars(columns).values() if name):
        return True
    known = {name.lower() for name in names}
    return all(known.intersection(USUAL[role]) for role in ("text", "label"))


def has_header(table: list[Record], columns: Columns, labelled: bool) -> bool:
    """Whether the first record is one that has a text's name or a label's, not both."""
    first = [cell.strip().lower() for cell in table[0][1]]
    known = [i for i, cell in enumerate(first) if cell in USUAL["text"] + USUAL["label"]]
    # "question" may as well be the label of the first row, and then recurs.
    recurs = len(first) > 1 and any(
        fields[i].strip().lower() == first[i] for i in known for _, fields in table[1:]
    )
    return bool(known) and not recurs and not (labelled and columns.label)


def asked_columns(names: list[str], columns: Columns, where: str, numbers: bool) -> dict[str, int]:
    """Role -> index, for the columns that the caller chose. `numbers`: "2" means the second.

    Raises:
        InputError: there is none of that name or number, or one is asked for twice.
    """
    asked: dict[str, int] = {}
    for role, name in vars(columns).items():
        if not name:
            continue
        expected = f"a column {show(name)}"
        if numbers and name.isdecimal():
            index = int(name[:9]) - 1  # no file is as wide, and int() refuses thousands of digits
            if not 0 <= index < len(names):
                todo = f"set --{role}_column to a number from 1 to {len(names)}"
                raise wrong(where, expected, show(names, 300), todo)
        elif name in names:
            index = names.index(name)
        else:
            close = difflib.get_close_matches(name, names[:100], n=1, cutoff=0.5)
            todo = f"did you mean {show(close[0])}?" if close else f"change --{role}_column"
            raise wrong(where, expected, show(names, 300), todo)
        if index in asked.values():
            todo = f"set --{role}_column to another"
            raise wrong(where, "different columns", f"{show(name)} twice", todo)
        asked[role] = index
    return asked


def named_columns(
    names: list[str], asked: dict[str, int], columns: Columns, labelled: bool, where: str
) -> Indices:
    """The columns as asked, else under a usual name. `names` are a header or the keys of JSON.

    Raises:
        InputError: a name is there twice, or a text or a needed label is not found.
    """
    filled = [name for name in names if name]
    if len(set(filled)) < len(filled):
        twice = show(Counter(filled).most_common(1)[0][0])
        raise wrong(where, "different column names", f"{twice} twice", "rename one")
    free: dict[str, int] = {}
    for i, name in enumerate(names):
        if i not in asked.values():
            free.setdefault(name.strip().lower(), i)
    found: dict[str, int | None] = dict(asked)
    for role, usual in USUAL.items():
        if getattr(columns, role) is None and not (role == "pair" and columns.text):
            taken = found.values() if role == "id" else ()
            known = (free[name] for name in usual if name in free)
            found[role] = next((index for index in known if index not in taken), None)
        if role == "text" and found.get(role) is None:
            others = [i for name, i in free.items() if name not in USUAL["label"]]
            found[role] = others[0] if len(others) == 1 < len(names) else None
        if found.get(role) is None and (role == "text" or (role == "label" and labelled)):
            expected = f"a usual name for the {role} column, such as {usual[0]!r}"
            below = [n for n in names if n.lower().rpartition(".")[2] in usual]
            todo = f"set --{role}_column {show(below[0]) if below else ''}".rstrip()
            raise wrong(where, expected, show(names, 300), todo)
    return [found.get(role) for role in USUAL]


def unnamed_columns(
    table: list[Record],
    asked: dict[str, int],
    columns: Columns,
    labelled: bool,
    where: str,
    parse: Callable[[object], Hashable],
) -> Indices:
    """The columns as asked, else by what they hold: the label can be read as one in most rows, and
    has the fewest different values.

    Raises:
        InputError: that does not tell, or the first row looks like a header.
    """
    first = table[0][1]
    free = [i for i in range(len(first)) if i not in asked.values()]
    text, pair, label, row_id = (asked.get(role) for role in USUAL)
    width = len(first) - (row_id is not None)
    if width <= 3:
        if columns.label != "" and label is None and len(free) > (text is None):
            label = _likeliest_label(table, free, parse)
            free = [i for i in free if i != label]
        if text is None and free:
            head = [fields for _, fields in table[:100]]  # numbers and dates are no texts
            worded = [i for i in free if any(c.isalpha() for fields in head for c in fields[i])]
            text, *rest = worded or free
            pair = rest[0] if rest and columns.pair is None else pair
    several = columns.label == "" and width > 1 and "text" not in asked
    if text is None or several or (labelled and label is None):
        got = f"{len(first)} column(s) {show(first)}"
        todo = "set --text_column and --label_column, or check the commas (CSV) or tabs (TSV)"
        raise wrong(where, "a header with usual names, or a text and a label", got, todo)
    if label is not None and _looks_like_a_header([fields[label] for _, fields in table], parse):
        todo = f"--text_column {show(first[text])}"
        todo += f" --label_column {show(first[label])}" if labelled else ""
        raise InputError(
            f"{where}: line {table[0][0]} looks like a header {show(first)}: name its columns, "
            f"as with {todo}"
        )
    return [text, pair, label, row_id]


def _likeliest_label(
    table: list[Record], free: list[int], parse: Callable[[object], Hashable]
) -> int | None:
    columns = {i: [fields[i] for _, fields in table] for i in free}
    good = [i for i in free if 2 * sum(_reads(v, parse) for v in columns[i]) > len(table)]
    return min(good, key=lambda i: (len(set(columns[i])), -i), default=None)


def _looks_like_a_header(labels: list[str], parse: Callable[[object], Hashable]) -> bool:
    """Whether the first label recurs nowhere though all others do, or is a word above numbers."""
    first, *others = labels
    different = set(others)
    if len(others) < 4 or first in different:
        return False
    word_alone = bool(first.strip()) and not _reads(first, parse)
    return word_alone or len(others) > 2 * len(different)


def _reads(value: object, parse: Callable[[object], Hashable]) -> bool:
    """Whether it can be a label."""
    try:
        parse(value)
    except ValueError:
        return False
    return True
