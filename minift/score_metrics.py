"""How right numbers and sets of labels are. No model needed.

Equal to scikit-learn's with zero_division=0, and to scipy's correlations.
"""

from collections.abc import Sequence

import numpy as np

from .metrics import MOST_F1


def regression_metrics(target: np.ndarray, predicted: np.ndarray) -> dict[str, float | int | None]:
    """The usual scores of predicted numbers.

    Args:
        target: (n,) finite, n > 0.
        predicted: (n,).

    Returns:
        A flat dict, ready for JSON: n; mse and mae; pearson and spearman, None where a side has
        one value only; mean_mse: of always predicting the mean. All but n and mean_mse are None
        where a predicted number is not finite.
    """
    target, predicted = np.asarray(target, np.float64), np.asarray(predicted, np.float64)
    metrics = {"n": len(target), "mse": None, "mae": None, "pearson": None, "spearman": None}
    if np.isfinite(predicted).all():
        error = predicted - target
        metrics["mse"], metrics["mae"] = float((error**2).mean()), float(np.abs(error).mean())
        metrics["pearson"] = pearson(target, predicted)
        metrics["spearman"] = pearson(average_ranks(target), average_ranks(predicted))
    return metrics | {"mean_mse": float(target.var())}


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """The correlation of two (n,) float64; None where one of them is constant."""
    # Not by their spread: the mean of equal numbers is rounded, and so may differ from them.
    if x.min() == x.max() or y.min() == y.max():
        return None
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny numbers would be 0
    r = (x @ y) / np.sqrt((x @ x) * (y @ y))
    return float(np.clip(r, -1, 1))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """(n,) float64: the rank of each of (n,) numbers, from 1; equal ones share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def multilabel_metrics(
    target: np.ndarray, predicted: np.ndarray, names: Sequence[str] | None = None
) -> dict[str, float | int]:
    """The usual scores of sets of labels.

    Args:
        target: (n, K) bool, which labels each row has, n > 0.
        predicted: (n, K) bool.
        names: of the K labels. Given, "f1/<name>" is added for each, unless there are more than
            MOST_F1.

    Returns:
        A flat dict, ready for JSON: n; precision, recall and f1, pooled over all labels, and the
        same as _micro; _macro: the mean over labels; _weighted: by how many rows have each;
        _samples: the mean over rows; exact_match: the share of rows whose set is right;
        hamming_loss: the share of wrong answers to "does this row have this label?";
        constant_f1: what always giving the same labels would score as f1, at best.
    """
    hits, support, guesses = _counts(target, predicted, 0)
    metrics: dict[str, float | int] = {
        "n": len(target),
        "exact_match": float((target == predicted).all(1).mean()),
        "hamming_loss": float((target != predicted).mean()),
        "constant_f1": _constant_f1(support, len(target)),
    }
    pooled = _rates(hits.sum(), support.sum(), guesses.sum())
    each_row = _rates(*_counts(target, predicted, 1))
    for name, rates in _rates(hits, support, guesses).items():
        metrics[name] = metrics[f"{name}_micro"] = float(pooled[name])
        metrics[f"{name}_macro"] = float(rates.mean())
        metrics[f"{name}_weighted"] = float(rates @ support / max(1, support.sum()))
        metrics[f"{name}_samples"] = float(each_row[name].mean())
        if names is not None and name == "f1" and len(names) <= MOST_F1:
            metrics |= {f"f1/{label}": float(f1) for label, f1 in zip(names, rates, strict=True)}
    return metrics


def best_threshold(scores: np.ndarray, target: np.ndarray) -> float:
    """From which score on labels are given, so that no other threshold has a higher micro F1.

    All thresholds between two neighbouring scores are alike: 0.5 stands for those that it is
    among, for others their middle. Of equally good ones the nearest to 0.5 wins, of two as near
    the higher.

    Args:
        scores: any shape, in [0, 1]; not empty.
        target: bool, of that shape: what is to be found.
    """
    total = np.count_nonzero(target)
    if not total:
        return 0.5
    order = np.argsort(-scores, axis=None, kind="stable")
    scores, hits = scores.ravel()[order], np.cumsum(target.ravel()[order])
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of equal scores
    above, below = scores[last], np.append(scores[last[:-1] + 1], 0.0)
    middle = (above + below) / 2
    middle = np.where(middle > below, middle, above)  # of two floats that have none between them
    middle = np.where((below < 0.5) & (above >= 0.5), 0.5, middle)
    f1 = 2 * hits[last] / (last + 1 + total)
    best = middle[f1 == f1.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def _counts(target, predicted, axis):
    """How often both say so, the first does, and the second."""
    return [np.count_nonzero(x, axis) for x in (target & predicted, target, predicted)]


def _rates(hits, support, guesses):
    return {
        "precision": hits / np.maximum(guesses, 1),  # no guesses, no hits: 0 / 1
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + guesses, 1),
    }


def _constant_f1(support, rows):
    """Of the commonest label, the two commonest, ...: one of these sets is the best."""
    hits, labels = np.cumsum(np.sort(support)[::-1]), np.arange(1, len(support) + 1)
    return float((2 * hits / (rows * labels + support.sum())).max())
