"""Files of GLUE and SuperGLUE, laid out as they are published, in; rows out."""

import json

import pytest

from minift.config import RunConfig
from minift.errors import InputError
from minift.glue import NAMED, as_named, glue_questions, glue_rows

LAYOUTS = {  # name -> header, a row, and what it is
    "sst2": ("sentence\tlabel", 'a "fine film\t1', ('a "fine film', None, "1", None)),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\t"a\tb',
             ('"a', "b", "1", None)),
    "stsb": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\t"
             "score", "3\tg\tf\ty\t1\ts\tt\ta\tb\t2.5", ("a", "b", "2.5", "3")),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "9\t1\t2\ta\tb\t0",
            ("a", "b", "0", "9")),
    "mnli": ("index\tpromptID\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label",
             "0\tp\ta\tb\tneutral\tneutral\tentailment", ("a", "b", "entailment", "0")),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\ta?\tb\tnot_entailment",
             ("a?", "b", "not_entailment", "0")),
    "rte": ("index\tsentence1\tsentence2\tlabel", "5\ta\tb\tentailment",
            ("a", "b", "entailment", "5")),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "5\ta\tb\t1", ("a", "b", "1", "5")),
}  # fmt: skip
OBJECTS = {  # name -> an object, and its rows
    "boolq": ({"question": "q", "passage": "p", "idx": 0, "label": True},
              [("q", "p", "true", "0")]),
    "cb": ({"premise": "p", "hypothesis": "h", "label": "neutral", "idx": 1},
           [("p", "h", "neutral", "1")]),
    "copa": ({"premise": "It rained.", "choice1": "x", "choice2": "y", "question": "cause",
              "label": 1, "idx": 2},
             [("It rained. What was the cause?", "1: x 2: y", "1", "2")]),
    "multirc": ({"idx": 3, "passage": {"text": "P.", "questions": [
                 {"question": "Q?", "idx": 4, "answers": [{"text": "a", "idx": 5, "label": 1},
                                                          {"text": "b", "idx": 6, "label": 0}]}]}},
                [("P. Q?", "a", "1", "3-4-5"), ("P. Q?", "b", "0", "3-4-6")]),
    "rte": ({"premise": "p", "hypothesis": "h", "label": "entailment"},
            [("p", "h", "entailment", None)]),
    "wic": ({"word": "place", "sentence1": "a", "sentence2": "b", "start1": 0, "label": False},
            [("place: a", "b", "false", None)]),
    "wsc": ({"text": "Mark told Pete.", "target": {"span1_text": "Mark", "span2_text": "he"},
             "label": False}, [("Mark told Pete.", "he: Mark", "false", None)]),
    "axb": ({"sentence1": "a", "sentence2": "b", "label": "entailment"},
            [("a", "b", "entailment", None)]),
    "axg": ({"premise": "p", "hypothesis": "h", "label": "entailment"},
            [("p", "h", "entailment", None)]),
}  # fmt: skip


