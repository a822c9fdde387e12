"""Text files -> lines -> records: what a file says, before anybody asks which column is what.

A file is decoded strictly and never repaired: what is wrong with it is an InputError that names
the line.
"""

import codecs
import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from .errors import InputError

Path = str | os.PathLike
Table = list[tuple[int, list[str]]]  # line where a record starts, its fields
Objects = list[tuple[int, dict[str, object]]]  # the same of JSON lines

TABLES = (".csv", ".tsv", ".tab")
JSON = (".jsonl", ".ndjson", ".json")
_MAX_LINE = 8 << 20  # bytes; also the longest field of a CSV, in characters

_BARE_CR = ("lines that end in LF or CRLF", "a CR alone", r"run `tr '\r' '\n' < FILE > NEW`")
# Which bytes of every four are mostly 0 -> encoding.
_WIDE = {"0101": "UTF-16LE", "0111": "UTF-32LE", "0011": "UTF-32LE",
         "1010": "UTF-16BE", "1110": "UTF-32BE", "1100": "UTF-32BE"}  # fmt: skip


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; raises InputError where there is none."""
    try:
        with open(path, "rb") as stream:
            yield stream
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        got = getattr(error, "strerror", None) or "an impossible name"
        raise wrong(shown_path(path), "a file", got, "name one that can be read") from None


def read_lines(path: Path, endings: tuple[str, ...] = ()) -> list[str]:
    """The lines without their "\\n", which alone ends one: texts hold NEL and U+2028."""
    file, ending = shown_path(path), ending_of(path)
    with opened(path) as stream:
        data = stream.read().removeprefix(codecs.BOM_UTF8)
    if endings and ending not in endings:
        expected = f"a name that ends in {' '.join(endings)}"
        raise wrong(file, expected, show(ending), "convert or rename the file")
    text = _decoded(data, file)
    if ending != ".csv":  # there a CR may be quoted, and csv.reader finds the others
        inner_cr = data.count(b"\r") - data.endswith((b"\r", b"\r\n"))
        if inner_cr > data.count(b"\n") - data.endswith(b"\n"):
            raise wrong(f"{file}:1", *_BARE_CR)
    start = 0
    while len(data) - start > _MAX_LINE:
        newline = data.rfind(b"\n", start, start + _MAX_LINE + 1)  # jumps over many lines at once
        if newline < 0:
            expected = f"lines of at most {_MAX_LINE >> 20} MiB"
            raise wrong(_at(start, data, file), expected, "more", "is the file split into lines?")
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
        raise wrong(f"{file}:1", "UTF-8", wide, f"run `iconv -f {wide} -t UTF-8 FILE > NEW`")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        at = error.start
        column = len(data[data.rfind(b"\n", 0, at) + 1 : at].decode()) + 1
        got = f"byte 0x{data[at]:02x} at column {column}"
        todo = "if it is Latin-1, convert with `iconv -f LATIN1 -t UTF-8 FILE > NEW`"
        raise wrong(_at(at, data, file), "UTF-8", got, todo) from None
    if (nul := data.find(0)) >= 0:
        raise wrong(_at(nul, data, file), "text", "a NUL byte", r"remove them (tr -d '\0')")
    return text


def _at(index: int, data: bytes, file: str) -> str:
    return f"{file}:" + str(data.count(b"\n", 0, index) + 1)


def tsv_records(lines: list[str]) -> Table:
    """TSV knows no quoting: a quote is a character like any other."""
    numbered = enumerate(lines, 1)
    return [(n, s.removesuffix("\r").split("\t")) for n, s in numbered if s.strip(" \r")]


def csv_records(lines: list[str], file: str) -> Table:
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
        return wrong(f"{file}:{line}", *_BARE_CR)
    todo = 'write "" for a quote inside a quoted text'
    too_long = "field limit" in problem
    if not too_long and "end of data" not in problem:
        got = f"more text, in the row that starts on line {start}"
        return wrong(f"{file}:{line}", 'a comma after a closing "', got, todo)
    # A lenient reader hands out the field that the quote swallowed; its newlines lead back to
    # the line where the quote opens. Too long a field is quoted to the end of the line before.
    stop = line - too_long
    *_, swallowed = next(csv.reader(text + "\n" for text in lines[start - 1 : stop]))
    opens = stop + 1 - swallowed.count("\n")
    got = f"{_MAX_LINE >> 20} MiB more" if too_long else "the end of the file"
    todo = f"close the quote that opens on line {opens}, or {todo}"
    return wrong(f"{file}:{opens}", 'a closing "', got, todo)


def json_records(lines: list[str], file: str) -> Objects:
    return [(n, _json_object(s, f"{file}:{n}")) for n, s in enumerate(lines, 1) if s.strip()]


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
    name = os.fsdecode(path)
    return name if name.isprintable() else repr(name)


def ending_of(path: Path) -> str:
    return os.path.splitext(os.fsdecode(path))[1].lower()
