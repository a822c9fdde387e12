"""minift/tasks/classification.py: labels, weights, loss, metrics and predictions of the task."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from minift.batch import Batches, Example, collate
from minift.data import Row
from minift.errors import InputError
from minift.ops import TORCH
from minift.saving import load
from minift.tasks.classification import (
    Classification,
    label_names,
    log_softmax,
    predict,
)
from minift.tasks.texts import logits_of


def rows_of(*labels: str | None) -> list[Row]:
    return [Row("a text", None, label, i) for i, label in enumerate(labels, 2)]


def test_labels_are_in_order_of_numbers_or_names():
    assert label_names(rows_of("10", "9", "-1", "9")) == ("-1", "9", "10")
    assert label_names(rows_of("b", "10", "a")) == ("10", "a", "b")


def test_one_label_teaches_nothing():
    with pytest.raises(InputError, match=r"^train\.csv: expected two labels or more, .*'spam'$"):
        label_names(rows_of("spam", "spam"), "train.csv")


def test_unknown_label_is_named_with_file_and_line(tmp_path):
    _, tokenizer = load(tiny_model(tmp_path), ("a", "b"))
    with pytest.raises(InputError, match=r"^dev\.csv:3: label 'c' is not among the known ones: c"):
        Classification(("a", "b")).encode(rows_of("a", "c"), tokenizer, "dev.csv")


def test_a_single_text_among_pairs_is_named(tmp_path):
    _, tokenizer = load(tiny_model(tmp_path), ("a", "b"))
    rows = [Row("good", "film", "a", 2), Row("bad", None, "b", 3)]
    with pytest.raises(InputError, match=r"^rows:3: expected 2 texts"):
        Classification(("a", "b")).encode(rows, tokenizer)


def test_encode_marks_what_was_cut(tmp_path):
    _, tokenizer = load(tiny_model(tmp_path), ("a", "b"), max_length=6)
    rows = [Row("good film", None, "a", 1), Row("good film " * 9, None, None, 2)]
    short, long = Classification(("a", "b")).encode(rows, tokenizer)
    assert (short.cut, long.cut) == (False, True)
    assert (len(short.tokens), len(long.tokens)) == (4, 6)
    assert (short.target, long.target) == (0, -100)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_over_weight_is_torchs_mean(weights, smoothing):
    """With an ignored target among them."""
    examples = [Example([2, 3], [0, 0], t) for t in (0, 2, -100, 1, 2)]
    (batch,) = next(Batches(examples, 5).epoch(0))
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    task = Classification(("a", "b", "c"), weights, smoothing)
    mean = task.loss(logits, batch, TORCH) / task.weight(batch)
    weight = None if weights is None else torch.tensor(weights)
    torch.testing.assert_close(
        mean, F.cross_entropy(logits, batch.targets, weight, label_smoothing=smoothing)
    )


@given(st.lists(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3), min_size=1, max_size=5))
def test_log_softmax_is_torchs(rows):
    x = np.array(rows)
    np.testing.assert_allclose(log_softmax(x), torch.tensor(x).log_softmax(-1), atol=1e-9)


def test_metrics_loss_is_the_mean():
    metrics = Classification(("a", "b")).metrics(np.array([[0, 0, 0.5], [0, 1, 2], [0, 0, 1]]))
    assert metrics["loss"] == pytest.approx(3.5 / 3)
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_predictions_keep_order_and_sum_to_one(tmp_path):
    model, tokenizer = load(tiny_model(tmp_path), ("a", "b"))
    texts = ["good film and it is good", "bad", "the meal was poor", "good film and it is good"]
    rows = [Row(text, None, None, i) for i, text in enumerate(texts, 1)]
    answers = list(predict(model, tokenizer, rows))
    assert [answer["text"] for answer in answers] == texts
    for answer in answers:
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert (
            answer["score"] == max(answer["scores"].values()) == answer["scores"][answer["label"]]
        )
    examples = Classification(("a", "b")).encode(rows, tokenizer)
    by_torch = torch.tensor(logits_of(model, examples)).softmax(-1)
    assert answers[1]["scores"]["a"] == pytest.approx(by_torch[1, 0].item(), abs=2e-6)


def test_predicting_leaves_no_gradient(tmp_path):
    model, tokenizer = load(tiny_model(tmp_path), ("a", "b"))
    list(predict(model, tokenizer, rows_of(None)))
    assert all(p.grad is None for p in model.parameters())


def test_class_weights_are_uploaded_once_and_not_rounded():
    """One tensor for all steps, in fp32 beside bf16 logits: a mean divides by the same weights."""
    seen = []

    def cross_entropy(logits, targets, weight, smoothing, report):
        seen.append(weight)
        return TORCH.cross_entropy(logits, targets, weight, smoothing, report=report)

    task, ops = Classification(("a", "b"), (0.2, 3.1)), replace(TORCH, cross_entropy=cross_entropy)
    batch = collate([Example([1, 2], [0, 0], i) for i in (0, 1)], [0, 1])
    logits = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        loss = task.loss(logits, batch, ops) / task.weight(batch)
        torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    assert seen[0] is seen[1]
    assert torch.equal(seen[0], torch.tensor([0.2, 3.1]))
    with torch.inference_mode():
        Classification(("a", "b"), (0.3, 1.1)).loss(logits, batch, ops)
    Classification(("a", "b"), (0.3, 1.1)).loss(logits, batch, ops).backward()
