"""Few rows: what is warned of before the run, and that it runs all the same."""

import json

import pytest
from tiny import call, rows, settings_kept, tiny_model, write_rows

from minift.balance import rare
from minift.config import RunConfig, TrainConfig
from minift.data import Row
from minift.prepare import little
from minift.tagged import Sentence
from minift.tasks.multilabel import MultiLabel
from minift.tasks.tagging import Tagging
from minift.tokenizer import Tokenizer


def warned(judged=100, epoch=10, task="classification", eval_steps=0, **config):
    """Texts of `little`, none of which is loud."""
    run = RunConfig(task=task, eval_steps=eval_steps)
    said = list(little(run, TrainConfig(**config), judged, epoch))
    assert not any(notice.loud for notice in said)
    return [notice.text for notice in said]


def test_a_run_of_few_steps_is_warned_of():
    """Below 20, unless it is what is asked for."""
    (text,) = warned(epoch=6, num_train_epochs=3.0)
    assert "18 optimizer steps" in text
    assert "--max_steps" in text
    assert "has 1 optimizer step," in warned(epoch=1, num_train_epochs=1.0)[0]
    assert not warned(max_steps=1)
    assert not warned(epoch=7, num_train_epochs=3.0)


def test_few_validation_rows_are_warned_of():
    """Below 20; not of running text, whose rows are many targets each."""
    (text,) = warned(judged=19)
    assert "19 validation rows" in text
    assert "--validation_file" in text
    assert not warned(judged=20)
    assert not warned(judged=1, task="lm")


def test_evaluations_after_every_other_step_are_warned_of():
    """Where an epoch has one or two steps and eval_steps says nothing else."""
    (text,) = warned(epoch=2, max_steps=61)
    assert "an epoch has 2 steps: 31 evaluations" in text
    assert "--eval_steps" in text
    assert not warned(epoch=3, max_steps=60)
    assert not warned(epoch=1, max_steps=60, eval_steps=20)


def test_eight_rows_train_end_to_end(capsys, tmp_path):
    """Without a validation file: rows of both labels are kept for it; it is said that it is few,
    and that the steps are."""
    model = tiny_model(tmp_path / "bert")
    data = write_rows(tmp_path / "train.csv", 8)
    given = ["train", "--model", model, "--train", data, "--output", tmp_path / "out"]
    with settings_kept():
        result = call(capsys, *given, "--threads", 1, "--validation_split", 0.25)
    assert result.status == 0, result.err
    assert "3 optimizer steps" in result.err
    assert "2 validation rows say little" in result.err
    assert result.summary["eval_n"] == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {
        "0": "neg",
        "1": "pos",
    }


@pytest.mark.parametrize(
    ("common", "seldom", "total", "warns"),
    [
        (100, 9, 200, True),  # fewer than ten
        (100, 10, 200, False),
        (1000, 19, 2000, True),  # less than 1 %
        (1000, 20, 2000, False),
        (80, 9, 100, False),  # few, but so are the others
    ],
)
def test_rare_labels_are_named(common, seldom, total, warns):
    """Both limits, from both sides."""
    said = list(rare(["a"] * common + ["b"] * seldom, total, "rows"))
    assert bool(said) == warns
    for notice in said:
        assert notice.loud
        assert f"1 of 2 labels are rare in {total:,} training rows ('b' {seldom}" in notice.text
        assert "--class_weights balanced" in notice.text


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.load(tiny_model(tmp_path / "bert"), 32)


def said_of(task, train, tokenizer):
    """Notices of rare labels."""
    examples = {"train": []}
    said = [notice.text for notice in task.strange({"train": train}, examples, tokenizer)]
    return [text for text in said if "rare" in text]


def test_rare_labels_of_many_are_warned_of(tokenizer):
    """If no row has it ten times, and nothing is done about it."""
    labels = [("x", "y")] * 3 + [("x",)] * 37
    train = [Row(text, None, label) for (text, _), label in zip(rows(40), labels, strict=True)]
    (text,) = said_of(MultiLabel(("x", "y")), train, tokenizer)
    assert "40 training rows ('y' 3; 'x' 40)" in text
    assert not said_of(MultiLabel(("x", "y"), (1.0, 9.0)), train, tokenizer)
    assert not said_of(MultiLabel(("x", "y")), train[:3], tokenizer)


def test_rare_entities_and_tags_are_warned_of(tokenizer):
    """Entities are counted, not their words and not O; of plain tags words."""
    tags = [("B-a", "I-a", "O")] * 30 + [("B-b", "I-b", "O")] * 3
    train = [Sentence(("saw", "the", "film"), t, 1) for t in tags]
    labels = ("O", "B-a", "I-a", "B-b", "I-b")
    (text,) = said_of(Tagging(labels), train, tokenizer)
    assert "1 of 2 labels are rare in 33 training entities ('b' 3; 'a' 30)" in text
    assert not said_of(Tagging(labels, class_weights=(1.0,) * 5), train, tokenizer)
    assert not said_of(Tagging(labels), train[:29] + train[30:], tokenizer)
    tags = [("v", "n")] * 30 + [("x", "n")] * 3
    plain = [Sentence(("saw", "film"), t, 1) for t in tags]
    (text,) = said_of(Tagging(("n", "v", "x")), plain, tokenizer)
    assert "1 of 3 labels are rare in 66 training words ('x' 3; 'n' 33)" in text
