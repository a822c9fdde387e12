"""minift/tasks/multilabel.py: sets of labels, their loss, and a run from files to predictions."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import assert_one_line, call, rows, settings_kept, tiny_model, words
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minift.batch import Example, collate
from minift.config import RunConfig, TrainConfig
from minift.data import Row
from minift.errors import InputError
from minift.ops import TORCH
from minift.saving import load
from minift.tasks.multilabel import MultiLabel, sigmoid
from minift.tasks.task import Setup
from minift.weights import read_config

FLAGS = ("--task", "multilabel", "--max_steps", 6, "--save_steps", 2, "--eval_steps", 2)


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


def write(path, n):
    """Whether a text is good, whether it is of a film; some are neither."""
    answers = [
        (text, [x for x, there in (("good", label == "pos"), ("film", "film" in text)) if there])
        for text, label in rows(n)
    ]
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": f"{text}.", "labels": x}) for text, x in answers]
    else:
        lines = ["text,labels", *(f"{text},{'|'.join(x)}" for text, x in answers)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A model, train.csv of 36 rows (a last batch of 4), validation.jsonl of 12."""
    folder = tmp_path_factory.mktemp("multilabel")
    write(folder / "train.csv", 36)
    write(folder / "validation.jsonl", 12)
    tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="session")
def trained(files):
    from minift.cli import main

    flags = (*FLAGS, "--save_total_limit", 0, "--quiet")
    with settings_kept():
        assert main(words(files / "model", files, files / "out", *flags)) == 0
    return files / "out"


# ---------------------------------------------------------------- what stands in a file


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["b", "a", "b"], ("b", "a")),
        ([], ()),
        ("", ()),
        ("  ", ()),
        ("a", ("a",)),
        ("a, b ,c", ("a", "b", "c")),
        ("a|b, c", ("a", "b, c")),
        ("a; b,c;", ("a", "b,c")),
        ('["a, b", "c"]', ("a, b", "c")),
        ("['a', 'b']", ("a", "b")),
        ("[27, 3]", ("27", "3")),
        ("[not a list", ("[not a list",)),
        (7, ("7",)),
        ([1, True], ("1", "true")),
    ],
)
def test_labels_of_a_cell(value, labels):
    assert MultiLabel.parse(value) == labels


@pytest.mark.parametrize("value", [None, {"a": 1}, [["a"]], ["a", None], ["a", " "], 0.5, "[[1]]"])
def test_what_are_no_labels(value):
    with pytest.raises(ValueError, match=r"^a list of labels$"):
        MultiLabel.parse(value)


@settings(max_examples=30)
@given(st.lists(st.sets(st.sampled_from("abcdef")).map(tuple), min_size=3, max_size=30),
       st.integers(0, 5))  # fmt: skip
def test_the_split_leaves_no_label_to_the_validation_rows_alone(labels, seed):
    """It is a function of the seed, keeps the order, and loses nothing."""
    rows = [Row("a text", None, x, i) for i, x in enumerate(labels)]
    run = RunConfig(validation_split=0.3)
    try:
        train, validation, how = MultiLabel.split(rows, run, seed)
    except InputError:  # every row that was drawn has a label of its own
        return
    assert (train, validation, how) == MultiLabel.split(rows, run, seed)
    known = {name for row in train for name in row.label}
    assert validation
    assert all(known.issuperset(row.label) for row in validation)
    assert how.startswith(f"{len(validation)} of the training rows")
    lines = [[row.line for row in part] for part in (train, validation)]
    assert lines == list(map(sorted, lines))
    assert sorted(lines[0] + lines[1]) == list(range(len(rows)))


def test_labels_that_one_row_has_cannot_be_split():
    rows = [Row("a text", None, (label,), i) for i, label in enumerate("abc")]
    with pytest.raises(InputError, match=r"too few rows of each label .* give --validation_file"):
        MultiLabel.split(rows, RunConfig(validation_split=0.3), 0)


