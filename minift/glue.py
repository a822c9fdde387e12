"""The files of GLUE and SuperGLUE as they are published, and the metrics that their tasks have.

GLUE: Wang et al. 2018, https://arxiv.org/abs/1804.07461, table 1; SuperGLUE: Wang et al. 2019,
https://arxiv.org/abs/1905.00537, table 1. Tables are TSV without quoting.
"""

import difflib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from .config import RunConfig
from .data import Drop, Row, one_label
from .errors import InputError
from .readers import JSON, Path, empty, ending_of, opened_lines, opened_records, shown_path, wrong
from .squad import Found, read_record

Object = dict[str, object]
Cells = tuple[object, object, object, object]  # text, pair, label and id
ABSENT = object()  # a label that the file does not have; null is something


@dataclass(frozen=True)
class Named:
    """A task of GLUE or SuperGLUE."""

    # The columns of text, pair, label and id in a table; "" for none.
    columns: tuple[str, str, str, str] | None = None
    objects: Callable[[Object], Iterator[Cells]] | None = None  # what an object of JSON holds
    metric: str = "accuracy"  # the first that the paper names; f1/1 is that of the positives
    task: str = "classification"


def _fields(text: str, pair: str) -> Callable[[Object], Iterator[Cells]]:
    def cells(record: Object) -> Iterator[Cells]:
        yield record[text], record[pair], record.get("label", ABSENT), record.get("idx")

    return cells


def _copa(record: Object) -> Iterator[Cells]:
    asked = {"cause": "What was the cause?", "effect": "What was the effect?"}
    text = f"{_words(record['premise'])} {asked[record['question']]}"
    pair = f"1: {_words(record['choice1'])} 2: {_words(record['choice2'])}"
    yield text, pair, record.get("label", ABSENT), record.get("idx")


def _multirc(record: Object) -> Iterator[Cells]:
    passage = record["passage"]
    for question in passage["questions"]:
        text = f"{_words(passage['text'])} {_words(question['question'])}"
        for answer in question["answers"]:
            parts = (part.get("idx") for part in (record, question, answer))
            name = "-".join(str(part) for part in parts if part is not None)
            yield text, answer["text"], answer.get("label", ABSENT), name or None


def _wic(record: Object) -> Iterator[Cells]:
    text = f"{_words(record['word'])}: {_words(record['sentence1'])}"
    yield text, record["sentence2"], record.get("label", ABSENT), record.get("idx")


def _wsc(record: Object) -> Iterator[Cells]:
    target = record["target"]
    pair = f"{_words(target['span2_text'])}: {_words(target['span1_text'])}"
    yield record["text"], pair, record.get("label", ABSENT), record.get("idx")


_PREMISE = _fields("premise", "hypothesis")
TWO = "sentence1", "sentence2"
NAMED = {
    "cola": Named(("sentence", "", "label", "index"), metric="mcc"),
    "sst2": Named(("sentence", "", "label", "index")),
    "mrpc": Named(("#1 String", "#2 String", "Quality", "index"), metric="f1/1"),
    "stsb": Named((*TWO, "score", "index"), metric="pearson", task="regression"),
    "qqp": Named(("question1", "question2", "is_duplicate", "id"), metric="f1/1"),
    "mnli": Named((*TWO, "gold_label", "index")),
    "qnli": Named(("question", "sentence", "label", "index")),
    "rte": Named((*TWO, "label", "index"), _PREMISE),
    "wnli": Named((*TWO, "label", "index")),
    "boolq": Named(None, _fields("question", "passage")),
    "cb": Named(None, _PREMISE, "f1"),
    "copa": Named(None, _copa),
    "multirc": Named(None, _multirc, "f1/1"),
    "wic": Named(None, _wic),
    "wsc": Named(None, _wsc),
    "axb": Named(None, _fields(*TWO), "mcc"),
    "axg": Named(None, _PREMISE),
    "record": Named(metric="f1", task="qa"),  # see `squad.read_record`
}


