"""Which rows train and which judge: left out, split off, standing on both sides."""

import random
from collections import Counter
from dataclasses import replace

from .data import Row
from .errors import InputError


def with_texts(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(the rows that have a text, and a second one where there are pairs; the others)."""
    parts: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        blank = not row.text.strip() or (row.pair is not None and not row.pair.strip())
        parts[blank].append(row)
    return parts


def overlap(train: list[Row], other: list[Row]) -> int:
    """How many rows of `other` have a text, or pair, that stands in `train` as well.

    Case and the amount of white space make no difference.
    """
    counts = Counter(map(_folded, other))
    both = {key for key in map(_folded, train) if key in counts}
    return sum(counts[key] for key in both)


def stratified_split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, validation), both in the order of `rows`: a pure function of its arguments.

    Args:
        rows: what to split.
        fraction: share of each label's rows that goes to validation, rounded. A label keeps at
            least one row in train and, if it has two or more and `fraction` is above 0, at least
            one in validation.
        seed: chooses the rows.

    Raises:
        InputError: `fraction` is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise InputError(
            f"validation fraction: expected at least 0 and below 1, got {fraction}: use 0.1"
        )
    members: dict[str | None, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.label, []).append(i)
    rng = random.Random(seed)
    held_out: set[int] = set()
    for indices in members.values():
        share = max(int(len(indices) * fraction + 0.5), fraction > 0)
        held_out.update(rng.sample(indices, min(share, len(indices) - 1)))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [row for i, row in enumerate(rows) if i in held_out]


def split_texts(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, validation) of running texts, in the order of `rows`; of a single text the end, from
    the begin of a line, is the second.

    Args:
        rows: documents.
        fraction: share of the documents, or of the characters of a single one, that is held out.
        seed: chooses the documents.
    """
    if len(rows) > 1:
        share = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
        held_out = set(random.Random(seed).sample(range(len(rows)), share))
        parts: tuple[list[Row], list[Row]] = [], []
        for i, row in enumerate(rows):
            parts[i in held_out].append(row)
        return parts
    (row,) = rows
    cut = int(len(row.text) * (1 - fraction))
    cut = row.text.find("\n", cut) + 1 or cut
    head, tail = row.text[:cut], row.text[cut:]
    return [replace(row, text=head)], [replace(row, text=tail)] if tail.strip() else []


def _folded(row: Row) -> tuple[str, ...]:
    texts = (row.text,) if row.pair is None else (row.text, row.pair)
    return tuple(" ".join(text.split()).casefold() for text in texts)
