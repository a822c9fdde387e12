"""Words and their tags from files: columns of CoNLL, JSON lines of words, or of texts with spans.

    EU      B-organization        {"tokens": ["EU", "rejects"], "tags": ["B-organization", "O"]}
    rejects O                     {"text": "EU rejects", "spans": [[0, 2, "organization"]]}
    <blank line between sentences>

A line of columns is split at tabs, else at spaces (a .csv: at commas), as the first one shows.
"""

import csv
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

from tokenizers import Regex, pre_tokenizers

from .columns import USUAL
from .data import Columns, value_at
from .errors import InputError
from .readers import (
    JSON,
    Object,
    check_one_set,
    ending_of,
    files_in,
    opened_lines,
    opened_records,
    show,
    shown_path,
    wrong,
)
from .span_metrics import Entity, tags_of

COLUMNS = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt", ".tsv", ".tab", ".csv")
_TEXTS = ("text", "sentence", "content")
_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "labels", "pos_tags", "label")
_SPANS = ("spans", "entities", "label", "labels")
_BLANKS = " \t\r\n"  # others may be words, or stand in them
# As BERT splits texts: at blanks, around punctuation and around each ideogram.
_SPLIT = pre_tokenizers.Sequence([
    pre_tokenizers.BertPreTokenizer(),
    pre_tokenizers.Split(
        Regex(r"[\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2FA1F}]"),
        "isolated",
    ),
])  # fmt: skip
Drop = Callable[[str, str], None]  # file:line, why


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words, and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None  # None: the file has none
    line: int  # 1-based line of its first word, or of its object
    file: str | None = None  # as errors show it
    text: str = ""  # that the words were found in, or the words with spaces between them
    starts: tuple[int, ...] | None = None  # of the words in a text; None: words were given
    pair: None = field(default=None, init=False)  # it is a single text
    id: str | None = None  # what the file calls it

    def where(self, word: int) -> str:
        """file:line of a word."""
        return f"{self.file}:{self.line + word * (ending_of(self.file) not in JSON)}"

    def spaced(self) -> list[bool]:
        """Whether something blank stands before each word."""
        if self.starts is None:
            return [i > 0 for i in range(len(self.words))]
        ends = [0, *(at + len(w) for at, w in zip(self.starts, self.words, strict=True))]
        return [at > end for at, end in zip(self.starts, ends, strict=False)]


@dataclass
class Reading:
    """How a file is read, and what was found on the way."""

    drop: Drop  # is told of sentences that cannot be used
    labelled: bool = True  # every word must have a tag
    names: tuple[str, ...] = ()  # of tags that are numbers
    trimmed: list[str] = field(default_factory=list)  # places of spans with blanks at their ends


def of_text(text: str, line: int, file: str | None = None) -> Sentence:
    """The words of a text, without tags."""
    found = _SPLIT.pre_tokenize_str(text)
    starts = tuple(begin for _, (begin, _) in found)
    return Sentence(tuple(text[a:b] for _, (a, b) in found), None, line, file, text, starts)


def read_tagged(path: str, columns: Columns, how: Reading) -> Iterator[Sentence]:
    """The sentences of a file, or of the files of a folder, one by one.

    Args:
        path: .jsonl, .ndjson or .json, else columns; a .txt to predict without `columns.text` is
            a text a line. A name may end in .gz.
        columns: of words, or texts, and of tags, or spans: numbers from 1, in JSON names. Without,
            the first and the last; in JSON the usual names.
        how: what must be there; `drop` is called for what cannot be used.

    Raises:
        InputError: the file is not as it should be.
    """
    if os.path.isdir(path):
        files = files_in(path, JSON) or files_in(path, COLUMNS)
        check_one_set(path, files)
        if not files:
            expected = f"files {' '.join(JSON + COLUMNS)} in it"
            raise wrong(shown_path(path), expected, "none", "name a file or another folder")
        for file in files:
            yield from read_tagged(file, columns, how)
        return
    file = shown_path(path)
    if ending_of(path) in JSON:
        with opened_records(path) as records:
            for record in records:
                if (sentence := _of_object(record, columns, how, file)) is not None:
                    yield replace(sentence, id=_name(record[1], columns))
    elif ending_of(path) == ".txt" and not how.labelled and not columns.text:
        with opened_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                yield of_text(line.rstrip("\r\n"), number, file)
    else:
        with opened_lines(path) as lines:
            yield from _of_columns(lines, columns, how, file)


