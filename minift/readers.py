"""Files and folders -> lines -> records: what they say, before anybody asks which column is what.

A file is decoded strictly and never repaired: what is wrong with it is an InputError that names
the line. It is read once and a line at a time, so a file never stands in memory beside its rows.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

from .errors import InputError

Path = str | os.PathLike
Record = tuple[int, list[str]]  # line where it starts, its fields
Object = tuple[int, dict[str, object]]  # the same of JSON lines

TABLES = (".csv", ".tsv", ".tab")
JSON = (".jsonl", ".ndjson", ".json")
TEXT = (".txt",)
_MAX_LINE = 8 << 20  # bytes; also the longest field of a CSV, in characters
_BUFFER = 1 << 20  # bytes read at once
_DELIMITERS = ",;\t|"  # of a CSV, the likeliest first
_HEAD = 100, 1 << 20  # lines, or characters, that show which delimiter it is

_BARE_CR = ("lines that end in LF or CRLF", "a CR alone", r"run `tr '\r' '\n' < FILE > NEW`")
# Which bytes of every four are mostly 0 -> encoding.
_WIDE = {"0101": "UTF-16LE", "0111": "UTF-32LE", "0011": "UTF-32LE",
         "1010": "UTF-16BE", "1110": "UTF-32BE", "1100": "UTF-32BE"}  # fmt: skip


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file.

    Raises:
        InputError: there is none, or reading fails: a broken disk, a damaged gzip.
    """
    try:
        stream = open(path, "rb", buffering=_BUFFER)  # noqa: SIM115 (closed by `with` below)
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        got = getattr(error, "strerror", None) or "an impossible name"
        raise wrong(shown_path(path), "a file", got, "name one that can be read") from None
    with stream:
        try:
            yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            todo = "fetch or compress it again"
            raise wrong(shown_path(path), "a whole gzip file", str(error), todo) from None
        except OSError as error:
            todo = "check the disk"
            raise wrong(shown_path(path), "a file", str(error.strerror or error), todo) from None


@contextmanager
def opened_lines(path: Path, bare_cr: bool = False) -> Iterator[Iterator[str]]:
    """The lines of a file, decompressed if its name ends in .gz, each with its "\\n".

    Args:
        path: the file.
        bare_cr: whether there may be more CR than LF, which else looks like a file of old.

    Raises:
        InputError: as `opened`; the file is not UTF-8, holds NUL or a line of more than 8 MiB.
    """
    with opened(path) as stream:
        if _is_gzip(path):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), _BUFFER)
        yield _lines(stream, shown_path(path), bare_cr)


@contextmanager
def opened_records(
    path: Path, names: Collection[str] = ()
) -> Iterator[Iterator[Record] | Iterator[Object]]:
    """The records of a file of TABLES or JSON; blank lines are none.

    Args:
        path: the file.
        names: in lower case, what a header may hold: they help to tell the delimiter of a CSV.

    Raises:
        InputError: as `opened_lines`; the name has another ending, or a line breaks the format.
    """
    file, ending = shown_path(path), ending_of(path)
    with opened_lines(path, bare_cr=ending == ".csv") as lines:  # csv.reader finds them
        if ending not in TABLES + JSON:
            expected = f"a name that ends in {' '.join(TABLES + JSON)}"
            raise wrong(file, expected, show(ending), "convert or rename the file")
        if ending == ".csv":
            yield _csv_records(lines, file, names)
        else:
            yield (_json_records(lines, file) if ending in JSON else _tsv_records(lines))


def whole_text(path: Path) -> str:
    """All that stands in a file.

    Raises:
        InputError: as `opened_lines`.
    """
    with opened_lines(path, bare_cr=True) as lines:
        return "".join(lines)


def files_in(folder: Path, endings: Collection[str]) -> list[str]:
    """Paths of the files in a folder, in the order of their names.

    Hidden files are left out, and those called README... or LICENSE...

    Args:
        folder: where; folders in it are not looked into.
        endings: in lower case, as ".csv"; with ".gz" after it is good as well.

    Raises:
        InputError: the folder cannot be listed.
    """
    entries = (os.path.join(folder, name) for name in _names_in(folder))
    return [path for path in entries if os.path.isfile(path) and ending_of(path) in endings]


def folders_of_texts(folder: Path) -> list[tuple[str, list[str]]]:
    """(name, paths of the .txt files in it) of each folder in a folder that has any, by name.

    Raises:
        InputError: a folder cannot be listed, or its name could not be a label.
    """
    names = [name for name in _names_in(folder) if os.path.isdir(os.path.join(folder, name))]
    found = [(name, files_in(os.path.join(folder, name), TEXT)) for name in names]
    for name, paths in found:
        if paths and not (name.isprintable() and name.strip()):  # it is to be a label
            where = shown_path(folder)
            raise wrong(where, "folders with printable names", show(name), "rename the folder")
    return [(name, paths) for name, paths in found if paths]


