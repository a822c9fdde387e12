"""How near an answer is to its references: exact match and F1 of words, in 0..1.

Rajpurkar et al. 2016, arXiv:1606.05250 (SQuAD 1.1) and 2018, arXiv:1806.03822 (2.0), and the
arithmetic of their evaluation script: lower case, without punctuation, articles and spaces beside
spaces; of several references the best one counts. A question without an answer has none, and only
an empty answer is right.

Where Chinese characters or kana stand, each is a word, and punctuation of all scripts goes (as for
DRCD, Shao et al. 2018, arXiv:1806.00920).
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Written without spaces: kana and every Chinese character.
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def words_of(text: str) -> list[str]:
    """What is compared of an answer."""
    text = text.lower()
    if UNSPACED.search(text):
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
        text = UNSPACED.sub(lambda found: f" {found[0]} ", text)
    return ARTICLES.sub(" ", text.translate(NO_PUNCTUATION)).split()


def score_answer(text: str, references: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of an answer, each that of its best reference.

    Args:
        text: "": there is no answer.
        references: right answers; none, or none with a word: there is no answer.
    """
    words = words_of(text)
    right = [found for found in map(words_of, references) if found] or [[]]
    return float(words in right), max(_f1(words, other) for other in right)


def _f1(words: list[str], other: list[str]) -> float:
    if not words or not other:
        return float(words == other)
    same = (Counter(words) & Counter(other)).total()
    return 2 * same / (len(words) + len(other))


def best_threshold(differences: np.ndarray, answered: np.ndarray, empty: np.ndarray) -> float:
    """The threshold with the highest sum of scores: what lies above it gets no answer.

    Of thresholds that are as good the lowest; in the middle between two differences.

    Args:
        differences: (N,) score of no answer, minus that of the best answer.
        answered: (N,) what the best answer would score.
        empty: (N,) what no answer would.
    """
    order = np.argsort(differences, kind="stable")
    sorted_ = differences[order]
    # gains[k]: of answering the k questions that are surest to have an answer.
    gains = np.concatenate([[0.0], np.cumsum((answered - empty)[order])])
    ends = np.concatenate([[True], sorted_[1:] > sorted_[:-1], [True]])  # between equal ones: no
    k = int(np.argmax(np.where(ends, gains, -np.inf)))
    low = sorted_[k - 1] if k else sorted_[0] - 2
    high = sorted_[k] if k < len(sorted_) else sorted_[-1] + 2
    return float((low + high) / 2)