def _of_columns(
    lines: Iterator[str], columns: Columns, how: Reading, file: str
) -> Iterator[Sentence]:
    head: list[str] = []  # up to the first line that is surely no comment
    for line in lines:
        head.append(line)
        if line.strip(_BLANKS) and not line.startswith(("#", "-DOCSTART-")):
            break
    shown = next((line for line in reversed(head) if line.strip(_BLANKS)), "")
    split = _splitter(shown, file)
    width = len(split(shown))
    at = _numbers(columns, width, how, f"{file}:{len(head)}") if shown else (0, 0)
    rows: list[list[str]] = []  # of the sentence that is being read
    start, numbered = 0, file.endswith(".conllu")
    for number, line in enumerate(chain(head, lines, [""]), 1):
        cells = split(line)
        if not line.strip(_BLANKS) or line.startswith("-DOCSTART-"):
            if rows:
                yield from _of_rows(rows, width, at, how, f"{file}:{start}")
            rows = []
        # A word may be "#", or begin with it: it is a comment only where no columns follow. In
        # CoNLL-U 1-2 and 1.1 are no words of their own.
        elif (rows or not (line.startswith("#") and len(cells) != width)) and not (
            numbered and not cells[0].isdecimal()
        ):
            start = start if rows else number
            rows.append(cells)


def _splitter(line: str, file: str) -> Callable[[str], list[str]]:
    """How the lines of a file are split, as one of them shows."""
    if "\t" in line.strip(_BLANKS):
        return lambda line: line.rstrip("\r\n").split("\t")
    if ending_of(file) == ".csv" and "," in line:
        return lambda line: next(csv.reader([line.rstrip("\r\n")]))
    return lambda line: re.split("[ \t]+", line.strip(_BLANKS))


def _numbers(columns: Columns, width: int, how: Reading, where: str) -> tuple[int, int]:
    """Where words and tags stand in a line."""
    universal = where.rpartition(":")[0].endswith(".conllu")
    asked = (
        columns.text or ("2" if universal else "1"),
        columns.label or ("4" if universal else str(width)),
    )
    for name in asked[: 1 + how.labelled]:
        if not (name.isdecimal() and 1 <= int(name) <= width):
            raise wrong(where, f"a column's number from 1 to {width}", show(name), "correct it")
    if how.labelled and asked[0] == asked[1]:
        todo = "are words and tags separated by tabs or spaces?"
        raise wrong(where, "a word and its tag", f"{width} column", todo)
    return int(asked[0]) - 1, int(asked[1]) - 1 if asked[1].isdecimal() else 0


def _of_rows(
    rows: list[list[str]], width: int, at: tuple[int, int], how: Reading, where: str
) -> Iterator[Sentence]:
    file, _, line = where.rpartition(":")
    word, tag = at
    for i, cells in enumerate(rows):
        here, least = f"{file}:{int(line) + i}", 1 + (max(at) if how.labelled else word)
        if len(cells) < least or (how.labelled and len(cells) != width):
            if not how.labelled:
                raise wrong(here, f"{least} columns or more", str(len(cells)), "correct the line")
            return how.drop(here, "have a line with more or fewer columns than others")
        empty = not cells[word].strip(_BLANKS) or not cells[tag].strip(_BLANKS)
        if how.labelled and empty:
            return how.drop(here, "have an empty word or tag")
    words = tuple(cells[word] for cells in rows)
    tags = [cells[tag].strip(_BLANKS) for cells in rows] if how.labelled else None
    yield _sentence(words, tags, int(line), file)


