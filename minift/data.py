"""Text-classification files and folders -> rows; plain text for prediction.

What is wrong with a file is an InputError that names the line. Below the public functions:
records -> columns -> rows; `readers` is what comes before.
"""

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .errors import InputError
from .readers import (
    JSON,
    TABLES,
    TEXT,
    Object,
    Path,
    Record,
    check_one_set,
    empty,
    ending_of,
    files_in,
    folders_of_texts,
    kind_of,
    opened,
    opened_lines,
    opened_records,
    show,
    shown_path,
    whole_text,
    wrong,
)

# The columns of text, pair and label: names; or numbers from 1, and how many columns there are.
Keys = list[str | int | None]
Cells = tuple[Keys, Iterable[tuple[int, list]]]  # and, row by row, a line and what stands in them

END_OF_TEXT = "<|endoftext|>"
_ABSENT = object()  # what an object of JSON does not have; null is something

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

    text: str  # "" where the file has a blank
    pair: str | None = None  # second text
    label: str | None = None  # as written, without blanks around it; None: the file has no label
    line: int = 0  # 1-based line of the file where the row starts
    file: str | None = None  # which file of a folder, as errors show it; None: a file was read


@dataclass(frozen=True)
class Columns:
    """Which columns to read: names, or 1-based numbers as text ("2") in a CSV or TSV.

    In JSON a name may lead through objects and lists, "messages.0.content", unless a key is called
    so. None: find the column. A pair is not looked for when `text` is given, or `pair` is empty; a
    label is not when `label` is empty.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None


def read_rows(path: Path, columns: Columns = Columns(), labelled: bool = True) -> list[Row]:
    """The rows of a .csv, .tsv/.tab or .jsonl/.ndjson/.json file, or of a folder, in their order.

    A folder holds such files, which are read in the order of their names and have the same
    columns; or else a folder for each label, named as it, with .txt files of one text each.
    Hidden files, README* and LICENSE* are left out. A name may end in .gz.

    Args:
        path: the file, in UTF-8, or the folder.
        columns: which columns hold text, pair and label. Those left out are found: by the usual
            names in a header or in JSON keys; without a header, the column with the fewest
            different values is the label and the others are text and pair.
        labelled: whether every row must have a label. If not, labels are kept where there are
            any, and what cannot be a label reads as None.

    Returns:
        All rows; those with a blank text as well, see `splits.with_texts`.

    Raises:
        InputError: the file, one of its lines or `columns` is not as it should be.
    """
    if os.path.isdir(path):
        return _folder_rows(path, columns, labelled)
    return _file_rows(path, columns, labelled)[1]


def read_documents(path: Path, column: str | None = None) -> list[Row]:
    """Running text: of a table or JSON lines a document a row, else of a file; a file of text may
    hold several with <|endoftext|> between them. Blank ones are left out.

    Args:
        path: the file, or a folder of such files.
        column: of the texts, where there are columns.

    Raises:
        InputError: as `read_rows`, or there is no text.
    """
    columns, rows, files = Columns(text=column, pair="", label=""), [], [path]
    if os.path.isdir(path):
        files = files_in(path, TABLES + JSON) or files_in(path, TEXT)
        if not files:
            expected = f"files {' '.join(TABLES + JSON + TEXT)} in it"
            raise wrong(shown_path(path), expected, "none", "name a file or another folder")
    for file in files:
        if ending_of(file) in TABLES + JSON:
            rows += _file_rows(file, columns, False, shown_path(file))[1]
        else:
            texts, name = whole_text(file).split(END_OF_TEXT), shown_path(file)
            rows += [Row(text, line=1, file=name) for text in texts]
    rows = [row for row in rows if row.text.strip()]
    if not rows:
        raise empty(shown_path(path))
    return rows


def read_texts(path: Path, columns: Columns = Columns()) -> list[Row]:
    """Rows to predict: as `read_rows`, labels not needed. A .txt or unknown file: a text a line.

    Args:
        path: the file, in UTF-8, or a folder; one that `read_rows` could not read may hold .txt.
        columns: as for `read_rows`; plain text has none.

    Raises:
        InputError: as `read_rows`.
    """
    if os.path.isdir(path):
        return _folder_rows(path, columns, labelled=False, plain=True)
    if ending_of(path) in TABLES + JSON:
        return read_rows(path, columns, labelled=False)
    return _line_rows(path)


def fingerprint(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal; of a folder, of its files' names and sha256.

    Raises:
        InputError: the file, or one in the folder, cannot be read.
    """
    if not os.path.isdir(path):
        with opened(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = files_in(path, TABLES + JSON + TEXT)
    files += [file for _, texts in folders_of_texts(path) for file in texts]
    digest = hashlib.sha256()
    for name, file in sorted((os.path.relpath(file, os.fsdecode(path)), file) for file in files):
        digest.update(os.fsencode(name) + b"\0" + bytes.fromhex(fingerprint(file)))
    return digest.hexdigest()


def _file_rows(
    path: Path, columns: Columns, labelled: bool, member: str | None = None
) -> tuple[Keys, list[Row]]:
    """The columns that were read, and the rows. `member`: what their field `file` says."""
    file, rows = shown_path(path), []
    cells_of = _json_cells if ending_of(path) in JSON else _table_cells
    names = {name.lower() for name in vars(columns).values() if name}
    labels: dict[str, str] = {}  # one string for each, however many rows
    with opened_records(path, names | {*_USUAL["text"], *_USUAL["label"]}) as records:
        keys, cells = cells_of(records, columns, labelled, file)
        text_key, pair_key, label_key, *_ = keys
        for line, (text, pair, label) in cells:
            text = _text(text, text_key, file, line)
            pair = None if pair_key is None else _text(pair, pair_key, file, line)
            if label_key is not None:
                label = _label(label, label_key, labelled, file, line)
                label = labels.setdefault(label, label)
            rows.append(Row(text, pair, label, line, member))
    if not rows:  # nothing, or nothing below the header
        raise empty(file)
    return keys, rows


def _line_rows(path: Path, member: str | None = None) -> list[Row]:
    """The lines of plain text, but for blank ones."""
    with opened_lines(path) as lines:
        texts = [(n, line) for n, line in enumerate(lines, 1) if not line.isspace()]
    if not texts:
        raise empty(shown_path(path))
    return [
        Row(line.removesuffix("\n").removesuffix("\r"), None, None, n, member) for n, line in texts
    ]


def _folder_rows(folder: Path, columns: Columns, labelled: bool, plain: bool = False) -> list[Row]:
    rows: list[Row] = []
    if tables := files_in(folder, TABLES + JSON):
        check_one_set(folder, tables)
        settled: Keys = []
        for file in tables:
            keys, found = _file_rows(file, columns, labelled, shown_path(file))
            if settled and keys != settled:
                expected = f"columns {show(settled)} as in {shown_path(tables[0])}"
                raise wrong(shown_path(file), expected, show(keys), "write them all alike")
            if not settled:
                settled, roles = keys, zip(_USUAL, keys, strict=False)
                names = {role: "" if key is None else str(key) for role, key in roles}
                columns = Columns(**{role: getattr(columns, role) or names[role] for role in names})
            rows += found
    elif labels := folders_of_texts(folder):
        for label, files in labels:
            for file in files:
                member = shown_path(file)
                rows.append(Row(_text(whole_text(file), "", member, 1), None, label, 1, member))
    elif plain:
        for file in files_in(folder, TEXT):
            rows += _line_rows(file, shown_path(file))
    if not rows:
        expected = f"files {' '.join(TABLES + JSON)} in it, or a folder of .txt for each label"
        raise wrong(shown_path(folder), expected, "neither", "name a file or another folder")
    return rows


def _json_cells(records: Iterator[Object], columns: Columns, labelled: bool, file: str) -> Cells:
    objects = list(records)
    if not objects:
        raise empty(file)
    names = dict.fromkeys(key for _, record in objects for key in record)
    names |= dict.fromkeys(path for _, record in objects[:100] for path in _paths(record))
    for name in filter(None, vars(columns).values()):
        if "." in name and any(value_at(record, name) is not _ABSENT for _, record in objects):
            names.setdefault(name)  # a path that may go deeper
    where, names = f"{file}:{objects[0][0]}", list(names)
    asked = _asked(names, columns, where, numbers=False)
    keys = [None if i is None else names[i] for i in _named(names, asked, columns, labelled, where)]
    return keys, (
        (line, [None if key is None else value_at(record, key) for key in keys])
        for line, record in objects
    )


def _paths(value: object, above: str = "", depth: int = 4) -> Iterator[str]:
    """The dotted names of what stands below the keys."""
    if isinstance(value, list):
        value = {"0": value[0]} if value else {}
    for key, below in value.items():
        if isinstance(below, dict | list) and depth:
            yield from _paths(below, f"{above}{key}.", depth - 1)
        elif above:
            yield f"{above}{key}"


def value_at(record: dict[str, object], name: str) -> object:
    """What stands under a key, or at the end of a dotted path."""
    if name in record or "." not in name:
        return record.get(name, _ABSENT)
    value: object = record
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part, _ABSENT)
        elif isinstance(value, list) and part.isdecimal():
            index = int(part[:9])  # no list is as long, and int() refuses thousands of digits
            value = value[index] if index < len(value) else _ABSENT
        elif value is not None:  # of null every part is null
            return _ABSENT
    return value


