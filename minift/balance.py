"""Labels that are not equally frequent: what one costs in the loss, how often its rows are drawn,
and when to warn."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from .errors import InputError, Notice

RATIO, RARE = 10, 0.1  # commonest label to rarest one, and the rarest one's share of the rows
FEW, LITTLE = 10, 0.01  # rows of a label that is too rare where rows have any number of them


def label_weights(
    flag: str, text: str, names: Sequence[str], balanced: Callable[[], Iterable[float]]
) -> tuple[float, ...] | None:
    """One weight a label, from a flag.

    Args:
        flag: its name, for errors.
        text: '' for none; 'balanced'; or 'name=number,...' for every label.
        names: the labels, in the order of the head.
        balanced: what that means, such as `by_frequency`.

    Raises:
        InputError: a label is unknown or left out, or a number is not above 0.
    """
    if not text:
        return None
    if text == "balanced":
        return tuple(balanced())
    # A label may hold '=' and ',': only where a number ends does the next label begin.
    *parts, rest = re.split(r"=([^=,]*)(?:,|$)", text)
    given = [name.strip() for name in parts[::2]]
    try:
        weights = dict(zip(given, map(float, parts[1::2]), strict=True))
    except ValueError:
        weights = {}
    fits = len(given) == len(names) and set(weights) == set(names) and not rest.strip()
    if not fits or not all(0 < w < 1e9 for w in weights.values()):
        example = ",".join(f"{name}=1" for name in names[:3]) + ",..." * (len(names) > 3)
        wanted = f"'balanced' or a number above 0 for every label, as {example!r}"
        raise InputError(f"expected {flag} {wanted}, got {text!r}")
    return tuple(weights[name] for name in names)


def by_frequency(names: Sequence[str], found: Iterable[str]) -> list[float]:
    """Of each label all rows / (labels * its rows), as scikit-learn balances: labels that are not
    `found` count as if they had one row.

    Args:
        names: the labels.
        found: those of the training rows.
    """
    count = Counter(found)
    return [count.total() / (len(names) * max(1, count[name])) for name in names]


def row_weights(weights: Sequence[float] | None, targets: Sequence[int]) -> np.ndarray | None:
    """(N,) float64: what the chance to be drawn of each training row is proportional to.

    Args:
        weights: one a label; None: there are none.
        targets: number of the label of each row.
    """
    if weights is None:
        return None
    # No two alike, by a hair: rows of one label lie together where `Batches.order` sorts them.
    apart = np.array(weights) * (1 + 1e-9 * np.arange(len(weights)))
    return apart[np.asarray(targets)]


def imbalance(
    found: Sequence[str],
    class_weights: Sequence[float] | None = None,
    sampling_weights: Sequence[float] | None = None,
) -> Iterator[Notice]:
    """Warns of labels of which one has at least `RATIO` times the rows of another, which has less
    than `RARE` of all, if nothing is done about it; and if it is done twice.

    Args:
        found: the label of each training row.
        class_weights: what is counted; see `label_weights`.
        sampling_weights: what is drawn.
    """
    if class_weights and sampling_weights:
        text = "class_weights and sampling_weights are both set: rare labels may count twice over"
        yield Notice(f"{text}; one of them is mostly enough", loud=True)
    if class_weights or sampling_weights:
        return
    often = Counter(found).most_common()
    (most, many), (least, few) = often[0], often[-1]
    if many >= RATIO * few and few < RARE * len(found):
        yield Notice(
            f"the labels are imbalanced: {most!r} has {many:,} training rows, {least!r} {few:,}: "
            "look at f1, not at accuracy; --sampling_weights balanced draws rare labels more "
            "often, --class_weights balanced lets them count for more",
            loud=True,
        )


def rare(found: Iterable[str], total: int, unit: str) -> Iterator[Notice]:
    """Warns of labels that are hardly ever there: less than `FEW` times, or in less than `LITTLE`
    of all rows, and the commonest one at least `RATIO` times as often.

    Args:
        found: labels, as often as they are given.
        total: rows, or whatever else has labels.
        unit: what that is: 'rows'.
    """
    often = Counter(found).most_common()
    few = [
        f"{name!r} {n:,}"
        for name, n in reversed(often)
        if n < max(FEW, LITTLE * total) and n * RATIO <= often[0][1]
    ]
    if few:
        shown = f"{', '.join(few[:3])}{', ...' * (len(few) > 3)}"
        yield Notice(
            f"{len(few):,} of {len(often):,} labels are rare in {total:,} training {unit} "
            f"({shown}; {often[0][0]!r} {often[0][1]:,}): look at their own f1; "
            "--class_weights balanced lets them count for more",
            loud=True,
        )