def _of_object(record: Object, columns: Columns, how: Reading, file: str) -> Sentence | None:
    """The sentence of an object of JSON; None: it was dropped."""
    line, fields = record
    key = columns.text or next((k for k in (*_WORDS, *_TEXTS) if k in fields), None)
    value = value_at(fields, key) if key else None
    usual = _TAGS if isinstance(value, list) else _SPANS
    name = columns.label or next((k for k in usual if k in fields), "")
    answer = value_at(fields, name) if name else None
    where = f"{file}:{line}"
    if isinstance(value, str):
        sentence = of_text(value, line, file)
        return _with_spans(sentence, answer, how) if how.labelled else sentence
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        expected = 'a list "tokens" of words, or a "text"'
        raise wrong(where, expected, f"keys {show(list(fields))}", "name it with --text_column")
    if not how.labelled:
        return _sentence(tuple(value), None, line, file)
    if not isinstance(answer, list):
        raise wrong(where, 'a list "tags"', f"keys {show(list(fields))}", "try --label_column")
    why = ""
    if len(answer) != len(value):
        why = "have more or fewer tags than words"
    elif not value or not all(word.strip() for word in value):
        why = "have no words, or an empty one"
    if why:
        return how.drop(where, why)
    return _sentence(tuple(value), [_tag(tag, how, where) for tag in answer], line, file)


def _name(fields: dict[str, object], columns: Columns) -> str | None:
    """What stands under the name of ids, or under a usual one."""
    key = columns.id or next((key for key in fields if key.lower() in USUAL["id"]), None)
    value = None if key is None else fields.get(key)
    return None if value is None else str(value)


def _tag(tag: object, how: Reading, where: str) -> str:
    if isinstance(tag, str) and tag.strip():
        return tag.strip()
    if type(tag) is int and 0 <= tag < len(how.names):
        return how.names[tag]
    todo = "name tags that are numbers with --labels, in their order"
    raise wrong(where, "tags that are texts", show(tag), todo)


def _sentence(words: tuple[str, ...], tags: list[str] | None, line: int, file: str) -> Sentence:
    tags = None if tags is None else tuple(map(sys.intern, tags))  # there are few different ones
    return Sentence(words, tags, line, file, " ".join(words))


def _with_spans(sentence: Sentence, spans: object, how: Reading) -> Sentence | None:
    """The words of a text with the tags of its spans; None: it was dropped."""
    where, text = f"{sentence.file}:{sentence.line}", sentence.text
    if not isinstance(spans, list):
        raise wrong(where, 'a list "spans"', show(spans), "name it with --label_column")
    if not sentence.words:
        return how.drop(where, "have no words, or an empty one")
    first = {begin: i for i, begin in enumerate(sentence.starts)}
    ends = zip(sentence.starts, sentence.words, strict=True)
    behind = {begin + len(word): i + 1 for i, (begin, word) in enumerate(ends)}
    found: list[Entity] = []
    for span in spans:
        begin, end, label = _span(span, where)
        if not 0 <= begin < end <= len(text):
            return how.drop(where, "have a span that is outside of the text, or empty")
        bare = text[begin:end].strip()
        if bare != text[begin:end]:
            how.trimmed.append(where)
            begin = text.index(bare, begin) if bare else end
            end = begin + len(bare)
        if begin not in first or end not in behind:
            return how.drop(where, "have a span that begins or ends inside a word, or is blank")
        found.append((first[begin], behind[end], label))
    found.sort()
    if any(a[1] > b[0] for a, b in pairwise(found)):
        return how.drop(where, "have spans that overlap")
    tags = tuple(map(sys.intern, tags_of(found, len(sentence.words))))
    return Sentence(sentence.words, tags, sentence.line, sentence.file, text, sentence.starts)


def _span(span: object, where: str) -> Entity:
    if isinstance(span, dict):
        span = [span.get(name) for name in ("start", "end", "label")]
    match span:
        case [int(begin), int(end), str(label)] if label.strip():
            return begin, end, label.strip()
    expected = 'spans {"start": 0, "end": 2, "label": "x"} or [0, 2, "x"]'
    raise InputError(f"{where}: expected {expected}, got {show(span)}: correct it")
