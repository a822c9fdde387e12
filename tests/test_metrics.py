"""minift.metrics against scikit-learn, and its tables against text."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from minift.metrics import (
    classification_metrics,
    confusion_matrix,
    format_confusion,
    per_class,
)

cases = st.integers(1, 6).flatmap(
    lambda n_labels: st.tuples(
        st.just(n_labels),
        st.lists(
            st.tuples(st.integers(0, n_labels - 1), st.integers(0, n_labels - 1)),
            min_size=1,
            max_size=30,
        ),
    )
)


def columns(case) -> tuple[np.ndarray, np.ndarray, int]:
    n_labels, pairs = case
    target, predicted = np.array(pairs).T
    return target, predicted, n_labels


def assert_like_sklearn(target: np.ndarray, predicted: np.ndarray, n_labels: int) -> None:
    ours = classification_metrics(target, predicted, n_labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one label only: scikit-learn says so
        theirs = {
            "n": len(target),
            "accuracy": sk.accuracy_score(target, predicted),
            "majority_accuracy": np.bincount(target).max() / len(target),
            "mcc": sk.matthews_corrcoef(target, predicted),
        }
        for average in ("macro", "micro", "weighted"):
            scores = sk.precision_recall_fscore_support(
                target, predicted, average=average, zero_division=0
            )
            for name, score in zip(("precision", "recall", "f1"), scores, strict=False):
                theirs[f"{name}_{average}"] = score
                if average == "macro":
                    theirs[name] = score
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert all(type(value) in (int, float) for value in ours.values())
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours


@settings(derandomize=True, deadline=None)
@given(cases)
def test_metrics_equal_sklearn(case):
    assert_like_sklearn(*columns(case))


@settings(derandomize=True, deadline=None)
@given(cases)
def test_matrix_and_per_class_equal_sklearn(case):
    target, predicted, n_labels = columns(case)
    labels = range(n_labels)
    matrix = confusion_matrix(target, predicted, n_labels)
    assert matrix.dtype == np.int64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (matrix == sk.confusion_matrix(target, predicted, labels=labels)).all()
        theirs = sk.precision_recall_fscore_support(
            target, predicted, labels=labels, zero_division=0
        )
    keys = ("precision", "recall", "f1", "support")
    for ours, *scores in zip(per_class(target, predicted, n_labels), *theirs, strict=True):
        assert ours == pytest.approx(dict(zip(keys, scores, strict=True)))


@pytest.mark.parametrize(
    ("target", "predicted", "n_labels"),
    [
        ([0, 0, 0], [0, 0, 0], 1),
        ([1, 1, 1], [1, 1, 1], 3),
        ([0, 1, 2], [1, 2, 0], 3),
        ([0, 0, 1], [4, 4, 4], 6),
        ([0, 1], [1, 1], 2),
    ],
    ids=["one label", "one of three", "all wrong", "absent ones", "one guess"],
)
def test_edges_equal_sklearn(target, predicted, n_labels):
    assert_like_sklearn(np.array(target), np.array(predicted), n_labels)


def test_small_unsigned_labels_do_not_overflow():
    labels = np.arange(200, dtype=np.uint8)
    assert (confusion_matrix(labels, labels, 200) == np.eye(200)).all()


def test_names_add_the_f1_of_every_label():
    target, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    named = classification_metrics(target, predicted, 3, ["cat", "dog", "macro"])
    assert named["f1/cat"] == named["f1/dog"] == pytest.approx(2 / 3)
    assert named["f1/macro"] == 0.0
    plain = {key: value for key, value in named.items() if "/" not in key}
    assert plain == classification_metrics(target, predicted, 3)


def test_format_confusion():
    matrix = np.array([[10, 2, 0], [1, 107, 0], [0, 0, 0]])
    assert format_confusion(matrix, ["no", "yes", "maybe"]).splitlines() == [
        "true \\ predicted  no  yes  maybe  recall",
        "no                10    2      0   83.3%",
        "yes                1  107      0   99.1%",
        "maybe              0    0      0       -",
    ]


def test_format_confusion_numbers_columns_that_do_not_fit():
    matrix = np.array([[10, 2], [1, 107]])
    assert format_confusion(matrix, ["graphical interfaces", "e-mail"], 40).splitlines() == [
        "true \\ predicted         1    2  recall",
        "1 graphical interfaces  10    2   83.3%",
        "2 e-mail                 1  107   99.1%",
    ]


@pytest.mark.parametrize(("n_labels", "max_width"), [(21, 1000), (3, 20)])
def test_format_confusion_lists_the_worst(n_labels, max_width):
    matrix = np.eye(n_labels, dtype=np.int64) * 50
    matrix[0, 2], matrix[2, 1], matrix[1, 0] = 3, 12, 3
    names = [f"label {i}" for i in range(n_labels)]
    assert format_confusion(matrix, names, max_width).splitlines() == [
        "true -> predicted   count",
        "label 2 -> label 1     12",
        "label 0 -> label 2      3",
        "label 1 -> label 0      3",
    ]


def test_format_confusion_lists_at_most_twenty():
    names = [str(i) for i in range(30)]
    assert len(format_confusion(np.ones((30, 30), np.int64), names).splitlines()) == 21
    right = format_confusion(np.eye(30, dtype=np.int64), names)
    assert right == "no confusions: every row is right"


@pytest.mark.parametrize(
    ("target", "predicted", "message"),
    [
        ([], [], "expected target of shape (n,) with n > 0, got (0,): pass a label per row"),
        ([[0]], [0], "expected target of shape (n,) with n > 0, got (1, 1): pass"),
        ([0], [0.5], "expected predicted to hold integers, got float64: pass label ids"),
        ([0, -100], [0, 0], "expected target in 0..1, got -100: check n_labels=2, or leave out"),
        ([0, 0], [0, 2], "expected predicted in 0..1, got 2: check n_labels=2"),
        ([0, 0], [0], "expected as many predicted as target labels, got 1 and 2: pass one"),
    ],
)
def test_bad_labels_are_explained(target, predicted, message):
    for function in (confusion_matrix, classification_metrics, per_class):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the text is compared below)
            function(np.array(target), np.array(predicted), 2)
        assert str(error.value).startswith(message)


def test_bad_names_are_explained():
    with pytest.raises(ValueError, match="expected 2 names, got 1: pass one name for every label"):
        classification_metrics(np.array([0]), np.array([0]), 2, ["only"])
    with pytest.raises(ValueError, match=r"each of 3 names, got shape \(2, 2\): pass what"):
        format_confusion(np.eye(2), ["a", "b", "c"])
