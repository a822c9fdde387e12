"""Files of questions: every layout, answers that are not where the file says, what is left out."""

import gzip
import json

import pytest

from minift.errors import InputError
from minift.squad import ABSENT, BLANK, EMPTY, MISSING, SEVERAL, Question, locate, read_questions

CONTEXT = "In 1215 king John signed the charter of the king ."
JOHN = CONTEXT.index("John")


def nested(*qas, **more):
    return {**more, "data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}


def written(path, *objects, indent=None):
    path.write_text("".join(json.dumps(o, indent=indent) + "\n" for o in objects))
    return path


def flat(**more):
    return {"id": "q1", "question": "who ?", "context": CONTEXT, **more}


@pytest.mark.parametrize(
    "answer",
    [
        {"answers": {"text": ["John"], "answer_start": [JOHN]}},
        {"answers": [{"text": "John", "answer_start": JOHN}]},
        {"answer": "John", "answer_start": JOHN},
        {"answer": "John"},
    ],
)
def test_layouts_of_json_lines(tmp_path, answer):
    """Each says the same question."""
    (row,) = read_questions(written(tmp_path / "a.jsonl", flat(**answer)))
    assert (row.id, row.question, row.answers) == ("q1", "who ?", ("John",))
    assert row.context[row.start : row.stop] == "John"
    assert (row.repaired, row.where) == (False, f"{tmp_path / 'a.jsonl'}:1")


def test_squad_of_both_versions(tmp_path):
    """Pretty-printed or on one line, compressed or not; plausible answers are none."""
    who = {"id": "a", "question": "who ?", "answers": [{"text": "John", "answer_start": JOHN}]}
    none = {"id": "b", "question": "why ?", "is_impossible": True, "answers": []}
    none["plausible_answers"] = [{"text": "charter", "answer_start": 29}]
    for indent in (None, 2):
        path = written(tmp_path / "s.json", nested(who, none, version="v2.0"), indent=indent)
        packed = tmp_path / "s.json.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        for file in (path, packed):
            a, b = read_questions(file)
            assert (a.id, a.start, a.answers, a.where) == ("a", JOHN, ("John",), f"{file}:a")
            assert (b.id, b.answers) == ("b", ())


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [
        ("John", JOHN, JOHN),
        ("John", JOHN + 5, JOHN),
        ("John", JOHN - 5, JOHN),
        ("John", JOHN + 6, ABSENT),
        ("John", None, JOHN),
        ("king", None, SEVERAL),
        ("queen", None, MISSING),
        ("queen", 3, ABSENT),
        ("king", 41, 44),  # the nearer one
        ("In", -2, 0),
    ],
)
def test_where_an_answer_stands(text, start, found):
    """At most five characters beside where the file says, the nearest first."""
    assert locate(CONTEXT, text, start) == found


def test_what_is_left_out_is_named(tmp_path):
    """Every row is there: as a question, or as its place and a reason."""
    rows = [
        flat(answer="John", answer_start=JOHN + 2),
        flat(answer="queen"),
        flat(answer=" "),
        flat(question="", answer="John"),
        flat(answers={"text": [], "answer_start": []}),
        flat(answers={"text": ["queen", "John"], "answer_start": [0, JOHN]}),
    ]
    path = written(tmp_path / "a.jsonl", *rows)
    found = list(read_questions(path))
    assert found[0].repaired
    assert found[1:4] == [(f"{path}:{i}", why) for i, why in ((2, MISSING), (3, EMPTY), (4, BLANK))]
    assert found[4].answers == ()
    assert (found[5].answers, found[5].start) == (("queen", "John"), JOHN)
    every = list(read_questions(path, labelled=False))
    assert all(isinstance(row, Question) and row.answers is None for row in every)
    assert len(every) == len(rows)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"question": "who ?", "answer": "John"}, "a text 'context'"),
        ({**flat(), "question": 3}, "a text 'question'"),
        (flat(), "expected answers, got nothing"),
        (flat(answers=["John"]), "expected answers, got a list"),
        (flat(answers={"text": ["John"], "answer_start": ["7"]}), "expected answers"),
    ],
)
def test_mistakes_are_one_line_with_their_place(tmp_path, row, part):
    path = written(tmp_path / "a.jsonl", flat(answer="John"), row)
    with pytest.raises(InputError, match=r"a\.jsonl:2: ") as error:
        list(read_questions(path))
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_damaged_squad(tmp_path):
    """Cut off, or a list that is none."""
    whole = json.dumps(nested())
    for text in (whole[:-3], '{"data": [{"paragraphs": 3}]}'):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(InputError, match="SQuAD"):
            list(read_questions(tmp_path / "s.json"))
