"""minift/score_metrics.py against scikit-learn, scipy and every threshold that there is."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn import metrics as sk

from minift.metrics import MOST_F1
from minift.score_metrics import (
    average_ranks,
    best_threshold,
    multilabel_metrics,
    pearson,
    regression_metrics,
)

NUMBERS = st.one_of(st.sampled_from([0.0, 0.1, 1.0, 2.5, 5.0]), st.floats(-1e3, 1e3, width=32))


@st.composite
def number_pairs(draw):
    n = draw(st.integers(2, 12))
    return [np.array(draw(st.lists(NUMBERS, min_size=n, max_size=n))) for _ in range(2)]


@st.composite
def label_sets(draw):
    shape = draw(st.tuples(st.integers(1, 8), st.integers(2, 5)))
    return [draw(arrays(bool, shape)) for _ in range(2)]


def same(mine: float | None, theirs: float) -> bool:
    return mine is None if np.isnan(theirs) else mine == pytest.approx(theirs, abs=1e-9)


@settings(max_examples=40)
@given(number_pairs())
@example([np.array([0.1] * 3), np.array([1.0, 2.0, 3.0])])  # whose mean is not 0.1
def test_numbers_are_judged_as_scikit_learn_and_scipy_do(pair):
    target, predicted = pair
    found = regression_metrics(target, predicted)
    assert found["mse"] == pytest.approx(sk.mean_squared_error(target, predicted))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(target, predicted))
    mean = np.full(len(target), target.mean())
    assert found["mean_mse"] == pytest.approx(sk.mean_squared_error(target, mean))
    assert found["n"] == len(target)
    constant = np.ptp(target) == 0 or np.ptp(predicted) == 0
    for name, theirs in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = np.nan if constant else theirs(target, predicted).statistic
        assert same(found[name], expected), name


@given(st.lists(NUMBERS, min_size=1, max_size=12))
def test_ranks_are_scipys(values):
    np.testing.assert_array_equal(average_ranks(np.array(values)), stats.rankdata(values))


def test_tiny_and_huge_numbers_correlate_too():
    """Their squares are 0, or more than a float holds."""
    x = np.array([1.0, 2.0, 4.0])
    for scale in (1e-300, 1e300):
        assert pearson(x * scale, x) == pytest.approx(1)
    assert -1 <= pearson(x, -3 * x) <= -1 + 1e-15


def test_numbers_that_are_none_have_no_score():
    found = regression_metrics(np.array([1.0, 2.0]), np.array([1.0, np.nan]))
    assert found == {"n": 2, "mse": None, "mae": None, "pearson": None, "spearman": None} | {
        "mean_mse": 0.25
    }


@settings(max_examples=25)
@given(label_sets())
def test_sets_of_labels_are_judged_as_scikit_learn_does(pair):
    target, predicted = pair
    found = multilabel_metrics(target, predicted, [str(i) for i in range(target.shape[1])])
    for name in ("micro", "macro", "weighted", "samples"):
        theirs = sk.precision_recall_fscore_support(
            target, predicted, average=name, zero_division=0
        )
        for kind, expected in zip(("precision", "recall", "f1"), theirs, strict=False):
            assert found[f"{kind}_{name}"] == pytest.approx(expected), (kind, name)
    assert found["f1"] == found["f1_micro"]
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(target, predicted))
    assert found["hamming_loss"] == pytest.approx(sk.hamming_loss(target, predicted))
    for i, expected in enumerate(sk.f1_score(target, predicted, average=None, zero_division=0)):
        assert found[f"f1/{i}"] == pytest.approx(expected)


@settings(max_examples=10)
@given(label_sets())
def test_constant_f1_is_that_of_the_best_constant_answer(pair):
    """Found among all sets of labels."""
    target, _ = pair
    n, K = target.shape
    sets = [np.array([bool(s >> k & 1) for k in range(K)]) for s in range(1 << K)]
    best = max(
        sk.f1_score(target, np.tile(s, (n, 1)), average="micro", zero_division=0) for s in sets
    )
    assert multilabel_metrics(target, target)["constant_f1"] == pytest.approx(best)


def test_of_too_many_labels_no_f1_is_told_one_by_one():
    target = np.zeros((1, MOST_F1 + 1), bool)
    assert not any(
        "/" in name for name in multilabel_metrics(target, target, ["x"] * (MOST_F1 + 1))
    )


SCORES = st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, np.nextafter(0.5, 1), 0.75, 1.0]), st.floats(0, 1)
)


@settings(max_examples=60)
@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=12))
@example([(np.nextafter(0.5, 1), True), (0.5, False)])
@example([(0.0, True), (0.0, False)])
def test_no_threshold_is_better_than_the_chosen_one(pairs):
    """Beside every score, 0.5 and the middles between scores; of the best none is nearer to 0.5."""
    scores, target = (np.array(x).reshape(-1, 1) for x in zip(*pairs, strict=True))

    def f1(threshold: float) -> float:
        found = np.count_nonzero((scores >= threshold) & target)
        return 2 * found / max(1, np.count_nonzero(scores >= threshold) + np.count_nonzero(target))

    chosen = best_threshold(scores, target)
    values = np.unique([0.0, *scores.ravel()])
    middles = [0.5, *((values[1:] + values[:-1]) / 2)]
    assert f1(chosen) == max(map(f1, [*values, *middles]))
    best = [abs(t - 0.5) for t in middles if f1(t) == f1(chosen)]
    assert abs(chosen - 0.5) <= min(best, default=1)


def test_without_a_label_to_find_the_threshold_is_the_usual():
    assert best_threshold(np.array([[0.1, 0.9]]), np.array([[False, False]])) == 0.5