def test_no_label_at_all_teaches_nothing():
    with pytest.raises(InputError, match=r"a\.csv: expected labels, no row has one"):
        MultiLabel.labels_of([Row("x", None, (), 2)], RunConfig(train_file="a.csv"))


def test_balanced_weights_are_rows_without_over_rows_with():
    """A label that all rows have, or none, weighs as if one had it not, or one had it."""
    rows = [Row("x", None, x) for x in (("a", "c"), ("c",), ("b", "c"), ("b", "c"))]
    labels = ("a", "b", "c", "d")
    assert MultiLabel.weights("balanced", labels, rows) == (3, 1, 1 / 4, 4)
    assert MultiLabel.weights("b=2,a=0.5", ("a", "b"), rows) == (0.5, 2)


# ---------------------------------------------------------------- loss and threshold


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize(("count", "size"), [(5, 5), (3, 8)], ids=["full", "short"])
def test_loss_over_weight_is_torchs_mean(weights, count, size):
    """Empty sequences of a short batch are not counted, whatever their logits; the gradient too."""
    targets = np.random.default_rng(0).integers(0, 2, (count, 3), np.uint8)
    batch = collate([Example([2, 3], [0, 0], x) for x in targets], range(count), 0, True, size)
    logits = torch.randn(size, 3, generator=torch.Generator().manual_seed(0)) * 20
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    task = MultiLabel(("a", "b", "c"), weights)
    assert task.weight(batch) == count
    loss = task.loss(mine, batch, TORCH) / task.weight(batch)
    expected = F.binary_cross_entropy_with_logits(
        theirs[:count],
        torch.tensor(targets, dtype=torch.float32),
        pos_weight=None if weights is None else torch.tensor(weights),
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_metrics_loss_is_torchs_mean():
    """Of any logits, those of certain mistakes too."""
    targets = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    logits = np.array([[3, -1], [800, -0.1], [-800, 2]], np.float32)
    metrics = MultiLabel(("a", "b")).metrics(np.concatenate([targets, logits], 1))
    theirs = F.binary_cross_entropy_with_logits(*map(torch.tensor, (logits, targets)))
    assert metrics["loss"] == pytest.approx(theirs.item(), rel=1e-6)
    assert metrics["threshold"] == 0.5


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=5))
def test_sigmoid_is_torchs(x):
    np.testing.assert_allclose(sigmoid(np.array(x)), torch.tensor(x, dtype=torch.float64).sigmoid())


def test_a_threshold_is_chosen_only_where_none_is_given():
    outputs = np.array([[1, 0, -1, -2], [1, 0, -0.5, -3]], np.float32)  # all below 0.5
    chosen = MultiLabel(("a", "b"), tuning=True).tuned(outputs)
    assert sigmoid(np.float64(-2)) < chosen.threshold <= sigmoid(np.float64(-1))
    assert chosen.metrics(outputs)["f1"] == 1
    given = MultiLabel(("a", "b"), threshold=0.9)
    assert given.tuned(outputs) is given
    broken = np.full((1, 4), np.nan, np.float32)
    assert MultiLabel(("a", "b"), tuning=True).tuned(broken).threshold == 0.5


def test_the_likeliest_labels_are_shown():
    task = MultiLabel(("a", "b", "c"), threshold=0.3)
    answer = task.answer(np.array([0.0, 2.0, -4.0], np.float32), 2)
    assert answer == {"labels": ["b", "a"], "scores": {"b": 0.880797, "a": 0.5}}
    assert list(task.answer(np.array([-9.0, -9.0, -9.0]), 0)["scores"]) == ["a", "b", "c"]
    assert task.answer(np.array([-9.0, -9.0, -9.0]), 0)["labels"] == []


def test_a_model_that_gives_the_same_labels_to_all_is_told_of():
    task = MultiLabel(("a", "b"))
    always = task.metrics(np.array([[1, 0, 5, -5], [1, 1, 5, -5]]))
    assert "does not beat giving the same labels to every row" in task.verdict(always)
    right = task.metrics(np.array([[1, 0, 5, -5], [1, 1, 5, 5]]))
    assert task.verdict(right) == ""
    assert "f1 1.0000  macro 1.0000  exact match 1.0000" in task.headline(right)
    none = task.metrics(np.array([[0, 0, -5, -5], [0, 0, -5, 5]]))
    assert task.verdict(none) == "no row has a label: f1 is 0 whatever the model says"