def check_one_set(folder: Path, files: list[str]) -> None:
    """Raises InputError if train.csv lies beside test.csv: rows of a test must not be trained."""
    parts: dict[str, str] = {}
    for name in map(os.path.basename, files):
        if part := re.match(r"(train|test|dev|val|valid|validation|eval)(?![a-z])", name.lower()):
            parts.setdefault(part[1], name)
    if "train" in parts and len(parts) > 1:
        got = " and ".join(map(show, parts.values()))
        raise wrong(shown_path(folder), "files of one data set", got, "name one of the files")


def _names_in(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(os.fsdecode(folder)))
    except OSError as error:
        todo = "name one that can be read"
        raise wrong(shown_path(folder), "a folder", str(error.strerror or error), todo) from None
    return [name for name in names if not re.match(r"\.|readme|licen[cs]e", name, re.I)]


def _lines(stream: BinaryIO, file: str, bare_cr: bool) -> Iterator[str]:
    """LF alone ends a line: texts hold NEL and U+2028."""
    head = stream.peek(_BUFFER)
    _check_encoding(head, file)
    if not bare_cr:
        inner_cr = head.count(b"\r") - head.endswith((b"\r", b"\r\n"))
        if inner_cr > head.count(b"\n") - head.endswith(b"\n"):
            raise wrong(f"{file}:1", *_BARE_CR)
    for number, data in enumerate(iter(partial(stream.readline, _MAX_LINE + 2), b""), 1):
        if number == 1 and not (data := data.removeprefix(codecs.BOM_UTF8)):
            return
        if len(data) > _MAX_LINE and len(data.removesuffix(b"\n")) > _MAX_LINE:
            expected = f"lines of at most {_MAX_LINE >> 20} MiB"
            raise wrong(f"{file}:{number}", expected, "more", "is the file split into lines?")
        try:
            line = data.decode()
        except UnicodeDecodeError as error:
            at = error.start
            got = f"byte 0x{data[at]:02x} at column {len(data[:at].decode()) + 1}"
            todo = "if it is Latin-1, convert with `iconv -f LATIN1 -t UTF-8 FILE > NEW`"
            raise wrong(f"{file}:{number}", "UTF-8", got, todo) from None
        if "\0" in line:
            raise wrong(f"{file}:{number}", "text", "a NUL byte", r"remove them (tr -d '\0')")
        yield line


def _check_encoding(head: bytes, file: str) -> None:
    quarters = [head[i:4096:4] for i in range(4)]
    wide = _WIDE.get("".join("01"[2 * part.count(0) > len(part)] for part in quarters))
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16: a prefix of it
        wide = "UTF-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        wide = "UTF-16"
    if wide:
        raise wrong(f"{file}:1", "UTF-8", wide, f"run `iconv -f {wide} -t UTF-8 FILE > NEW`")


def _tsv_records(lines: Iterator[str]) -> Iterator[Record]:
    """TSV knows no quoting: a quote is a character like any other."""
    for number, line in enumerate(lines, 1):
        if line.strip(" \r\n"):
            yield number, line.removesuffix("\n").removesuffix("\r").split("\t")


def _csv_records(lines: Iterator[str], file: str, names: Collection[str]) -> Iterator[Record]:
    head: list[str] = []
    while len(head) < _HEAD[0] and sum(map(len, head)) < _HEAD[1] and (line := next(lines, "")):
        head.append(line)
    start = 1
    if head and (told := re.fullmatch(r'"?sep=([,;\t|])"?\r?\n?', head[0], re.I)):
        delimiter, start = told[1], 2  # how Excel says it, in a line of its own
        del head[0]
    else:
        delimiter = _long_fields(partial(_delimiter, head, names))
    record: list[str] = []  # the lines of the record that is being read

    def fed() -> Iterator[str]:
        for line in chain(head, lines):
            record.append(line)
            yield line

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    try:
        while (fields := _long_fields(partial(next, reader, None))) is not None:
            if not record[0].isspace():
                yield start, fields
            start += len(record)
            record.clear()
    except csv.Error as error:
        raise _csv_mistake(str(error), record, start, delimiter, file) from None


