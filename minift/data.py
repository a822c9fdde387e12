"""Text-classification files -> rows. CSV, TSV and JSON lines; plain text for prediction.

A file is decoded strictly and never repaired: what is wrong with it is an InputError that names
the line. Below the public functions: bytes -> lines -> records -> columns -> rows.
"""

import codecs
import csv
import difflib
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from .errors import InputError

Path = str | os.PathLike
Table = list[tuple[int, list[str]]]  # line where a record starts, its fields
Objects = list[tuple[int, dict[str, object]]]  # the same of JSON lines
Keys = list[str | int | None]  # the columns of text, pair and label: names, or numbers from 1
Cells = tuple[Keys, Iterable[tuple[int, list]]]  # and, row by row, a line and what stands in them

_TABLES = (".csv", ".tsv", ".tab")
_JSON = (".jsonl", ".ndjson", ".json")
_MAX_LINE = 8 << 20  # bytes; also the longest field of a CSV, in characters

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
    file, ending, lines = _shown(path), _ending(path), _lines(path, _TABLES + _JSON)
    if ending in _JSON:
        records, cells_of = _json_records(lines, file), _json_cells
    elif ending == ".csv":
        records, cells_of = _csv_records(lines, file), _table_cells
    else:
        records, cells_of = _tsv_records(lines), _table_cells
    if not records:
        raise _empty(file)
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
        raise _empty(file)
    return rows


def read_texts(path: Path, columns: Columns = Columns()) -> list[Row]:
    """Rows to predict: as `read_rows`, labels not needed. A .txt or unknown file: a text a line.

    Args:
        path: the file, in UTF-8.
        columns: as for `read_rows`; plain text has none.

    Raises:
        InputError: as `read_rows`.
    """
    if _ending(path) in _TABLES + _JSON:
        return read_rows(path, columns, labelled=False)
    lines = enumerate(_lines(path), 1)
    rows = [Row(text.removesuffix("\r"), None, None, n) for n, text in lines if text.strip()]
    if not rows:
        raise _empty(_shown(path))
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
        raise _wrong("validation fraction", "at least 0 and below 1", str(fraction), "use 0.1")
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
    with _opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_BARE_CR = ("lines that end in LF or CRLF", "a CR alone", r"run `tr '\r' '\n' < FILE > NEW`")
# Which bytes of every four are mostly 0 -> encoding.
_WIDE = {"0101": "UTF-16LE", "0111": "UTF-32LE", "0011": "UTF-32LE",
         "1010": "UTF-16BE", "1110": "UTF-32BE", "1100": "UTF-32BE"}  # fmt: skip


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as stream:
            yield stream
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        got = getattr(error, "strerror", None) or "an impossible name"
        raise _wrong(_shown(path), "a file", got, "name one that can be read") from None


def _lines(path: Path, endings: tuple[str, ...] = ()) -> list[str]:
    """The lines without their "\\n", which alone ends one: texts hold NEL and U+2028."""
    file, ending = _shown(path), _ending(path)
    with _opened(path) as stream:
        data = stream.read().removeprefix(codecs.BOM_UTF8)
    if endings and ending not in endings:
        expected = f"a name that ends in {' '.join(endings)}"
        raise _wrong(file, expected, _show(ending), "convert or rename the file")
    text = _decoded(data, file)
    if ending != ".csv":  # there a CR may be quoted, and csv.reader finds the others
        inner_cr = data.count(b"\r") - data.endswith((b"\r", b"\r\n"))
        if inner_cr > data.count(b"\n") - data.endswith(b"\n"):
            raise _wrong(f"{file}:1", *_BARE_CR)
    start = 0
    while len(data) - start > _MAX_LINE:
        newline = data.rfind(b"\n", start, start + _MAX_LINE + 1)  # jumps over many lines at once
        if newline < 0:
            expected = f"lines of at most {_MAX_LINE >> 20} MiB"
            raise _wrong(_at(start, data, file), expected, "more", "is the file split into lines?")
        start = newline + 1
    return text.split("\n")


def _decoded(data: bytes, file: str) -> str:
    quarters = [data[i:4096:4] for i in range(4)]
    wide = _WIDE.get("".join("01"[2 * part.count(0) > len(part)] for part in quarters))
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16: a prefix of it
        wide = "UTF-32"
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        wide = "UTF-16"
    if wide:
        raise _wrong(f"{file}:1", "UTF-8", wide, f"run `iconv -f {wide} -t UTF-8 FILE > NEW`")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        at = error.start
        column = len(data[data.rfind(b"\n", 0, at) + 1 : at].decode()) + 1
        got = f"byte 0x{data[at]:02x} at column {column}"
        todo = "if it is Latin-1, convert with `iconv -f LATIN1 -t UTF-8 FILE > NEW`"
        raise _wrong(_at(at, data, file), "UTF-8", got, todo) from None
    if (nul := data.find(0)) >= 0:
        raise _wrong(_at(nul, data, file), "text", "a NUL byte", r"remove them (tr -d '\0')")
    return text


def _at(index: int, data: bytes, file: str) -> str:
    return f"{file}:" + str(data.count(b"\n", 0, index) + 1)


def _tsv_records(lines: list[str]) -> Table:
    """TSV knows no quoting: a quote is a character like any other."""
    numbered = enumerate(lines, 1)
    return [(n, s.removesuffix("\r").split("\t")) for n, s in numbered if s.strip(" \r")]