# ---------------------------------------------------------------- the whole way


def test_a_run_learns_and_its_model_measures_and_predicts(capsys, trained, files):
    """The log has the metrics that `eval` finds with the threshold of config.json; transformers
    gives the same probabilities."""
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_f1"] > last["eval_constant_f1"]
    data = ("--data", files / "validation.jsonl")
    found = call(capsys, "eval", "--model", trained, *data, "--quiet").summary
    for name in ("eval_f1", "eval_threshold", "eval_exact_match", "eval_f1/film"):
        assert found[name] == pytest.approx(last[name]), name
    config = json.loads((trained / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["task_settings"] == {"threshold": last["eval_threshold"]}

    texts = [text for text, _ in rows(6)]
    model, tokenizer = load(trained)
    task = MultiLabel.trained(Setup(RunConfig(), TrainConfig(), model, tokenizer))
    theirs = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    encoded = AutoTokenizer.from_pretrained(trained)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = theirs(**encoded).logits.sigmoid().tolist()
    names = [theirs.config.id2label[i] for i in range(2)]
    answers = task.predict(model, tokenizer, [Row(text) for text in texts])
    for answer, text, line in zip(answers, texts, scores, strict=True):
        expected = dict(zip(names, line, strict=True))
        assert answer["text"] == text
        assert answer["scores"] == pytest.approx(expected, abs=2e-5)
        assert set(answer["labels"]) == {n for n, x in expected.items() if x >= task.threshold}


def test_a_folder_of_transformers_is_known_for_what_it_is(trained, tmp_path):
    """By its problem_type; without a threshold of ours it is 0.5, and a bad one is refused."""
    model, tokenizer = load(trained)
    raw = json.loads((trained / "config.json").read_text())
    del raw["task"], raw["task_settings"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert (config.task, config.settings) == ("multilabel", {})
    model.config = config
    setup = Setup(RunConfig(), TrainConfig(), model, tokenizer)
    assert MultiLabel.trained(setup).threshold == 0.5
    config.settings["threshold"] = "high"
    with pytest.raises(InputError, match=r"expected a threshold in \[0, 1\] .*, got 'high'"):
        MultiLabel.trained(setup)


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(capsys, trained, files, tmp_path):
    """From the middle of an epoch of 5 steps, to the bit."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    more = (*FLAGS, "--save_total_limit", 0, "--quiet", "--resume_from_checkpoint", "auto")
    assert call(capsys, *words(files / "model", files, out, *more)).status == 0
    for name in ("model.safetensors", "config.json", "checkpoint-6/model.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    mine, theirs = (load_file(x / "checkpoint-6/optimizer.safetensors") for x in (out, trained))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_validation_label_that_is_not_declared(capsys, files, tmp_path):
    """The rows are left out, or the run stops where they are many."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(files / "validation.jsonl", folder)
    text = (files / "train.csv").read_text()
    (folder / "train.csv").write_text(f"{text}a new one,other\n")
    line = text.count("\n") + 1
    what = f"1 of 37 rows cannot be used: 1 label 'other' is not among the known ones ({folder}"
    more = (*FLAGS, "--labels", "film,good")
    result = call(capsys, *words(files / "model", folder, tmp_path / "out", *more))
    assert_one_line(result, f"{what}/train.csv:{line}): more than --max_dropped 0.01")
    more = (*more, "--max_dropped", 0.1, "--threshold", 0.25, "--class_weights", "balanced")
    result = call(capsys, *words(files / "model", folder, tmp_path / "out", *more))
    assert f"WARNING: train: {what}" in result.err
    assert result.summary["eval_threshold"] == 0.25
    assert json.loads((tmp_path / "out/run.json").read_text())["labels"] == ["film", "good"]