def _table_cells(records: Iterator[Record], columns: Columns, labelled: bool, file: str) -> Cells:
    records = same_width(records, file)
    first_line, first = next(records, (1, []))
    if not first:
        raise empty(file)
    where, names = f"{file}:{first_line}", [name.strip() for name in first]
    asked = _asked(names, columns, where, numbers=True)
    if not _is_header(names, columns):  # then all rows must be looked at
        table = [(first_line, first), *records]
        records = iter(table)
        if not _has_header(table, columns, labelled):
            found = _unnamed(table, asked, columns, labelled, where)
            keys, cells = _cells(records, found, range(1, len(first) + 1))
            return [*keys, len(first)], cells
        next(records)
    return _cells(records, _named(names, asked, columns, labelled, where), names)


def same_width(records: Iterator[Record], file: str) -> Iterator[Record]:
    first_line = width = 0
    for line, fields in records:
        first_line, width = first_line or line, width or len(fields)
        if len(fields) != width:
            expected = f"{width} fields as on line {first_line}"
            todo = "replace a tab inside a text (TSV), quote a text with the separator in it (CSV)"
            raise wrong(f"{file}:{line}", expected, str(len(fields)), todo)
        yield line, fields


def _cells(records: Iterator[Record], found: list[int | None], names: Sequence[str | int]) -> Cells:
    keys = [None if i is None else names[i] for i in found]
    return keys, ((line, [None if i is None else row[i] for i in found]) for line, row in records)


