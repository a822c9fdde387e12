"""minift/tasks/regression.py: numbers, their loss, and a run from files to predictions."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import assert_one_line, call, rows, settings_kept, tiny_model, words
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minift.batch import Example, collate
from minift.config import RunConfig, TrainConfig
from minift.data import Row
from minift.errors import InputError
from minift.ops import TORCH
from minift.saving import load
from minift.tasks.regression import Regression
from minift.tasks.task import File, Setup
from minift.weights import read_config

FLAGS = ("--task", "regression", "--max_steps", 6, "--save_steps", 2, "--eval_steps", 2)


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


def write(path, n):
    """Texts with 4.5, or -1.5 where they are bad; JSON lines end them in a full stop."""
    numbers = [(text, 4.5 if label == "pos" else -1.5) for text, label in rows(n)]
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": f"{text}.", "label": x}) for text, x in numbers]
    else:
        lines = ["text,label", *(f"{text},{x}" for text, x in numbers)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A model, train.csv of 36 rows (a last batch of 4), validation.jsonl of 12."""
    folder = tmp_path_factory.mktemp("regression")
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


@pytest.mark.parametrize("targets", [[2.5, -1.0, 0.0], [None, 4.0], [1e4]])
@pytest.mark.parametrize("empty", [0, 3])
def test_loss_over_weight_is_torchs_mean(targets, empty):
    """With rows that have no number, and empty sequences; the gradient too."""
    numbers = [float("nan") if t is None else t for t in targets]
    examples = [Example([2, 3], [0, 0], x) for x in numbers]
    batch = collate(examples, range(len(numbers)), 0, True, len(numbers) + empty)
    values = torch.linspace(-3, 3, len(batch.targets)).view(-1, 1)
    task, known = Regression(), ~torch.isnan(batch.targets)
    assert task.weight(batch) == sum(t is not None for t in targets)
    mine, theirs = (values.clone().requires_grad_() for _ in range(2))
    loss = task.loss(mine, batch, TORCH) / task.weight(batch)
    expected = F.mse_loss(theirs[known][:, 0], batch.targets[known])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(("value", "number"), [(" -1.5e1 ", -15.0), (3, 3.0), (0.25, 0.25)])
def test_numbers(value, number):
    found = Regression.parse(value)
    assert (found, type(found)) == (number, float)


@pytest.mark.parametrize(
    "value", ["good", "", "nan", "inf", "1_000", "1,5", "1e39", 10**400, True, None, [1.0]]
)
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"^a number$"):
        Regression.parse(value)


def test_rows_without_a_number_are_dropped(tmp_path):
    """Text among numbers too; each by its line."""
    path = tmp_path / "a.jsonl"
    values = ("2", '"3.5"', '"good"', "null", '"nan"', "true")
    lines = [f'{{"text": "a text", "label": {value}}}' for value in values]
    path.write_text("\n".join(lines))
    file = File(RunConfig(), "train", str(path))
    rows = [row for block in Regression.blocks(file) for row in block]
    assert [row.label for row in rows] == [2.0, 3.5]
    why = "without a number in column 'label'"
    assert file.dropped == [(f"{path}:{line}", why) for line in (3, 4, 5, 6)]


def test_the_split_is_a_function_of_the_seed():
    rows = [Row(f"text {i}", None, float(i), i) for i in range(50)]
    run = RunConfig(validation_split=0.2)
    train, validation, how = Regression.split(rows, run, 7)
    assert (train, validation, how) == Regression.split(rows, run, 7)
    assert validation != Regression.split(rows, run, 8)[1]
    assert len(validation) == 10
    assert sorted(row.line for row in train + validation) == list(range(50))
    assert "10 of the training rows, drawn with seed 7, are kept for validation" in how
    with pytest.raises(InputError, match="expected two rows or more: give --validation_file"):
        Regression.split(rows[:1], run, 7)


def test_a_model_that_has_learned_nothing_is_told_of():
    """As one that answers the mean; and one whose answers are no numbers."""
    task = Regression()
    mean, broken = (task.metrics(np.array([[0, x], [1, x]])) for x in (0.5, np.nan))
    assert "0.2500 does not beat always answering the mean (0.2500)" in task.verdict(mean)
    assert "that is not finite does not beat" in task.verdict(broken)
    assert task.headline(mean) == "loss 0.2500  pearson undefined  spearman undefined"
    assert not task.verdict(task.metrics(np.array([[0, 0.1], [1, 0.9]])))
    same = task.metrics(np.array([[2, 2.1], [2, 1.9]]))
    assert task.verdict(same).startswith("all rows have the same number: no model could beat")


def test_a_run_learns_and_its_model_measures_and_predicts(capsys, trained, files):
    """The log has the metrics that `eval` finds; transformers gives the same numbers."""
    events = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = events[-1]
    assert last["eval_pearson"] > 0.5
    assert last["eval_loss"] == last["eval_mse"] < last["eval_mean_mse"] == pytest.approx(9)
    data = ("--data", files / "validation.jsonl")
    found = call(capsys, "eval", "--model", trained, *data, "--quiet").summary
    assert found["eval_pearson"] == pytest.approx(last["eval_pearson"], abs=1e-6)
    config = json.loads((trained / "config.json").read_text())
    assert (config["problem_type"], config["id2label"]) == ("regression", {"0": "score"})

    texts = [text for text, _ in rows(4)]
    model, tokenizer = load(trained)
    answers = Regression().predict(model, tokenizer, [Row(text) for text in texts])
    theirs = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    encoded = AutoTokenizer.from_pretrained(trained)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**encoded).logits
    assert theirs.config.num_labels == 1
    for answer, text, value in zip(answers, texts, logits[:, 0].tolist(), strict=True):
        assert answer == {"text": text, "value": pytest.approx(value, abs=2e-5)}


def test_a_folder_of_transformers_is_known_for_what_it_is(trained, tmp_path):
    """By its problem_type alone."""
    shutil.copytree(trained, tmp_path / "m")
    raw = json.loads((trained / "config.json").read_text())
    del raw["task"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path / "m").task == "regression"


def test_a_regression_of_several_numbers_is_refused(trained):
    """Its other outputs would be dropped without a word."""
    model, tokenizer = load(trained)
    model.config = replace(model.config, labels=("a", "b"))
    with pytest.raises(InputError, match="expected one output of a regression, got 2"):
        Regression.trained(Setup(RunConfig(), TrainConfig(), model, tokenizer))


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(capsys, trained, files, tmp_path):
    """From the middle of an epoch of 5 steps, to the bit."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    more = (*FLAGS, "--save_total_limit", 0, "--quiet", "--resume_from_checkpoint", "auto")
    assert call(capsys, *words(files / "model", files, out, *more)).status == 0
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    mine, theirs = (load_file(x / "checkpoint-6/optimizer.safetensors") for x in (out, trained))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_best_error_is_the_smallest(capsys, files, tmp_path):
    """Not the largest, as of a score."""
    more = (*FLAGS, "--metric_for_best_model", "mae", "--quiet", "--max_steps", 4)
    result = call(capsys, *words(files / "model", files, tmp_path / "out", *more))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    found = [event["eval_mae"] for event in map(json.loads, lines[:-1]) if "eval_mae" in event]
    assert len(set(found)) == 2
    assert result.summary["eval_mae"] == min(found)


def test_flags_of_labels_are_refused(capsys, files, tmp_path):
    result = call(capsys, *words(files / "model", files, tmp_path / "out", *FLAGS, "--labels", "a"))
    assert_one_line(result, "--labels is not read by --task regression")
