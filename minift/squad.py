"""Questions about a context: SQuAD's JSON, JSON lines of one question each, and ReCoRD's.

    {"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers"}]}]}]}
    {"id": ..., "question": ..., "context": ..., "answers": {"text": [...], "answer_start": [...]}}
    {"question": ..., "context": ..., "answers": [{"text": ..., "answer_start": ...}]}
    {"question": ..., "context": ..., "answer": ..., "answer_start": ...}
    {"passage": {"text", "entities"}, "qas": [{"idx", "query", "answers"}]}            ReCoRD

No answers: the context holds none. An answer without a start is looked for. A line of JSON lines is
read at a time; SQuAD's JSON is one document, which is read whole.
"""

import gzip
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .readers import JSON, Path, ending_of, kind_of, opened, opened_records, shown_path, wrong

NEAR = 5  # characters that an answer may stand away from where the file says
HEAD = 4096  # bytes that show whether a file is SQuAD's JSON
ABSENT = "have an answer that is not where they say"
SEVERAL = "have an answer that occurs several times, and no answer_start"
MISSING = "have an answer that is not in the context"
BLANK = "have no question or no context"
EMPTY = "have an empty answer"
BESIDE = "have an answer that is not the text from its start to its end"
BARE = "have no answer"
OTHER = "lack fields of ReCoRD, or have others in them"


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A question, its context, and where an answer stands."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...] | None  # right ones; (): there is none; None: nobody says
    start: int = -1  # first character of an answer in the context
    stop: int = -1  # behind its last one
    line: int = 0
    file: str = ""
    where: str = ""  # file:line, or file:id
    repaired: bool = False  # the file said another start
    choices: tuple[tuple[int, int], ...] = ()  # characters of what alone may be answered; (): any

    @property
    def text(self) -> str:
        """The question, as it tells a row from others."""
        return self.question

    @property
    def pair(self) -> str:
        """The context, likewise."""
        return self.context


Found = Question | tuple[str, str]  # or what cannot be used: where, and why


def read_questions(path: Path, id_key: str = "", labelled: bool = True) -> Iterator[Found]:
    """The questions of a file, one after the other.

    Args:
        path: .json as SQuAD has it; or .json, .jsonl or .ndjson of a question a line; or .gz.
        id_key: what holds a question's name in JSON lines; "": "id", or the line's number.
        labelled: to measure. Else answers are not looked at, and none is left out.

    Raises:
        InputError: the file is not as it should be.
    """
    file = shown_path(path)
    if os.path.isdir(path) or ending_of(path) not in JSON:
        todo = "convert or name the file"
        raise wrong(file, f"a file {' '.join(JSON)} of questions", "another", todo)
    if _is_nested(path):
        for where, raw in _nested(path, file):
            yield _question(raw, 1, file, where, labelled)
        return
    with opened_records(path) as records:
        for line, raw in records:
            where = f"{file}:{line}"
            if id_key and id_key not in raw:
                raise wrong(where, f"a key {id_key!r}", str(list(raw)), "change --id_column")
            named = {"id": raw.get(id_key or "id", str(line))}
            yield _question({**raw, **named}, line, file, where, labelled)


def read_record(path: Path, labelled: bool = True) -> Iterator[Found]:
    """The queries of a file of ReCoRD (Zhang et al. 2018, arXiv:1810.12885) as SuperGLUE publishes
    it: a passage a line, with the entities that answers are chosen from.

    A query is asked as it stands, its "@placeholder" for the entity that it lacks; the passage too,
    with "@highlight" before each of the sentences that end it, since the file counts its characters
    so. Of several places of an answer, which are all right, the first is trained on.

    Args:
        path: .jsonl.
        labelled: to measure. Else answers are not looked at, as a test has none.

    Raises:
        InputError: the file is not as it should be; or a row is not, and `labelled` is not set.
    """
    file = shown_path(path)
    if os.path.isdir(path) or ending_of(path) not in JSON:
        raise wrong(file, "a file of JSON lines (.jsonl) of ReCoRD", "another", "name that file")
    with opened_records(path) as records:
        for line, raw in records:
            queries = raw.get("qas")
            for n, query in enumerate(queries if isinstance(queries, list) else [None]):
                try:
                    found = _query(raw["passage"], query, f"{line}.{n}", line, file, labelled)
                except (KeyError, TypeError, ValueError):
                    found = f"{file}:{line}", OTHER
                if not labelled and isinstance(found, tuple):
                    raise wrong(found[0], "the fields of ReCoRD", "others", "mend or remove it")
                yield found


def locate(context: str, text: str, start: int | None) -> int | str:
    """Where an answer stands, or why that cannot be said.

    Args:
        context: what holds it.
        text: the answer.
        start: where the file says it begins; None: it does not.
    """
    if start is None:
        at = context.find(text)
        return MISSING if at < 0 else at if context.find(text, at + 1) < 0 else SEVERAL
    near = sorted(range(max(0, start - NEAR), start + NEAR + 1), key=lambda at: abs(at - start))
    return next((at for at in near if context.startswith(text, at)), ABSENT)