def _is_header(names: list[str], columns: Columns) -> bool:
    """Whether the first record alone says so."""
    if not all(name.isdecimal() for name in vars(columns).values() if name):
        return True
    known = {name.lower() for name in names}
    return all(known.intersection(_USUAL[role]) for role in ("text", "label"))


def _has_header(table: list[Record], columns: Columns, labelled: bool) -> bool:
    """Whether the first record is one that has a text's name or a label's, not both."""
    first = [cell.strip().lower() for cell in table[0][1]]
    known = [i for i, cell in enumerate(first) if cell in _USUAL["text"] + _USUAL["label"]]
    # "question" may as well be the label of the first row, and then recurs.
    recurs = len(first) > 1 and any(
        fields[i].strip().lower() == first[i] for i in known for _, fields in table[1:]
    )
    return bool(known) and not recurs and not (labelled and columns.label)


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
        if role == "text" and found.get(role) is None:
            others = [i for name, i in free.items() if name not in _USUAL["label"]]
            found[role] = others[0] if len(others) == 1 < len(names) else None
        if found.get(role) is None and (role == "text" or (role == "label" and labelled)):
            expected = f"a usual name for the {role} column, such as {usual[0]!r}"
            below = [n for n in names if n.lower().rpartition(".")[2] in usual]
            todo = f"set --{role}_column {show(below[0]) if below else ''}".rstrip()
            raise wrong(where, expected, show(names, 300), todo)
    return [found.get(role) for role in _USUAL]


def _unnamed(
    table: list[Record], asked: dict[str, int], columns: Columns, labelled: bool, where: str
) -> list[int | None]:
    """The columns as asked, else by how many different values they hold: labels the fewest."""
    first = table[0][1]
    free = [i for i in range(len(first)) if i not in asked.values()]
    text, pair, label = (asked.get(role) for role in _USUAL)
    if len(first) <= 3:
        if columns.label != "" and label is None and len(free) > (text is None):
            label = min(free, key=lambda i: (len({fields[i] for _, fields in table}), -i))
            free.remove(label)
        if text is None and free:
            head = [fields for _, fields in table[:100]]  # numbers and dates are no texts
            worded = [i for i in free if any(c.isalpha() for fields in head for c in fields[i])]
            text, *rest = worded or free
            pair = rest[0] if rest and columns.pair is None else pair
    several = columns.label == "" and len(first) > 1 and "text" not in asked
    if text is None or several or (labelled and label is None):
        got = f"{len(first)} column(s) {show(first)}"
        todo = "set --text_column and --label_column, or check the commas (CSV) or tabs (TSV)"
        raise wrong(where, "a header with usual names, or a text and a label", got, todo)
    if label is not None:
        first_label, *others = (fields[label] for _, fields in table)
        different = set(others)
        if first_label not in different and 4 <= len(others) > 2 * len(different):
            todo = f"--text_column {show(first[text])}"
            todo += f" --label_column {show(first_label)}" if labelled else ""
            raise InputError(
                f"{where}: line {table[0][0]} looks like a header {show(first)}: name its columns, "
                f"as with {todo}"
            )
    return [text, pair, label]


def _text(value: object, key: str | int, file: str, line: int) -> str:
    if isinstance(value, str):
        return value if value.strip() else ""
    if value is None:
        return ""
    todo = "mend or remove the row"
    raise wrong(f"{file}:{line}", f"a text in column {show(key)}", kind_of(value), todo)


def _label(value: object, key: str | int, labelled: bool, file: str, line: int) -> str | None:
    if isinstance(value, str) and value.strip():
        return value.strip()  # "spam " beside "spam" is never meant
    if isinstance(value, bool):  # before int, which it is too
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if labelled:
        expected = f"a label in column {show(key)}"
        todo = "write a string or a whole number, or remove the row"
        raise wrong(f"{file}:{line}", expected, kind_of(value), todo)
    return None
