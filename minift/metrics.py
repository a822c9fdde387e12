"""How right a classifier is: counts, scores and a confusion matrix as text. No model needed."""

from collections.abc import Sequence

import numpy as np

MOST_SHOWN = 20  # labels in a table, or confusions in a list: more would not be read


def confusion_matrix(target: np.ndarray, predicted: np.ndarray, n_labels: int) -> np.ndarray:
    """How often each label was taken for each other one.

    Args:
        target: (n,) integers, the true label of every row, each in 0..n_labels-1.
        predicted: (n,) integers, the label the model gave, each in 0..n_labels-1.
        n_labels: labels there are, present in these rows or not.

    Returns:
        (n_labels, n_labels) int64, rows counted: [i, j] were truly i and predicted j.

    Raises:
        ValueError: an input is empty, not 1-d, not integer or out of range, or lengths differ.
    """
    target = _checked("target", target, n_labels)
    predicted = _checked("predicted", predicted, n_labels)
    if len(target) != len(predicted):
        raise ValueError(
            f"expected as many predicted as target labels, got {len(predicted)} and "
            f"{len(target)}: pass one of each per row"
        )
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
        names: text of every label. Given, "f1/<name>" is added for each.

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
    matrix = confusion_matrix(target, predicted, n_labels)
    hits, support, guesses = _margins(matrix)
    rows = int(support.sum())
    accuracy = float(hits.sum() / rows)
    present = (support + guesses) > 0
    metrics: dict[str, float | int] = {
        "n": rows,
        "accuracy": accuracy,
        "majority_accuracy": float(support.max() / rows),
        "mcc": _matthews(matrix),
    }
    for name, scores in _scores(matrix).items():
        macro = float(scores[present].mean())
        metrics[name] = metrics[f"{name}_macro"] = macro
        metrics[f"{name}_micro"] = accuracy  # every row has one label, so pooled they agree
        metrics[f"{name}_weighted"] = float(scores @ support / rows)
        if names is not None and name == "f1":
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
    matrix = confusion_matrix(target, predicted, n_labels)
    scores = _scores(matrix)
    return [
        {name: float(values[label]) for name, values in scores.items()} | {"support": int(support)}
        for label, support in enumerate(matrix.sum(axis=1))
    ]


def format_confusion(matrix: np.ndarray, names: Sequence[str], max_width: int = 100) -> str:
    """A confusion matrix as text: true labels down, predicted ones across, recall at the end.

    Columns are numbered where their names would not fit. Where numbers do not fit either, or
    there are more than MOST_SHOWN labels, the commonest confusions are listed instead.

    Args:
        matrix: (n_labels, n_labels) integers, as confusion_matrix returns.
        names: text of every label.
        max_width: characters a line of the table may take.

    Returns:
        Lines joined by newlines, none at the end.

    Raises:
        ValueError: `matrix` is not square with one row for every name.
    """
    matrix = np.asarray(matrix)
    if not len(names) or matrix.shape != (len(names), len(names)):
        raise ValueError(
            f"expected a square matrix with a row for each of {len(names)} names, got shape "
            f"{matrix.shape}: pass what confusion_matrix returned and the name of every label"
        )
    numbers = [str(number) for number in range(1, len(names) + 1)]
    numbered = [f"{number} {name}" for number, name in zip(numbers, names, strict=True)]
    for rows, columns in ((names, names), (numbered, numbers)):
        lines = _table(matrix, rows, columns)
        if len(names) <= MOST_SHOWN and len(lines[0]) <= max_width:
            return "\n".join(lines)
    return "\n".join(_worst_confusions(matrix, names))


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


def _margins(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per label: rows got right, rows truly so (support), rows predicted so (guesses)."""
    return matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)


def _scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    hits, support, guesses = _margins(matrix)
    return {
        "precision": hits / np.maximum(guesses, 1),  # no guesses, no hits: 0 / 1
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + guesses, 1),
    }


def _matthews(matrix: np.ndarray) -> float:
    """Correlation of target and predicted, each seen as one-hot rows."""
    hits, support, guesses = (counts.astype(np.float64) for counts in _margins(matrix))
    rows = support.sum()
    spread = (rows**2 - support @ support) * (rows**2 - guesses @ guesses)
    return float((hits.sum() * rows - support @ guesses) / np.sqrt(spread)) if spread else 0.0


def _table(matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> list[str]:
    hits, support, _ = _margins(matrix)
    recalls = [f"{hit / of:.1%}" if of else "-" for hit, of in zip(hits, support, strict=True)]
    cells = [["true \\ predicted", *columns, "recall"]]
    for name, counts, recall in zip(rows, matrix, recalls, strict=True):
        cells.append([name, *map(str, counts), recall])
    first, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([name.ljust(first), *map(str.rjust, line, widths)]) for name, *line in cells]


def _worst_confusions(matrix: np.ndarray, names: Sequence[str]) -> list[str]:
    wrong = matrix * (1 - np.eye(len(names), dtype=matrix.dtype))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MOST_SHOWN]
    pairs = [(*divmod(int(flat), len(names)), int(wrong.flat[flat])) for flat in worst]
    found = [
        (f"{names[true]} -> {names[guess]}", str(count)) for true, guess, count in pairs if count
    ]
    if not found:
        return ["no confusions: every row is right"]
    cells = [("true -> predicted", "count"), *found]
    first, last = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [f"{pair.ljust(first)}  {count.rjust(last)}" for pair, count in cells]
