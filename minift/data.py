"""Text-classification files -> rows. CSV, TSV and JSON lines; plain text for prediction.

What is wrong with a file is an InputError that names the line. Below the public functions:
records -> columns -> rows; `readers` is what comes before.
"""

import difflib
import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import InputError
from .readers import (
    JSON,
    TABLES,
    Objects,
    Path,
    Table,
    csv_records,
    empty,
    ending_of,
    json_records,
    kind_of,
    opened,
    read_lines,
    show,
    shown_path,
    tsv_records,
    wrong,
)

Keys = list[str | int | None]  # the columns of text, pair and label: names, or numbers from 1
Cells = tuple[Keys, Iterable[tuple[int, list]]]  # and, row by row, a line and what stands in them

_USUAL = {  # what the columns are called in the files of the world, the likeliest first
    role: tuple(names.split())
    for role, names in (
        ("text", "text sentence sentence1 review content question question1 premise query tweet "
                 "comment utterance document"),
        ("pair", "sentence2 text_pair text2 question2 hypothesis answer"),
        ("label", "label labels category class target intent sentiment label_text"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One example, as the file has it."""

    text: str
    pair: str | None  # second text
    label: str | None  # as written; None where the file has no label
    line: int  # 1-based line of the file where the row starts


@dataclass(frozen=True)
class Columns:
    """Which columns to read: names, or 1-based numbers as text ("2") in a CSV or TSV.

    None: find the column. A pair is not looked for when `text` is given, or `pair` is empty.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None


def read_rows(path: Path, columns: Columns = Columns(), labelled: bool = True) -> list[Row]:
    """The rows of a .csv, .tsv/.tab or .jsonl/.ndjson/.json file, in the file's order.

    Args:
        path: the file, in UTF-8.
        columns: which columns hold text, pair and label. Those left out are found: by the usual
            names in a header or in JSON keys; without a header, the column with the fewest
            different values is the label and the others are text and pair.
        labelled: whether every row must have a label. If not, labels are kept where there are
            any, and what cannot be a label reads as None.

    Raises:
        InputError: the file, one of its lines or `columns` is not as it should be.
    """
    file, ending, lines = shown_path(path), ending_of(path), read_lines(path, TABLES + JSON)
    if ending in JSON:
        records, cells_of = json_records(lines, file), _json_cells
    elif ending == ".csv":
        records, cells_of = csv_records(lines, file), _table_cells
    else:
        records, cells_of = tsv_records(lines), _table_cells
    if not records:
        raise empty(file)
    keys, cells = cells_of(records, columns, labelled, file)
    text_key, pair_key, label_key = keys
    rows = []
    for line, (text, pair, label) in cells:
        where = f"{file}:{line}"
        text = _text(text, text_key, where)
        pair = None if pair_key is None else _text(pair, pair_key, where)
        label = None if label_key is None else _label(label, label_key, labelled, where)
        rows.append(Row(text, pair, label, line))
    if not rows:  # nothing below the header
        raise empty(file)
    return rows


def read_texts(path: Path, columns: Columns = Columns()) -> list[Row]:
    """Rows to predict: as `read_rows`, labels not needed. A .txt or unknown file: a text a line.

    Args:
        path: the file, in UTF-8.
        columns: as for `read_rows`; plain text has none.

    Raises:
        InputError: as `read_rows`.
    """
    if ending_of(path) in TABLES + JSON:
        return read_rows(path, columns, labelled=False)
    lines = enumerate(read_lines(path), 1)
    rows = [Row(text.removesuffix("\r"), None, None, n) for n, text in lines if text.strip()]
    if not rows:
        raise empty(shown_path(path))
    return rows


def stratified_split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, validation), both in the order of `rows`: a pure function of its arguments.

    Args:
        rows: what to split.
        fraction: share of each label's rows that goes to validation, rounded. A label keeps at
            least one row in train and, if it has two or more and `fraction` is above 0, at least
            one in validation.
        seed: chooses the rows.

    Raises:
        InputError: `fraction` is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise wrong("validation fraction", "at least 0 and below 1", str(fraction), "use 0.1")
    members: dict[str | None, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.label, []).append(i)
    rng = random.Random(seed)
    held_out: set[int] = set()
    for indices in members.values():
        share = max(int(len(indices) * fraction + 0.5), fraction > 0)
        held_out.update(rng.sample(indices, min(share, len(indices) - 1)))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [row for i, row in enumerate(rows) if i in held_out]


def fingerprint(path: Path) -> str:
    """The sha256 of the file's bytes, in hexadecimal.

    Raises:
        InputError: the file cannot be read.
    """
    with opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json_cells(records: Objects, columns: Columns, labelled: bool, file: str) -> Cells:
    names = list(dict.fromkeys(key for _, record in records for key in record))
    where = f"{file}:{records[0][0]}"
    asked = _asked(names, columns, where, numbers=False)
    keys = [None if i is None else names[i] for i in _named(names, asked, columns, labelled, where)]
    return keys, ((line, [record.get(key) for key in keys]) for line, record in records)


def _table_cells(table: Table, columns: Columns, labelled: bool, file: str) -> Cells:
    first_line, first = table[0]
    for line, fields in table:
        if len(fields) != len(first):
            expected = f"{len(first)} fields as on line {first_line}"
            todo = "replace a tab inside a text (TSV), quote a text with commas (CSV)"
            raise wrong(f"{file}:{line}", expected, str(len(fields)), todo)
    where, names = f"{file}:{first_line}", [name.strip() for name in first]
    asked = _asked(names, columns, where, numbers=True)
    if _has_header(table, columns, labelled):
        found, table = _named(names, asked, columns, labelled, where), table[1:]
    else:
        found, names = _unnamed(table, asked, columns, labelled, where), range(1, len(first) + 1)
    keys = [None if i is None else names[i] for i in found]
    return keys, ((line, [None if i is None else row[i] for i in found]) for line, row in table)


def _has_header(table: Table, columns: Columns, labelled: bool) -> bool:
    if not all(name.isdecimal() for name in vars(columns).values() if name):
        return True
    first = [cell.strip().lower() for cell in table[0][1]]
    texts = [i for i, cell in enumerate(first) if cell in _USUAL["text"]]
    if not texts or any(cell in _USUAL["label"] for cell in first):
        return bool(texts)
    # A text name alone: "question" may as well be the label of the first row, and then recurs.
    recurs = len(first) > 1 and any(
        fields[i].strip().lower() == first[i] for i in texts for _, fields in table[1:]
    )
    return not recurs and not (labelled and columns.label)


def _asked(names: list[str], columns: Columns, where: str, numbers: bool) -> dict[str, int]:
    """Role -> index, for the columns that the caller chose. `numbers`: "2" means the second."""
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


def _named(
    names: list[str], asked: dict[str, int], columns: Columns, labelled: bool, where: str
) -> list[int | None]:
    """The columns as asked, else under a usual name. `names` are a header or the keys of JSON."""
    filled = [name for name in names if name]
    if len(set(filled)) < len(filled):
        twice = show(Counter(filled).most_common(1)[0][0])
        raise wrong(where, "different column names", f"{twice} twice", "rename one")
    free: dict[str, int] = {}
    for i, name in enumerate(names):
        if i not in asked.values():
            free.setdefault(name.strip().lower(), i)
    found: dict[str, int | None] = dict(asked)
    for role, usual in _USUAL.items():
        if getattr(columns, role) is None and not (role == "pair" and columns.text):
            found[role] = next((free[name] for name in usual if name in free), None)
        if found.get(role) is None and (role == "text" or (role == "label" and labelled)):
            expected = f"a usual name for the {role} column, such as {usual[0]!r}"
            raise wrong(where, expected, show(names, 300), f"set --{role}_column")
    return [found.get(role) for role in _USUAL]


def _unnamed(
    table: Table, asked: dict[str, int], columns: Columns, labelled: bool, where: str
) -> list[int | None]:
    """The columns as asked, else by how many different values they hold: labels the fewest."""
    first = table[0][1]
    free = [i for i in range(len(first)) if i not in asked.values()]
    text, pair, label = (asked.get(role) for role in _USUAL)
    if len(first) <= 3:
        if label is None and len(free) > (text is None):
            label = min(free, key=lambda i: (len({fields[i] for _, fields in table}), -i))
            free.remove(label)
        if text is None and free:
            text, *rest = free
            pair = rest[0] if rest and columns.pair is None else pair
    if text is None or (labelled and label is None):
        got = f"{len(first)} column(s) {show(first)}"
        todo = "set --text_column and --label_column, or check the commas (CSV) or tabs (TSV)"
        raise wrong(where, "a header with usual names, or a text and a label", got, todo)
    if label is not None:
        first_label, *others = (fields[label] for _, fields in table)
        different = set(others)
        if first_label not in different and 4 <= len(others) > 2 * len(different):
            raise InputError(
                f"{where}: line {table[0][0]} looks like a header {show(first)}: name its columns "
                "with --text_column and --label_column, or put a header above it"
            )
    return [text, pair, label]


def _text(value: object, key: str | int, where: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise wrong(where, f"a text in column {show(key)}", kind_of(value), "mend or remove the row")


def _label(value: object, key: str | int, labelled: bool, where: str) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool):  # before int, which it is too
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if labelled:
        todo = "write a string or a whole number, or remove the row"
        raise wrong(where, f"a label in column {show(key)}", kind_of(value), todo)
    return None
