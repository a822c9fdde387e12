"""How right a classifier is: counts, scores and a confusion matrix as text. No model needed.

Time and memory grow with the rows and the labels, not with the labels' square.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

MOST_SHOWN = 20  # labels in a table, or confusions in a list: more would not be read
MOST_F1 = 100  # labels whose F1 is told one by one
MOST_SQUARED = 4096  # labels of a matrix, which then takes 128 MiB


def confusion_matrix(target: np.ndarray, predicted: np.ndarray, n_labels: int) -> np.ndarray:
    """How often each label was taken for each other one.

    Args:
        target: (n,) integers, the true label of every row, each in 0..n_labels-1.
        predicted: (n,) integers, the label the model gave, each in 0..n_labels-1.
        n_labels: labels there are, present in these rows or not.

    Returns:
        (n_labels, n_labels) int64, rows counted: [i, j] were truly i and predicted j.

    Raises:
        ValueError: an input is empty, not 1-d, not integer or out of range, lengths differ, or
            there are more than MOST_SQUARED labels.
    """
    if n_labels > MOST_SQUARED:
        raise ValueError(
            f"expected at most {MOST_SQUARED} labels, got {n_labels}: use per_class, or count the "
            "pairs that there are"
        )
    target, predicted = _checked_pair(target, predicted, n_labels)
    counts = np.bincount(target * n_labels + predicted, minlength=n_labels**2)
    return counts.reshape(n_labels, n_labels)


def classification_metrics(
    target: np.ndarray,
    predicted: np.ndarray,
    n_labels: int,
    names: Sequence[str] | None = None,
) -> dict[str, float | int]:
    """The usual scores of a classifier, equal to scikit-learn's with zero_division=0.

    Args:
        target: (n,) integers, the true label of every row.
        predicted: (n,) integers, the label the model gave.
        n_labels: labels there are. Averages are over those present in target or predicted.
        names: text of every label. Given, "f1/<name>" is added for each, unless there are more
            than MOST_F1: see per_class.

    Returns:
        A flat dict, ready for JSON. Scores are in 0..1, mcc in -1..1.
        accuracy; majority_accuracy: what always answering the commonest label would score;
        precision, recall, f1, each also as _macro (the same number), _micro and _weighted;
        mcc: Matthews correlation, 0 where either side has one label only; n: rows.

    Raises:
        ValueError: as confusion_matrix does, or `names` are not n_labels long.
    """
    if names is not None and len(names) != n_labels:
        raise ValueError(
            f"expected {n_labels} names, got {len(names)}: pass one name for every label"
        )
    counts = _counts(target, predicted, n_labels)
    hits, support, guesses = counts
    rows = int(support.sum())
    accuracy = float(hits.sum() / rows)
    present = (support + guesses) > 0
    metrics: dict[str, float | int] = {
        "n": rows,
        "accuracy": accuracy,
        "majority_accuracy": float(support.max() / rows),
        "mcc": _matthews(*counts),
    }
    for name, scores in _scores(*counts).items():
        macro = float(scores[present].mean())
        metrics[name] = metrics[f"{name}_macro"] = macro
        metrics[f"{name}_micro"] = accuracy  # every row has one label, so pooled they agree
        metrics[f"{name}_weighted"] = float(scores @ support / rows)
        if names is not None and name == "f1" and n_labels <= MOST_F1:
            metrics |= {f"f1/{label}": float(f1) for label, f1 in zip(names, scores, strict=True)}
    return metrics


def per_class(
    target: np.ndarray, predicted: np.ndarray, n_labels: int
) -> list[dict[str, float | int]]:
    """The scores of every label on its own, labels without rows included (0.0).

    Args:
        target: (n,) integers, the true label of every row.
        predicted: (n,) integers, the label the model gave.
        n_labels: labels there are.

    Returns:
        One dict per label, in label order: precision, recall, f1 (0..1), support (rows truly so).

    Raises:
        ValueError: as confusion_matrix does.
    """
    hits, support, guesses = _counts(target, predicted, n_labels)
    scores = _scores(hits, support, guesses)
    return [
        {name: float(values[label]) for name, values in scores.items()} | {"support": int(rows)}
        for label, rows in enumerate(support)
    ]


def format_confusion(
    target: np.ndarray, predicted: np.ndarray, names: Sequence[str], max_width: int = 100
) -> str:
    """A confusion matrix as text: true labels down, predicted ones across, recall at the end.

    Columns are numbered where their names would not fit. Where numbers do not fit either, or
    there are more than MOST_SHOWN labels, the commonest confusions are listed instead.

    Args:
        target: (n,) integers, the true label of every row.
        predicted: (n,) integers, the label the model gave.
        names: text of every label.
        max_width: characters a line of the table may take; wide ones (Chinese, emoji) are two.

    Returns:
        Lines joined by newlines, none at the end.

    Raises:
        ValueError: as confusion_matrix does, but for the number of labels.
    """
    target, predicted = _checked_pair(target, predicted, len(names))
    if len(names) <= MOST_SHOWN:
        matrix, shown = confusion_matrix(target, predicted, len(names)), [*map(_shown, names)]
        numbers = [str(number) for number in range(1, len(names) + 1)]
        numbered = [f"{number} {name}" for number, name in zip(numbers, shown, strict=True)]
        for rows, columns in ((shown, shown), (numbered, numbers)):
            lines = _table(matrix, rows, columns)
            if _width(lines[0]) <= max_width:
                return "\n".join(lines)
    return "\n".join(_worst_confusions(target, predicted, names))


def _checked_pair(
    target: np.ndarray, predicted: np.ndarray, n_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    target = _checked("target", target, n_labels)
    predicted = _checked("predicted", predicted, n_labels)
    if len(target) != len(predicted):
        raise ValueError(
            f"expected as many predicted as target labels, got {len(predicted)} and "
            f"{len(target)}: pass one of each per row"
        )
    return target, predicted


def _checked(name: str, labels: np.ndarray, n_labels: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(
            f"expected {name} of shape (n,) with n > 0, got {labels.shape}: pass a label per row"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"expected {name} to hold integers, got {labels.dtype}: pass label ids, not scores"
        )
    for label in (labels.min(), labels.max()):
        if not 0 <= label < n_labels:
            raise ValueError(
                f"expected {name} in 0..{n_labels - 1}, got {label}: check n_labels={n_labels}, "
                "or leave out the rows without a label"
            )
    return labels.astype(np.int64)


def _counts(
    target: np.ndarray, predicted: np.ndarray, n_labels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per label: rows got right (hits), rows truly so (support), rows predicted so (guesses)."""
    target, predicted = _checked_pair(target, predicted, n_labels)
    right = target[target == predicted]
    return tuple(np.bincount(labels, minlength=n_labels) for labels in (right, target, predicted))


