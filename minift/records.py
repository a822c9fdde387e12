"""Rows as they are, every field by its name: what templates take their texts from."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .data import same_width
from .readers import (
    JSON,
    TABLES,
    Path,
    check_one_set,
    empty,
    ending_of,
    files_in,
    opened_records,
    shown_path,
    wrong,
)


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a table, or one object of JSON."""

    fields: dict[str, object]
    line: int  # 1-based, where it starts
    file: str


def read_records(path: Path, names: Sequence[str] = ()) -> list[Record]:
    """The records of a .csv, .tsv/.tab or .jsonl/.ndjson/.json file, or of such files in a folder.

    The first row of a table is its header, unless all of `names` are numbers: then fields are
    called "1", "2", ... and every row is a record.

    Args:
        path: the file or folder.
        names: the fields that are wanted.

    Raises:
        InputError: a file is not as it should be, or empty.
    """
    if os.path.isdir(path):
        files = files_in(path, TABLES + JSON)
        check_one_set(path, files)
        if not files:
            expected = f"files {' '.join(TABLES + JSON)} in it"
            raise wrong(shown_path(path), expected, "none", "name a file or another folder")
        return [record for file in files for record in read_records(file, names)]
    with opened_records(path, {name.lower() for name in names}) as found:
        make = _objects if ending_of(path) in JSON else _rows
        records = list(make(found, shown_path(path), names))
    if not records:
        raise empty(shown_path(path))
    return records


def _objects(found, file: str, _) -> Iterator[Record]:
    return (Record(fields, line, file) for line, fields in found)


def _rows(found, file: str, names: Sequence[str]) -> Iterator[Record]:
    header: list[str] = []
    numbered = bool(names) and all(name.isdecimal() for name in names)
    for line, cells in same_width(found, file):
        if numbered:
            header = header or [str(i + 1) for i in range(len(cells))]
        elif not header:
            header = [cell.strip() for cell in cells]
            continue
        yield Record(dict(zip(header, cells, strict=True)), line, file)
