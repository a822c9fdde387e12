"""Exact match and F1 of answers: hand-made cases, and the definition written plainly."""

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.answer_metrics import best_threshold, score_answer


def naive(text: str, reference: str) -> tuple[float, float]:
    """SQuAD's definition of one reference, in its own order of steps."""

    def words(s):
        s = "".join(c for c in s.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", s).split()

    got, want = words(text), words(reference)
    common = sum((Counter(got) & Counter(want)).values())
    if not got or not want:
        return float(got == want), float(got == want)
    if not common:
        return 0.0, 0.0
    precision, recall = common / len(got), common / len(want)
    return float(got == want), 2 * precision * recall / (precision + recall)


TEXT = st.lists(st.sampled_from(["the", "An", "king", "King,", "a.", "of", "x-y", "!", ""])).map(
    " ".join
)


@settings(max_examples=40)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_it_is_the_definition(text, references):
    """The best reference, of those that have a word."""
    usable = [r for r in references if naive("x", r) != naive("x", "") or naive("", r)[0] == 0]
    scores = [naive(text, r) for r in usable or [""]]
    assert score_answer(text, references) == pytest.approx(
        (max(s[0] for s in scores), max(s[1] for s in scores))
    )


@pytest.mark.parametrize(
    ("text", "references", "exact", "f1"),
    [
        ("The King.", ["a king"], 1, 1),
        ("king John", ["John", "John of England"], 0, 2 / 3),
        ("", [], 1, 1),
        ("john", [], 0, 0),
        ("", ["john"], 0, 0),
        ("the", [], 1, 1),  # nothing but an article is no answer
        ("北京市", ["北京"], 0, 4 / 5),
        ("《北京》。", ["北京"], 1, 1),  # punctuation of other scripts
        ("1949年", ["1949年10月"], 0, 4 / 6),  # 1949 年 | 1949 年 10 月
    ],
)
def test_by_hand(text, references, exact, f1):
    assert score_answer(text, references) == pytest.approx((exact, f1))


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 1])),
        min_size=1,
        max_size=12,
    )
)
def test_no_threshold_is_better(rows):
    """Against every threshold that tells two questions apart."""
    differences, answered, empty = np.array(rows, np.float64).T

    def total(threshold):
        return np.where(differences > threshold, empty, answered).sum()

    assert total(best_threshold(differences, answered, empty)) == max(
        total(t) for t in np.arange(-4, 5) + 0.5
    )