def _scores(hits: np.ndarray, support: np.ndarray, guesses: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "precision": hits / np.maximum(guesses, 1),  # no guesses, no hits: 0 / 1
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + guesses, 1),
    }


def _matthews(hits: np.ndarray, support: np.ndarray, guesses: np.ndarray) -> float:
    """Correlation of target and predicted, each seen as one-hot rows."""
    hits, support, guesses = (counts.astype(np.float64) for counts in (hits, support, guesses))
    rows = support.sum()
    spread = (rows**2 - support @ support) * (rows**2 - guesses @ guesses)
    return float((hits.sum() * rows - support @ guesses) / np.sqrt(spread)) if spread else 0.0


def _table(matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> list[str]:
    hits, support = matrix.diagonal(), matrix.sum(axis=1)
    recalls = [f"{hit / of:.1%}" if of else "-" for hit, of in zip(hits, support, strict=True)]
    cells = [["true \\ predicted", *columns, "recall"]]
    for name, counts, recall in zip(rows, matrix, recalls, strict=True):
        cells.append([name, *map(str, counts), recall])
    return _aligned(cells)


def _worst_confusions(target: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> list[str]:
    wrong = target != predicted
    pairs, counts = np.unique(target[wrong] * len(names) + predicted[wrong], return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:MOST_SHOWN]
    if not len(worst):
        return ["no confusions: every row is right"]
    cells = [["true -> predicted", "count"]]
    for pair, count in zip(pairs[worst].tolist(), counts[worst].tolist(), strict=True):
        true, guess = divmod(pair, len(names))
        cells.append([f"{_shown(names[true])} -> {_shown(names[guess])}", str(count)])
    return _aligned(cells)


def _aligned(cells: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    first, *widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *line in cells:
        padded = [" " * (w - _width(cell)) + cell for w, cell in zip(widths, line, strict=True)]
        lines.append("  ".join([name + " " * (first - _width(name)), *padded]))
    return lines


def _width(text: str) -> int:
    """Columns that a terminal gives to a text: two to a wide character, none to a mark on one."""
    unseen = ("Mn", "Me", "Cf")  # accents that stand apart, joiners, directions
    return sum(
        0 if unicodedata.category(c) in unseen else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _shown(name: str) -> str:
    """A label on one line, and not a long one."""
    name = name if len(name) <= 60 else name[:57] + "..."
    joiners = "Cf"  # belong to words of Persian and to emoji
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == joiners else repr(c)[1:-1] for c in name
    )
