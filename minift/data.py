"""Text-classification files and folders -> rows; plain text for prediction.

What is wrong with a file is an InputError that names the line. Before it come `readers` (records)
and `columns` (which of their fields are which).
"""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice

from .columns import (
    ABSENT,
    USUAL,
    Columns,
    Indices,
    asked_columns,
    has_header,
    is_header,
    json_names,
    named_columns,
    unnamed_columns,
    value_at,
)
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

# The columns of text, pair, label and id: names, or numbers from 1.
Keys = list[str | int | None]
Cells = Iterable[tuple[int, list]]  # row by row, a line and what stands in the columns
Drop = Callable[[str, str], None]

FIND_ALL = Columns()
END_OF_TEXT = "<|endoftext|>"
HEAD_OBJECTS = 100  # of a file that is streamed: their keys are its columns
HEAD_RECORDS = 1000  # and these show what the columns of a table without a header are
_MOST_SHARED = 4096  # labels of which all rows have the same object


@dataclass(frozen=True, slots=True)
class Row:
    """One example, as the file has it."""

    text: str  # "" where the file has a blank
    pair: str | None = None  # second text
    # As written, without blanks around it, or what it was read as; None: the file has no label.
    label: Hashable = None
    line: int = 0  # 1-based line of the file where the row starts
    file: str | None = None  # which file of a folder, as errors show it; None: a file was read
    id: str | None = None  # what the file calls the row


@dataclass(frozen=True)
class Reading:
    """How a file is read: see `read_rows`."""

    columns: Columns
    labelled: bool
    parse: Callable[[object], Hashable]
    drop: Drop | None = None
    whole: bool = True  # columns are decided by all of a file, not by its head
    plain: bool = False  # a folder may hold .txt files, of a text a line


def one_label(value: object) -> str:
    """A label as a file has it: text, a whole number or a bool.

    Raises:
        ValueError: it is something else; says what is expected.
    """
    if isinstance(value, str) and value.strip():
        return value.strip()  # "spam " beside "spam" is never meant
    if isinstance(value, bool):  # before int, which it is too
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise ValueError("a label")


def read_rows(
    path: Path,
    columns: Columns = FIND_ALL,
    labelled: bool = True,
    parse: Callable[[object], Hashable] = one_label,
    drop: Drop | None = None,
) -> list[Row]:
    """The rows of a .csv, .tsv/.tab or .jsonl/.ndjson/.json file, or of a folder, in their order.

    A folder holds such files, which are read in the order of their names and have the same
    columns; or else a folder for each label, named as it, with .txt files of one text each.
    Hidden files, README* and LICENSE* are left out. A name may end in .gz.

    Args:
        path: the file, in UTF-8, or the folder.
        columns: which columns hold text, pair, label and id. Those left out are found: by the
            usual names in a header or in JSON keys; without a header, of the columns that can be
            read as labels the one with the fewest different values is the label, the others are
            text and pair.
        labelled: whether every row must have a label. If not, labels are kept where there are
            any, and what cannot be a label reads as None.
        parse: a label from what stands in the file: text, or a value of JSON; raises ValueError,
            which says what is expected.
        drop: is told of each row that has no text or no label that can be read, which then is left
            out: file:line, and why, in the same words for all rows of the same mistake. None: such
            a row is an error. A broken file is one in any case.

    Returns:
        All rows; those with a blank text as well, see `splits.with_texts`.

    Raises:
        InputError: the file, one of its lines or `columns` is not as it should be.
    """
    return list(_rows(path, Reading(columns, labelled, parse, drop)))


def stream_rows(
    path: Path,
    columns: Columns = FIND_ALL,
    labelled: bool = True,
    parse: Callable[[object], Hashable] = one_label,
    drop: Drop | None = None,
) -> Iterator[Row]:
    """The rows that `read_rows` has, one by one: memory does not grow with the file.

    The same but for this: the keys of JSON are those of the first 100 objects, and what the
    columns of a table without a header hold is seen in its first 1,000 rows.

    Args:
        path: see `read_rows`, as for the others.

    Raises:
        InputError: as `read_rows`, where the mistake stands, when rows before it have been given.
    """
    return _rows(path, Reading(columns, labelled, parse, drop, whole=False))