def named_task(name: str) -> Named:
    """The task of a name; "SST-2" and "sst2" are the same.

    Raises:
        InputError: there is none of that name.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    if plain in NAMED:
        return NAMED[plain]
    close = difflib.get_close_matches(plain, NAMED, n=1)
    known = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(NAMED)}"
    raise InputError(f"expected a task_name of GLUE or SuperGLUE, got {name!r}: {known}")


def as_named(run: RunConfig) -> RunConfig:
    """The settings of a run with what its `task_name` says: the task, and the metric that the best
    model is chosen by, unless another is given.

    Raises:
        InputError: the name is unknown, or another setting says something else.
    """
    if not run.task_name:
        return run
    named = named_task(run.task_name)
    if run.task not in ("classification", named.task):
        raise InputError(f"--task_name {run.task_name} is {named.task}, got --task {run.task}")
    for column in ("text_column", "pair_column", "label_column", "id_column"):
        if getattr(run, column):
            raise InputError(f"--{column} is not read with --task_name: leave one of them out")
    metric = run.metric_for_best_model or named.metric
    return replace(run, task=named.task, metric_for_best_model=metric)


def glue_rows(
    path: Path,
    name: str,
    labelled: bool = True,
    drop: Drop | None = None,
    parse: Callable[[object], Hashable] = one_label,
) -> Iterator[Row]:
    """The rows of a file of GLUE (TSV) or SuperGLUE (JSON lines), one by one.

    Args:
        path: the file, as it was published.
        name: of the task.
        labelled: whether every row must have a label, which those of a test lack.
        drop: as for `data.read_rows`; rows with too few fields, as QQP has some, are told of too.
        parse: a label from what stands in the file.

    Raises:
        InputError: the name is unknown, or the file is not one of that task.
    """
    task, json = named_task(name), ending_of(path) in JSON
    if task.task == "qa":
        raise InputError(f"--task_name {name} is qa, and the model's task is not")
    if (task.objects if json else task.columns) is None:
        expected = "a file of JSON lines (.jsonl)" if task.columns is None else "a table (.tsv)"
        raise wrong(shown_path(path), expected, f"another of {name}", "name the published file")
    records = _objects(path, task) if json else _table(path, task, name, labelled)
    nothing = True
    for line, cells in records:
        nothing, where = False, f"{shown_path(path)}:{line}"
        text, pair, label, row_id = cells or (None,) * 4
        if not isinstance(text, str) or not isinstance(pair, str | None):
            _lose(where, f"the fields of {name}", drop)
            continue
        try:
            label = None if label is ABSENT and not labelled else parse(label)
        except ValueError as error:
            if labelled:
                _lose(where, str(error), drop)
                continue
            label = None
        shown = None if row_id is None else str(row_id)
        yield Row(text, pair, label, line, None, shown)
    if nothing:
        raise empty(shown_path(path))


def glue_questions(path: Path, name: str, labelled: bool = True) -> Iterator[Found]:
    """The questions of a file of SuperGLUE, one by one, or what cannot be used of it.

    Args:
        path: the file, as it was published.
        name: of the task.
        labelled: whether every question must have an answer, which those of a test lack.

    Raises:
        InputError: the name is not that of a task of questions, or the file is not one of it.
    """
    if named_task(name).task != "qa":
        raise InputError(f"--task_name {name} is {named_task(name).task}, and the model's task qa")
    yield from read_record(path, labelled)


def _lose(where: str, wanted: str, drop: Drop | None) -> None:
    if drop is None:
        raise wrong(where, wanted, "none", "mend or remove the row")
    drop(where, f"without {wanted}")


def _objects(path: Path, task: Named) -> Iterator[tuple[int, Cells | None]]:
    """None for an object that lacks something."""
    with opened_records(path) as records:
        for line, record in records:
            try:
                found = list(task.objects(record))
            except (KeyError, TypeError, AttributeError):
                found = [None]
            for cells in found:
                yield line, cells


def _table(
    path: Path, task: Named, name: str, labelled: bool
) -> Iterator[tuple[int, Cells | None]]:
    """None for a row with another number of fields than the header."""
    with opened_lines(path) as lines:
        split = ((n, line.rstrip("\r\n").split("\t")) for n, line in enumerate(lines, 1))
        records = ((n, fields) for n, fields in split if any(map(str.strip, fields)))
        first_line, first = next(records, (1, []))
        if not first:
            return
        header, rest = [field.strip() for field in first], []
        if task is NAMED["cola"] and "sentence" not in header:  # of which test.tsv alone has one
            header, rest = ["source", "label", "star", "sentence"], [(first_line, first)]
        text, pair, label, row_id = task.columns
        for column in filter(None, (text, pair, label if labelled else "")):
            if column not in header:
                where = f"{shown_path(path)}:{first_line}"
                got = ", ".join(header)[:200]
                raise wrong(where, f"a column {column!r} of {name}", got, "name a published file")
        wanted = [header.index(c) if c in header else None for c in (text, pair, label, row_id)]
        missing = None, None, ABSENT, None
        for line, fields in chain(rest, records):
            fits = len(fields) == len(header)
            cells = (no if i is None else fields[i] for i, no in zip(wanted, missing, strict=True))
            yield line, tuple(cells) if fits else None


def _words(value: object) -> str:
    """A text of JSON.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(value)
    return value
