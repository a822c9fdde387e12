"""Windows of a context, the tokens of an answer, and the best spans, free ones and chosen ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.answer_spans import (
    NOWHERE,
    best_spans,
    chosen_spans,
    free_spans,
    tokens_at,
    window_begins,
)


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 60), st.data())
def test_windows_hold_every_token(tokens, room, shared, data):
    """Each is in a window, none is empty, and a span of one token more than neighbours share is
    whole in one of them."""
    begins = window_begins(tokens, room, shared)
    assert sorted({t for b in begins for t in range(b, min(b + room, tokens))}) == list(
        range(tokens)
    )
    assert all(b < tokens for b in begins)
    length = min(min(shared, room // 2) + 1, tokens)
    at = data.draw(st.integers(0, tokens - length))
    assert any(b <= at and at + length <= b + room for b in begins)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_best_spans_are_the_best_of_all(n, longest, count, seed):
    """Against every span, one by one."""
    begins, ends = np.random.default_rng(seed).normal(size=(2, n))
    every = [(begins[b] + ends[e], b, e) for b in range(n) for e in range(b, min(n, b + longest))]
    found = best_spans(begins, ends, longest, count)
    want = sorted(every, reverse=True)[:count]
    np.testing.assert_allclose([s for *_, s in found], [s for s, *_ in want])
    assert [(b, e) for b, e, _ in found] == [(b, e) for _, b, e in want]


CONTEXT = "we saw  New York"
OFFSETS = np.array([[0, 2], [3, 6], [6, 11], [12, 16]], np.int32)  # the third holds two spaces


@pytest.mark.parametrize(
    ("characters", "tokens"),
    [((3, 6), (1, 1)), ((8, 16), (2, 3)), ((9, 10), (2, 2)), ((0, 4), (0, 1)), ((2, 3), (1, 0))],
)
def test_tokens_of_characters(characters, tokens):
    """Those that hold a part of them; of a space between tokens none: the first is behind."""
    assert tokens_at(OFFSETS, *characters) == tokens


def test_chosen_spans():
    """The sum of the logits of both ends; what is not wholly in the window is left out."""
    logits = np.array([[1, 2], [3, 5], [7, 11], [13, np.nan]])
    choices = [(3, 6), (8, 11), (3, 11), (8, 16), (2, 3)]
    found = list(chosen_spans(logits, OFFSETS, choices))
    assert found == [((3, 6), 8), ((8, 11), 18), ((3, 11), 14), ((8, 16), NOWHERE)]
    assert list(chosen_spans(logits[1:3], OFFSETS[1:3], choices)) == found[:3]
    assert list(chosen_spans(logits[2:], OFFSETS[2:], [(3, 6), (3, 11)])) == []
    assert list(chosen_spans(logits[:2], OFFSETS[:2], [(3, 11), (8, 11)])) == []


def test_free_spans_have_no_space_around_them():
    logits = np.array([[0, 0], [0, 0], [9, 0], [0, 9.0]])
    ((ends, score),) = free_spans(logits, OFFSETS, CONTEXT, 2, 1)
    assert (CONTEXT[slice(*ends)], score) == ("New York", 18)
