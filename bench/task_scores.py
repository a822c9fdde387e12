"""How good answers are, whoever gave them: one arithmetic for every trainer of bench.tasks."""

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(task: str, right: Sequence[Any], given: Sequence[Any]) -> dict[str, float]:
    """All metrics of a task.

    Args:
        task: classification, regression, tagging or qa.
        right: for each row a label, a number, tags of words, or texts any of which is an answer.
        given: the same, but one text for a question. What has no answer, also a word, is None.
    """
    if len(right) != len(given):
        raise ValueError(f"expected {len(right):,} answers, got {len(given):,}")
    measure = {"classification": classes, "regression": numbers, "tagging": tags, "qa": texts}
    return measure[task](right, given)


def classes(right: Sequence[str], given: Sequence[str]) -> dict[str, float]:
    """Share of rows with the right label."""
    return {"accuracy": sum(a == b for a, b in zip(right, given, strict=True)) / len(right)}


def numbers(right: Sequence[float], given: Sequence[float]) -> dict[str, float]:
    """Pearson's correlation; 0 where one side is constant."""
    right, given = np.asarray(right, np.float64), np.asarray(given, np.float64)
    error = float(((right - given) ** 2).mean())
    constant = np.ptp(right) == 0 or np.ptp(given) == 0
    return {"pearson": 0.0 if constant else float(np.corrcoef(right, given)[0, 1]), "mse": error}


def tags(right: Sequence[list[str]], given: Sequence[list[str | None]]) -> dict[str, float]:
    """Share of words with the right tag; of entities, seqeval's F1."""
    from seqeval.metrics import f1_score

    pairs = [pair for a, b in zip(right, given, strict=True) for pair in zip(a, b, strict=True)]
    found = {"accuracy": sum(a == b for a, b in pairs) / len(pairs)}
    if any(tag.startswith("B-") for tag, _ in pairs):
        known = [[tag or "O" for tag in row] for row in given]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no entity found in a run of few steps
            found["f1"] = float(f1_score([list(row) for row in right], known, zero_division=0))
    return found


def texts(right: Sequence[list[str]], given: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and F1 (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1): the best
    over the right answers, means over the questions."""
    given = [text or "" for text in given]
    exact = [max(plain(a) == plain(b) for a in answers)
             for answers, b in zip(right, given, strict=True)]  # fmt: skip
    f1 = [max(shared(a, b) for a in answers) for answers, b in zip(right, given, strict=True)]
    return {"exact_match": sum(exact) / len(exact), "f1": sum(f1) / len(f1)}


def plain(text: str) -> str:
    """In small letters, without punctuation, articles and spare spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def shared(right: str, given: str) -> float:
    """F1 of the words of two texts."""
    a, b = plain(right).split(), plain(given).split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0