def read(path, content: str, name: str, **options) -> list[tuple]:
    path.write_text(content, encoding="utf-8")
    return [(row.text, row.pair, row.label, row.id) for row in glue_rows(path, name, **options)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables(tmp_path, name):
    """A quote is a character; a test's file has no labels and is still read, to predict."""
    header, row, expected = LAYOUTS[name]
    path = tmp_path / "train.tsv"
    assert read(path, f"{header}\n{row}\r\n", name) == [expected]
    label = header.lstrip("\ufeff").split("\t").index(NAMED[name].columns[2])
    lines = [line.split("\t") for line in (header.lstrip("\ufeff"), row)]
    test = "".join("\t".join(f[:label] + f[label + 1 :]) + "\n" for f in lines)
    assert read(path, test, name, labelled=False) == [(*expected[:2], None, expected[3])]
    with pytest.raises(InputError, match=rf"train.tsv:1: expected a column .* of {name}"):
        read(path, test, name)


def test_cola_has_a_header_in_its_test_alone(tmp_path):
    path = tmp_path / "a.tsv"
    train = "gj04\t1\t\tOur friends won't.\ngj04\t0\t*\tThey drank.\n"
    assert read(path, train, "CoLA") == [("Our friends won't.", None, "1", None),
                                         ("They drank.", None, "0", None)]  # fmt: skip
    test = "index\tsentence\n4\tBill whistled.\n"
    assert read(path, test, "cola", labelled=False) == [("Bill whistled.", None, None, "4")]


def test_the_first_file_of_mrpc_is_a_txt(tmp_path):
    header, row, expected = LAYOUTS["mrpc"]
    path = tmp_path / "msr_paraphrase_train.txt"
    assert read(path, f"{header}\n{row}\n", "MRPC") == [expected]


@pytest.mark.parametrize("name", OBJECTS)
def test_objects(tmp_path, name):
    record, expected = OBJECTS[name]
    assert read(tmp_path / "a.jsonl", json.dumps(record) + "\n", name) == expected


def test_objects_without_labels(tmp_path):
    """A test's; where labels are needed, each is dropped."""
    line, told = '{"question": "q", "passage": "p", "idx": 0}\n{"question": 5, "passage": "p"}', []
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=r"a.jsonl:2: expected the fields of boolq"):
        read(path, line, "boolq", labelled=False)
    drop = lambda *row: told.append(row)  # noqa: E731
    assert read(path, line, "boolq", labelled=False, drop=drop) == [("q", "p", None, "0")]
    assert read(path, line, "boolq", drop=drop) == []
    assert [why for _, why in told] == [
        *["without the fields of boolq", "without a label", "without the fields of boolq"]
    ]


def test_rows_that_are_cut_short_are_dropped(tmp_path):
    """QQP's published rows have too few fields here and there."""
    header, row, expected = LAYOUTS["qqp"]
    content, told = f"{header}\n9\t1\ta\n{row}\n", []
    path = tmp_path / "train.tsv"
    assert read(path, content, "qqp", drop=lambda *row: told.append(row)) == [expected]
    assert told == [(f"{path}:2", "without the fields of qqp")]
    with pytest.raises(InputError, match=r"train.tsv:2: expected the fields of qqp"):
        read(path, content, "qqp")


def test_files_of_another_kind(tmp_path):
    with pytest.raises(InputError, match="expected a file of JSON lines"):
        read(tmp_path / "a.tsv", "x\ty\n", "boolq")
    with pytest.raises(InputError, match="expected a table"):
        read(tmp_path / "a.jsonl", "{}\n", "cola")
    with pytest.raises(InputError, match="--task_name record is qa"):
        read(tmp_path / "a.jsonl", "{}\n", "record")
    with pytest.raises(InputError, match="--task_name rte is classification"):
        list(glue_questions(tmp_path / "a.jsonl", "rte"))
    for content in ("", "sentence\tlabel\n"):
        with pytest.raises(InputError, match="an empty file"):
            read(tmp_path / "a.tsv", content, "sst2")


def test_a_name_settles_what_is_not_given():
    run = as_named(RunConfig(task_name="STS-B"))
    assert (run.task, run.metric_for_best_model) == ("regression", "pearson")
    run = as_named(RunConfig(task_name="mrpc", metric_for_best_model="accuracy"))
    assert (run.task, run.metric_for_best_model) == ("classification", "accuracy")
    run = as_named(RunConfig(task_name="ReCoRD"))
    assert (run.task, run.metric_for_best_model) == ("qa", "f1")
    assert as_named(RunConfig(task="lm")) == RunConfig(task="lm")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"task_name": "boolqq"}, "got 'boolqq': did you mean 'boolq'?"),
        ({"task_name": "zzz"}, "choose one of cola, sst2"),
        ({"task_name": "record", "task": "tagging"}, "is qa, got --task tagging"),
        ({"task_name": "rte", "task": "lm"}, "is classification, got --task lm"),
        ({"task_name": "rte", "text_column": "a"}, "--text_column is not read with --task_name"),
    ],
)
def test_what_does_not_fit_a_name(given, parts):
    with pytest.raises(InputError) as caught:
        as_named(RunConfig(**given))
    assert parts in str(caught.value)