def _is_nested(path: Path) -> bool:
    with opened(path) as stream:
        raw = gzip.GzipFile(fileobj=stream) if str(path).lower().endswith(".gz") else stream
        head = raw.read(HEAD).decode(errors="replace").lstrip("\ufeff")
    return re.match(r'\s*\{\s*("version"\s*:\s*[^{},]*,\s*)?"data"\s*:\s*\[', head) is not None


def _nested(path: Path, file: str) -> Iterator[tuple[str, dict]]:
    with opened(path) as stream:
        raw = gzip.GzipFile(fileobj=stream) if str(path).lower().endswith(".gz") else stream
        data = raw.read()
    try:
        articles = json.loads(data.decode("utf-8-sig"))["data"]
    except (ValueError, RecursionError) as error:
        raise wrong(file, "SQuAD's JSON", str(error), "fetch or write it again") from None
    for i, article in enumerate(articles):
        for paragraph in _list(article, "paragraphs", f"{file}: data[{i}]"):
            for raw in _list(paragraph, "qas", f"{file}: data[{i}]"):
                if not isinstance(raw, dict):
                    raise wrong(f"{file}: data[{i}]", "questions in qas", kind_of(raw), "mend it")
                context = paragraph.get("context")
                yield f"{file}:{raw.get('id', '?')}", {**raw, "context": context}


def _list(value: object, key: str, where: str) -> list:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise wrong(where, f"a list {key!r} as SQuAD has it", kind_of(found), "mend the file")
    return found


def _question(raw: dict, line: int, file: str, where: str, labelled: bool) -> Found:
    texts = [raw.get(key) for key in ("question", "context")]
    for key, value in zip(("question", "context"), texts, strict=True):
        if not isinstance(value, str | None) or key not in raw:
            raise wrong(where, f"a text {key!r}", kind_of(value), "mend or remove the row")
    question, context = (text or "" for text in texts)
    name = raw.get("id")
    name = str(line) if name is None else str(name)
    bare = Question(name, question, context, None, line=line, file=file, where=where)
    if not labelled:
        return bare
    if not question.strip() or not context.strip():
        return where, BLANK
    answers = _answers(raw, where)
    if not answers:
        return Question(name, question, context, (), line=line, file=file, where=where)
    if not all(text.strip() for text, _ in answers):
        return where, EMPTY
    found = [locate(context, text, start) for text, start in answers]
    at = next((i for i, start in enumerate(found) if isinstance(start, int)), None)
    if at is None:
        return where, found[0]
    (text, said), start = answers[at], found[at]
    every = tuple(dict.fromkeys(text for text, _ in answers))
    ends = start, start + len(text)
    repaired = said is not None and said != start
    return Question(name, question, context, every, *ends, line, file, where, repaired)


def _query(passage: dict, raw: dict, nameless: str, line: int, file: str, labelled: bool) -> Found:
    """A query of ReCoRD.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or is none of ReCoRD's.
    """
    context, query, where = passage["text"], raw["query"], f"{file}:{line}"
    if not (isinstance(context, str) and isinstance(query, str) and query.strip()):
        raise TypeError(context, query)
    choices = tuple(dict.fromkeys(_ends(entity, context) for entity in passage["entities"]))
    name = nameless if raw.get("idx") is None else str(raw["idx"])
    asked = Question(name, query, context, None, line=line, file=file, where=where, choices=choices)
    if not labelled:
        return asked
    if not (answers := raw.get("answers")):
        return where, BARE
    places = [_ends(answer, context) for answer in answers]
    texts = [answer["text"] for answer in answers]
    if texts != [context[start:stop] for start, stop in places]:
        return where, BESIDE
    start, stop = places[0]
    return replace(asked, answers=tuple(dict.fromkeys(texts)), start=start, stop=stop)


def _ends(raw: dict, text: str) -> tuple[int, int]:
    """The first character of a place of ReCoRD, and the one behind its last: `end` is the last.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    start, end = raw["start"], raw["end"]
    if not (type(start) is type(end) is int and 0 <= start <= end < len(text)):
        raise ValueError(raw)
    return start, end + 1


def _answers(raw: dict, where: str) -> list[tuple[str, int | None]]:
    """(text, start or None) of each answer."""
    answers = raw.get("answers")
    if raw.get("is_impossible") is True:
        return []
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if isinstance(texts, list) and starts is None:
            starts = [None] * len(texts)
        same = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
        answers = list(zip(texts, starts, strict=True)) if same else None
    elif isinstance(answers, list):
        whole = all(isinstance(a, dict) for a in answers)
        answers = [(a.get("text"), a.get("answer_start")) for a in answers] if whole else None
    elif isinstance(raw.get("answer"), str):
        answers = [(raw["answer"], raw.get("answer_start"))]
    fits = answers is not None and all(
        isinstance(text, str) and (start is None or type(start) is int) for text, start in answers
    )
    if not fits:
        todo = 'write {"text": [...], "answer_start": [...]}, with empty lists for no answer'
        raise wrong(where, "answers", kind_of(raw.get("answers", raw.get("answer"))), todo)
    return answers