def _csv_records(lines: list[str], file: str) -> Table:
    table = []
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    limit_of_process = csv.field_size_limit(_MAX_LINE)
    try:
        start = 1
        for fields in reader:
            if lines[start - 1].strip():
                table.append((start, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        csv.field_size_limit(sys.maxsize)
        raise _csv_mistake(str(error), lines, start, reader.line_num, file) from None
    finally:
        csv.field_size_limit(limit_of_process)
    return table


def _csv_mistake(problem: str, lines: list[str], start: int, line: int, file: str) -> InputError:
    """What csv.reader found on `line`, in a record that starts on line `start`, for people."""
    if "new-line" in problem:
        return _wrong(f"{file}:{line}", *_BARE_CR)
    todo = 'write "" for a quote inside a quoted text'
    too_long = "field limit" in problem
    if not too_long and "end of data" not in problem:
        got = f"more text, in the row that starts on line {start}"
        return _wrong(f"{file}:{line}", 'a comma after a closing "', got, todo)
    # A lenient reader hands out the field that the quote swallowed; its newlines lead back to
    # the line where the quote opens. Too long a field is quoted to the end of the line before.
    stop = line - too_long
    *_, swallowed = next(csv.reader(text + "\n" for text in lines[start - 1 : stop]))
    opens = stop + 1 - swallowed.count("\n")
    got = f"{_MAX_LINE >> 20} MiB more" if too_long else "the end of the file"
    todo = f"close the quote that opens on line {opens}, or {todo}"
    return _wrong(f"{file}:{opens}", 'a closing "', got, todo)


def _json_records(lines: list[str], file: str) -> Objects:
    return [(n, _json_object(s, f"{file}:{n}")) for n, s in enumerate(lines, 1) if s.strip()]


def _json_object(line: str, where: str) -> dict[str, object]:
    todo = 'write {"text": ..., "label": ...}'
    try:
        record = json.loads(line)
        if "\\ud" in line.lower():  # only such an escape can be half a surrogate pair
            json.dumps(record, ensure_ascii=False).encode()
        if isinstance(record, dict):
            return record
        got = _kind(record)
    except json.JSONDecodeError as error:
        got = f"{error.msg!r} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # surrogates; too many digits; nested too deeply
        got = str(error)
    if line.lstrip().startswith("["):  # the usual mistake, on one line or on many
        got, todo = "a list", "write JSON lines, as `jq -c '.[]' FILE > NEW` does"
    raise _wrong(where, "JSON lines, one object on each", got, todo)


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
            raise _wrong(f"{file}:{line}", expected, str(len(fields)), todo)
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
        expected = f"a column {_show(name)}"
        if numbers and name.isdecimal():
            index = int(name[:9]) - 1  # no file is as wide, and int() refuses thousands of digits
            if not 0 <= index < len(names):
                todo = f"set --{role}_column to a number from 1 to {len(names)}"
                raise _wrong(where, expected, _show(names, 300), todo)
        elif name in names:
            index = names.index(name)
        else:
            close = difflib.get_close_matches(name, names[:100], n=1, cutoff=0.5)
            todo = f"did you mean {_show(close[0])}?" if close else f"change --{role}_column"
            raise _wrong(where, expected, _show(names, 300), todo)
        if index in asked.values():
            todo = f"set --{role}_column to another"
            raise _wrong(where, "different columns", f"{_show(name)} twice", todo)
        asked[role] = index
    return asked


def _named(
    names: list[str], asked: dict[str, int], columns: Columns, labelled: bool, where: str
) -> list[int | None]:
    """The columns as asked, else under a usual name. `names` are a header or the keys of JSON."""
    filled = [name for name in names if name]
    if len(set(filled)) < len(filled):
        twice = _show(Counter(filled).most_common(1)[0][0])
        raise _wrong(where, "different column names", f"{twice} twice", "rename one")
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
            raise _wrong(where, expected, _show(names, 300), f"set --{role}_column")
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
        got = f"{len(first)} column(s) {_show(first)}"
        todo = "set --text_column and --label_column, or check the commas (CSV) or tabs (TSV)"
        raise _wrong(where, "a header with usual names, or a text and a label", got, todo)
    if label is not None:
        first_label, *others = (fields[label] for _, fields in table)
        different = set(others)
        if first_label not in different and 4 <= len(others) > 2 * len(different):
            raise InputError(
                f"{where}: line {table[0][0]} looks like a header {_show(first)}: name its columns "
                "with --text_column and --label_column, or put a header above it"
            )
    return [text, pair, label]


def _text(value: object, key: str | int, where: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise _wrong(where, f"a text in column {_show(key)}", _kind(value), "mend or remove the row")


def _label(value: object, key: str | int, labelled: bool, where: str) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool):  # before int, which it is too
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if labelled:
        todo = "write a string or a whole number, or remove the row"
        raise _wrong(where, f"a label in column {_show(key)}", _kind(value), todo)
    return None


def _wrong(where: str, expected: str, got: str, todo: str) -> InputError:
    return InputError(f"{where}: expected {expected}, got {got}: {todo}")


def _empty(file: str) -> InputError:
    return _wrong(file, "rows", "an empty file", "put at least one row into it")


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "a string" if value.strip() else "an empty one"
    kinds = {bool: "a bool", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "nothing")


def _show(value: object, width: int = 60) -> str:
    """Text from outside on one line, short enough for a message."""
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _shown(path: Path) -> str:
    name = os.fsdecode(path)
    return name if name.isprintable() else repr(name)


def _ending(path: Path) -> str:
    return os.path.splitext(os.fsdecode(path))[1].lower()