def _long_fields(read: Callable[[], Any], limit: int = _MAX_LINE) -> Any:
    """Calls `read` with another limit to the fields of CSV, which is one for the whole process and
    is the caller's again between two rows."""
    limit_of_process = csv.field_size_limit(limit)
    try:
        return read()
    finally:
        csv.field_size_limit(limit_of_process)


def _delimiter(head: list[str], names: Collection[str]) -> str:
    """The one that splits the first lines of a CSV best; a comma if none does."""

    def score(delimiter: str) -> tuple[float, int]:
        records = []
        with suppress(csv.Error):  # what was read before the mistake is enough
            for fields in csv.reader(head, delimiter=delimiter):
                if any(map(str.strip, fields)):
                    records.append(fields)
        width = len(records[0]) if records else 0
        if width < 2:
            return 0, 0
        known = sum(name.strip().lower() in names for name in records[0])
        alike = [r for r in records if len(r) == width and (known or not _like_prose(r))]
        fewest = min((len(set(column)) for column in zip(*alike, strict=True)), default=0)
        return len(alike) / len(records) * (1 + known), -fewest  # labels are few

    return max(_DELIMITERS, key=score)


def _like_prose(fields: list[str]) -> bool:
    """Whether spaces follow what may separate them, as they do in a sentence."""
    return any(field.startswith(" ") for field in fields[1:])


def _csv_mistake(
    problem: str, record: list[str], start: int, delimiter: str, file: str
) -> InputError:
    """What csv.reader found in the last line of a record that starts on line `start`."""
    line = start + len(record) - 1
    if "new-line" in problem:
        return wrong(f"{file}:{line}", *_BARE_CR)
    todo = 'write "" for a quote inside a quoted text'
    too_long = "field limit" in problem
    if not too_long and "end of data" not in problem:
        sign = {",": "a comma", "\t": "a tab"}.get(delimiter, repr(delimiter))
        got = f"more text, in the row that starts on line {start}"
        return wrong(f"{file}:{line}", f'{sign} after a closing "', got, todo)
    # A lenient reader hands out the field that the quote swallowed; its newlines lead back to
    # the line where the quote opens. Too long a field is quoted to the end of the line before.
    whole = [text.removesuffix("\n") + "\n" for text in record[: len(record) - too_long]]
    lenient = csv.reader(whole, delimiter=delimiter)
    *_, swallowed = _long_fields(partial(next, lenient), sum(map(len, whole)))
    opens = start + len(whole) - swallowed.count("\n")
    got = f"{_MAX_LINE >> 20} MiB more" if too_long else "the end of the file"
    todo = f"close the quote that opens on line {opens}, or {todo}"
    return wrong(f"{file}:{opens}", 'a closing "', got, todo)


def _json_records(lines: Iterator[str], file: str) -> Iterator[Object]:
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            yield number, _json_object(line.rstrip("\r\n"), f"{file}:{number}")


def _json_object(line: str, where: str) -> dict[str, object]:
    todo = 'write {"text": ..., "label": ...}'
    try:
        record = json.loads(line)
        if "\\ud" in line.lower():  # only such an escape can be half a surrogate pair
            json.dumps(record, ensure_ascii=False).encode()
        if isinstance(record, dict):
            return record
        got = kind_of(record)
    except json.JSONDecodeError as error:
        got = f"{error.msg!r} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # surrogates; too many digits; nested too deeply
        got = str(error)
    if line.lstrip().startswith("["):  # the usual mistake, on one line or on many
        got, todo = "a list", "write JSON lines, as `jq -c '.[]' FILE > NEW` does"
    raise wrong(where, "JSON lines, one object on each", got, todo)


def wrong(where: str, expected: str, got: str, todo: str) -> InputError:
    """A mistake in a file, on one line."""
    return InputError(f"{where}: expected {expected}, got {got}: {todo}")


def empty(file: str) -> InputError:
    """Nothing to read."""
    return wrong(file, "rows", "an empty file", "put at least one row into it")


def kind_of(value: object) -> str:
    """What JSON calls a value, for a message."""
    if isinstance(value, str):
        return "a string" if value.strip() else "an empty one"
    kinds = {bool: "a bool", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "nothing")


def show(value: object, width: int = 60) -> str:
    """Text from outside on one line, short enough for a message."""
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def shown_path(path: Path) -> str:
    """A path on one line."""
    name = os.fsdecode(path)
    return name if name.isprintable() else repr(name)


def ending_of(path: Path) -> str:
    """What a file's name ends in, ".gz" aside, in lower case."""
    name = os.fsdecode(path)
    return os.path.splitext(name[:-3] if _is_gzip(path) else name)[1].lower()


def _is_gzip(path: Path) -> bool:
    return os.fsdecode(path).lower().endswith(".gz")
