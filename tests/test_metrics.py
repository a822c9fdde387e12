"""minift.metrics against scikit-learn, and its tables against text."""

import json
import tracemalloc
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


def rows_of(matrix) -> tuple[np.ndarray, np.ndarray]:
    """(target, predicted) that are counted in a matrix."""
    matrix = np.asarray(matrix)
    return np.indices(matrix.shape).reshape(2, -1).repeat(matrix.ravel(), axis=1)


def test_format_confusion():
    rows = rows_of([[10, 2, 0], [1, 107, 0], [0, 0, 0]])
    assert format_confusion(*rows, ["no", "yes", "maybe"]).splitlines() == [
        "true \\ predicted  no  yes  maybe  recall",
        "no                10    2      0   83.3%",
        "yes                1  107      0   99.1%",
        "maybe              0    0      0       -",
    ]


def test_format_confusion_numbers_columns_that_do_not_fit():
    rows = rows_of([[10, 2], [1, 107]])
    assert format_confusion(*rows, ["graphical interfaces", "e-mail"], 40).splitlines() == [
        "true \\ predicted         1    2  recall",
        "1 graphical interfaces  10    2   83.3%",
        "2 e-mail                 1  107   99.1%",
    ]


def test_format_confusion_lines_up_what_is_wide_and_what_stands_on_letters():
    """By the columns of a terminal: 好 and 😀 take two, an accent of its own and a joiner none."""
    names = ["好评", "cafe\u0301", "😀", "نمی\u200cروم"]
    table = format_confusion(*rows_of(np.eye(4, dtype=int) * [[5], [6], [7], [8]]), names)
    assert table.splitlines() == [
        "true \\ predicted  好评  cafe\u0301  😀  نمی\u200cروم  recall",
        "好评                 5     0   0       0  100.0%",
        "cafe\u0301                 0     6   0       0  100.0%",
        "😀                   0     0   7       0  100.0%",
        "نمی\u200cروم               0     0   0       8  100.0%",
    ]
    narrow = format_confusion(*rows_of(np.eye(2, dtype=int)), ["好" * 15, "b"], 50)
    assert narrow.splitlines()[0].endswith("1  2  recall")  # 15 characters are 30 columns


def test_format_confusion_keeps_every_label_on_its_line():
    names = ["a\nb\u2028", "c" * 1000]
    lines = format_confusion(*rows_of([[1, 1], [0, 1]]), names, 1000).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("a\\nb\\u2028 ")
    assert lines[2].startswith("c" * 57 + "... ")


@pytest.mark.parametrize(("n_labels", "max_width"), [(21, 1000), (3, 20)])
def test_format_confusion_lists_the_worst(n_labels, max_width):
    matrix = np.eye(n_labels, dtype=np.int64) * 50
    matrix[0, 2], matrix[2, 1], matrix[1, 0] = 3, 12, 3
    names = [f"label {i}" for i in range(n_labels)]
    assert format_confusion(*rows_of(matrix), names, max_width).splitlines() == [
        "true -> predicted   count",
        "label 2 -> label 1     12",
        "label 0 -> label 2      3",
        "label 1 -> label 0      3",
    ]


def test_format_confusion_lists_at_most_twenty():
    names = [str(i) for i in range(30)]
    assert len(format_confusion(*rows_of(np.ones((30, 30), int)), names).splitlines()) == 21
    right = format_confusion(*rows_of(np.eye(30, dtype=int)), names)
    assert right == "no confusions: every row is right"


def test_ten_thousand_labels_make_no_square():
    """Their matrix would take 800 MB; the scores, the list and per_class stay below 64."""
    n_labels = 10_000
    target = np.arange(100_000) % n_labels
    predicted = np.where(target % 10, target, (target + 1) % n_labels)
    names = [f"label {i}" for i in range(n_labels)]
    tracemalloc.start()
    try:
        scores = classification_metrics(target, predicted, n_labels, names)
        table = format_confusion(target, predicted, names)
        each = per_class(target, predicted, n_labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64e6
    assert scores["accuracy"] == 0.9
    assert scores["mcc"] == pytest.approx(0.9, abs=1e-4)  # labels are many: chance is near 0
    assert not any(name.startswith("f1/") for name in scores)
    assert table.splitlines()[:2] == [
        "true -> predicted       count",
        "label 0 -> label 1         10",
    ]
    assert (each[0]["recall"], each[1]["recall"], each[1]["support"]) == (0, 1, 10)
    with pytest.raises(ValueError, match="at most 4096 labels, got 10000: use per_class"):
        confusion_matrix(target, predicted, n_labels)


def test_f1_of_every_label_is_told_up_to_a_hundred():
    for n_labels, told in ((100, 100), (101, 0)):
        labels = np.arange(n_labels)
        scores = classification_metrics(labels, labels, n_labels, [str(i) for i in labels])
        assert sum(name.startswith("f1/") for name in scores) == told


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
    def confusions(target, predicted, n_labels):
        return format_confusion(target, predicted, ["name"] * n_labels)

    for function in (confusion_matrix, classification_metrics, per_class, confusions):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the text is compared below)
            function(np.array(target), np.array(predicted), 2)
        assert str(error.value).startswith(message)


def test_bad_names_are_explained():
    with pytest.raises(ValueError, match="expected 2 names, got 1: pass one name for every label"):
        classification_metrics(np.array([0]), np.array([0]), 2, ["only"])
