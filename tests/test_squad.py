"""Files of questions: every layout, answers that are not where the file says, what is left out."""

import gzip
import json

import pytest

from minift.errors import InputError
from minift.squad import (
    ABSENT,
    BARE,
    BESIDE,
    BLANK,
    EMPTY,
    MISSING,
    OTHER,
    SEVERAL,
    Question,
    locate,
    read_questions,
    read_record,
)

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


PASSAGE = "Tracy Morgan is awake \u2013 and well.\n@highlight\nMorgan was hurt in New Jersey"
PLACES = {text: {"start": at, "end": at + len(text) - 1}  # `end` is the last character
          for text, at in (("Tracy Morgan", 0), ("Morgan", PASSAGE.rindex("Morgan")),
                           ("New Jersey", PASSAGE.index("New")))}  # fmt: skip
ENTITIES = list(PLACES.values())
RIGHT = [{**PLACES[text], "text": text} for text in ("Tracy Morgan", "Morgan")]


def record(*qas, **passage):
    """A line of ReCoRD as SuperGLUE publishes it."""
    passage = {"text": PASSAGE, "entities": ENTITIES} | passage
    return {"source": "Daily mail", "passage": passage, "qas": list(qas), "idx": 3}


def query(**more):
    return {"idx": 7, "query": "@placeholder is a comedian", "answers": RIGHT, **more}


def test_record_as_it_is_published(tmp_path):
    """`end` is an answer's last character; all answers are right, the first is trained on;
    entities are the choices, and a query is called what the file calls it."""
    path = written(tmp_path / "train.jsonl", record(query(), query(idx=8, answers=RIGHT[1:])))
    first, second = read_record(path)
    assert (first.id, first.question, first.context) == ("7", query()["query"], PASSAGE)
    assert first.answers == ("Tracy Morgan", "Morgan")
    assert (first.start, first.stop) == (0, 12)
    assert [PASSAGE[slice(*ends)] for ends in first.choices] == ["Tracy Morgan", "Morgan",
                                                                "New Jersey"]  # fmt: skip
    assert (second.id, second.answers, second.start) == ("8", ("Morgan",), PASSAGE.rindex("Morgan"))
    assert (second.line, second.where) == (1, f"{path}:1")


def test_record_of_a_test(tmp_path):
    """It has no answers, and is read to be answered; to be measured it is of no use."""
    asked = {"idx": 7, "query": "@placeholder is a comedian"}
    path = written(tmp_path / "test.jsonl", record(asked, {"query": "who is @placeholder ?"}))
    rows = list(read_record(path, labelled=False))
    assert [(row.id, row.answers, len(row.choices)) for row in rows] == [
        *[("7", None, 3), ("1.1", None, 3)]
    ]
    assert list(read_record(path)) == [(f"{path}:1", BARE)] * 2


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (record(query(answers=[])), BARE),
        (record(query(answers=[{"start": 0, "end": 10, "text": "Tracy Morgan"}])), BESIDE),
        (record(query(answers=[{"start": 1, "end": 12, "text": "Tracy Morgan"}])), BESIDE),
        (record(query(answers=[RIGHT[0], {**RIGHT[1], "text": "Tracy"}])), BESIDE),
        (record(query(answers=[{"start": 0, "end": len(PASSAGE), "text": PASSAGE}])), OTHER),
        (record(query(answers=[{"start": 5, "end": 4, "text": ""}])), OTHER),
        (record(query(answers=[{"start": -4, "end": 3, "text": "Trac"}])), OTHER),
        (record(query(answers=[{"start": 0, "text": "Tracy"}])), OTHER),
        (record(query(answers=["Morgan"])), OTHER),
        (record(query(query=" ")), OTHER),
        (record(query(query=None)), OTHER),
        (record(query(), text=5), OTHER),
        (record(query(), entities=[{"start": 0}]), OTHER),
        (record(query(), entities=None), OTHER),
        (record("who ?"), OTHER),
        ({"passage": {"text": PASSAGE}}, OTHER),
        ({"qas": [query()]}, OTHER),
    ],
)
def test_what_is_left_out_of_record(tmp_path, row, why):
    """With its place and a reason; the rows beside it stay."""
    path = written(tmp_path / "a.jsonl", record(query()), row, record(query(idx=9)))
    before, left_out, after = read_record(path)
    assert (before.id, left_out, after.id) == ("7", (f"{path}:2", why), "9")


def test_a_prediction_leaves_no_row_of_record_out(tmp_path):
    """So one that nothing can be asked of stops it; wrong answers are not looked at."""
    wrong = query(answers=[{"start": 1, "end": 2, "text": "x"}])
    path = written(tmp_path / "a.jsonl", record(wrong))
    assert [row.id for row in read_record(path, labelled=False)] == ["7"]
    path = written(tmp_path / "a.jsonl", record(wrong), record(query(query=None)))
    with pytest.raises(InputError, match=r"a\.jsonl:2: expected the fields of ReCoRD"):
        list(read_record(path, labelled=False))


def test_another_file_is_none_of_record(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("query\tpassage\n")
    with pytest.raises(InputError, match="expected a file of JSON lines"):
        list(read_record(path))