def read_documents(path: Path, column: str | None = None) -> list[Row]:
    """Running text: of a table or JSON lines a document a row, else of a file; a file of text may
    hold several with <|endoftext|> between them. Blank ones are left out.

    Args:
        path: the file, or a folder of such files.
        column: of the texts, where there are columns.

    Raises:
        InputError: as `read_rows`, or there is no text.
    """
    columns, rows, files = Columns(column, "", "", ""), [], [path]
    if os.path.isdir(path):
        files = files_in(path, TABLES + JSON) or files_in(path, TEXT)
        if not files:
            expected = f"files {' '.join(TABLES + JSON + TEXT)} in it"
            raise wrong(shown_path(path), expected, "none", "name a file or another folder")
    for file in files:
        if ending_of(file) in TABLES + JSON:
            rows += _whole_rows(file, columns, shown_path(file))
        else:
            texts, name = whole_text(file).split(END_OF_TEXT), shown_path(file)
            rows += [Row(text, line=1, file=name) for text in texts]
    rows = [row for row in rows if row.text.strip()]
    if not rows:
        raise empty(shown_path(path))
    return rows


def read_texts(path: Path, columns: Columns = FIND_ALL) -> list[Row]:
    """Rows to predict: as `read_rows`, labels not needed. A .txt or unknown file: a text a line.

    Args:
        path: the file, in UTF-8, or a folder; one that `read_rows` could not read may hold .txt.
        columns: as for `read_rows`; plain text has none.

    Raises:
        InputError: as `read_rows`.
    """
    return list(_texts(path, Reading(columns, False, one_label, plain=True)))


def stream_texts(
    path: Path,
    columns: Columns = FIND_ALL,
    parse: Callable[[object], Hashable] = one_label,
) -> Iterator[Row]:
    """The rows that `read_texts` has, one by one, as by `stream_rows`."""
    return _texts(path, Reading(columns, False, parse, whole=False, plain=True))


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


def _texts(path: Path, how: Reading) -> Iterator[Row]:
    plain = not os.path.isdir(path) and ending_of(path) not in TABLES + JSON
    return _line_rows(path) if plain else _rows(path, how)


def _rows(path: Path, how: Reading) -> Iterator[Row]:
    if os.path.isdir(path):
        yield from _folder_rows(path, how)
    else:
        with _file_rows(path, how) as (_, rows):
            yield from rows


def _whole_rows(path: Path, columns: Columns, member: str) -> list[Row]:
    with _file_rows(path, Reading(columns, False, one_label), member) as (_, rows):
        return list(rows)


@contextmanager
def _file_rows(
    path: Path, how: Reading, member: str | None = None
) -> Iterator[tuple[Keys, Iterator[Row]]]:
    """What the columns of text, pair and label are called, in a table without a header their
    numbers and its width; and the rows. `member`: what their field `file` says."""
    file, columns = shown_path(path), how.columns
    cells_of = _json_cells if ending_of(path) in JSON else _table_cells
    names = {name.lower() for name in vars(columns).values() if name}
    with opened_records(path, names | {*USUAL["text"], *USUAL["label"]}) as records:
        keys, width, cells = cells_of(records, how, file)
        yield [*keys[:3], *width], _made_rows(keys, cells, how, file, member)


def _made_rows(
    keys: Keys, cells: Cells, how: Reading, file: str, member: str | None
) -> Iterator[Row]:
    text_key, pair_key, label_key, _ = keys
    labels: dict[Hashable, Hashable] = {}  # one object for each, however many rows
    nothing = True
    for line, (text, pair, label, name) in cells:
        nothing, where = False, f"{file}:{line}"
        try:
            text = _text(text, text_key, where)
            pair = None if pair_key is None else _text(pair, pair_key, where)
            if label_key is not None:
                label = _label(label, label_key, how, where)
                if len(labels) < _MOST_SHARED:
                    label = labels.setdefault(label, label)
        except Unusable as error:
            if how.drop is None:
                raise InputError(str(error)) from None
            how.drop(where, error.why)
            continue
        yield Row(text, pair, label, line, member, _id(name))
    if nothing:  # at all, or below the header
        raise empty(file)


def _line_rows(path: Path, member: str | None = None) -> Iterator[Row]:
    """The lines of plain text, but for blank ones."""
    nothing = True
    with opened_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                nothing, text = False, line.removesuffix("\n").removesuffix("\r")
                yield Row(text, None, None, number, member)
    if nothing:
        raise empty(shown_path(path))


def _folder_rows(folder: Path, how: Reading) -> Iterator[Row]:
    if tables := files_in(folder, TABLES + JSON):
        check_one_set(folder, tables)
        yield from _table_folder_rows(tables, how)
    elif labels := folders_of_texts(folder):
        for label, files in labels:
            for file in files:
                texts = iter([(1, [whole_text(file), None, label, None])])
                member = shown_path(file)
                yield from _made_rows(["", None, "", None], texts, how, member, member)
    elif how.plain and (files := files_in(folder, TEXT)):
        for file in files:
            yield from _line_rows(file, shown_path(file))
    else:
        expected = f"files {' '.join(TABLES + JSON)} in it, or a folder of .txt for each label"
        raise wrong(shown_path(folder), expected, "neither", "name a file or another folder")


def _table_folder_rows(tables: list[str], how: Reading) -> Iterator[Row]:
    settled: Keys = []
    for file in tables:
        with _file_rows(file, how, shown_path(file)) as (keys, rows):
            if settled and keys != settled:
                expected = f"columns {show(settled)} as in {shown_path(tables[0])}"
                raise wrong(shown_path(file), expected, show(keys), "write them all alike")
            if not settled:
                settled, roles = keys, zip(("text", "pair", "label"), keys, strict=False)
                names = {role: "" if key is None else str(key) for role, key in roles}
                asked = {role: getattr(how.columns, role) or names[role] for role in names}
                how = replace(how, columns=replace(how.columns, **asked))
            yield from rows


def _json_cells(
    records: Iterator[Object], how: Reading, file: str
) -> tuple[Keys, list[int], Cells]:
    head = list(islice(records, None if how.whole else HEAD_OBJECTS))
    if not head:
        raise empty(file)
    names = json_names([record for _, record in head], how.columns)
    where = f"{file}:{head[0][0]}"
    asked = asked_columns(names, how.columns, where, numbers=False)
    found = named_columns(names, asked, how.columns, how.labelled, where)
    keys = [None if i is None else names[i] for i in found]
    cells = (
        (line, [None if key is None else value_at(record, key) for key in keys])
        for line, record in chain(head, records)
    )
    return keys, [], cells


def _table_cells(
    records: Iterator[Record], how: Reading, file: str
) -> tuple[Keys, list[int], Cells]:
    records, columns, labelled = same_width(records, file), how.columns, how.labelled
    first_line, first = next(records, (1, []))
    if not first:
        raise empty(file)
    where, names = f"{file}:{first_line}", [name.strip() for name in first]
    asked = asked_columns(names, columns, where, numbers=True)
    if not is_header(names, columns):  # then other rows must be looked at
        limit = None if how.whole else HEAD_RECORDS - 1
        table = [(first_line, first), *islice(records, limit)]
        records = chain(table, records)
        if not has_header(table, columns, labelled):
            found = unnamed_columns(table, asked, columns, labelled, where, how.parse)
            return _cells(records, found, range(1, len(first) + 1), [len(first)])
        next(records)
    found = named_columns(names, asked, columns, labelled, where)
    return _cells(records, found, names, [])


def same_width(records: Iterator[Record], file: str) -> Iterator[Record]:
    first_line = width = 0
    for line, fields in records:
        first_line, width = first_line or line, width or len(fields)
        if len(fields) != width:
            expected = f"{width} fields as on line {first_line}"
            todo = "replace a tab inside a text (TSV), quote a text with the separator in it (CSV)"
            raise wrong(f"{file}:{line}", expected, str(len(fields)), todo)
        yield line, fields


def _cells(
    records: Iterator[Record], found: Indices, names: Sequence[str | int], width: list[int]
) -> tuple[Keys, list[int], Cells]:
    keys = [None if i is None else names[i] for i in found]
    cells = ((line, [None if i is None else row[i] for i in found]) for line, row in records)
    return keys, width, cells


class Unusable(ValueError):
    """A row with no text or no label.

    Args:
        message: an error's line.
        why: the same for all rows of the same mistake.
    """

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


def _text(value: object, key: str | int, where: str) -> str:
    if isinstance(value, str):
        return value if value.strip() else ""
    if value is None:
        return ""
    wanted = f"a text in column {show(key)}"
    message = wrong(where, wanted, kind_of(value), "mend or remove the row")
    raise Unusable(str(message), f"without {wanted}")


def _label(value: object, key: str | int, how: Reading, where: str) -> Hashable:
    try:
        return how.parse(value)
    except ValueError as error:
        if not how.labelled:
            return None
        wanted = f"{error} in column {show(key)}"
        got = show(value) if isinstance(value, str) and value.strip() else kind_of(value)
        todo = "mend or remove the row"
        if how.parse is one_label:
            todo = "write a string or a whole number, or remove the row"
        raise Unusable(str(wrong(where, wanted, got, todo)), f"without {wanted}") from None


def _id(value: object) -> str | None:
    """What a row is called; of what JSON nests, its JSON."""
    if value is None or value is ABSENT:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.strip() or None
