"""minift/span_metrics.py against seqeval, on tags of every kind, illegal ones too."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as seqeval_default
from seqeval.metrics.v1 import precision_recall_fscore_support as seqeval_strict
from seqeval.scheme import BILOU, IOB2, IOBES, Entities

from minift.span_metrics import (
    LETTERS,
    all_tags,
    entities,
    is_iob1,
    scheme_of,
    span_metrics,
    strict_entities,
    tags_of,
)

SCHEMES = {"IOB2": IOB2, "IOBES": IOBES, "BILOU": BILOU}
KINDS = ("a", "b-c", "d")
SAME = str.maketrans("LU", "ES")
few = settings(max_examples=50)


def labels_of(scheme: str) -> tuple[str, ...]:
    return "O", *(f"{letter}-{kind}" for kind in KINDS for letter in LETTERS[scheme])


def tags(scheme: str, size: int = 8):
    return st.lists(st.sampled_from(labels_of(scheme)), min_size=size, max_size=size)


@st.composite
def both_sides(draw):
    """A scheme, true sentences and predicted ones, legal or not."""
    scheme = draw(st.sampled_from(list(SCHEMES)))
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    return scheme, *([draw(tags(scheme, n)) for n in sizes] for _ in range(2))


@few
@given(both_sides())
def test_entities_are_seqevals(sides):
    """Both readings of any sequence; seqeval's default does not know L and U, so it is given E and
    S in their place."""
    scheme, sentences, _ = sides
    for sentence in sentences:
        known = [tag[0].translate(SAME) + tag[1:] for tag in sentence]
        want = [(begin, end + 1, kind) for kind, begin, end in get_entities(known)]
        assert entities(sentence) == want
        strict = Entities([sentence], SCHEMES[scheme]).entities[0]
        assert strict_entities(sentence, scheme) == [(e.start, e.end, e.tag) for e in strict]


@few
@given(both_sides())
def test_scores_are_seqevals(sides):
    """Pooled, as means, weighted and of each type, in the default and the strict mode."""
    scheme, gold, predicted = sides
    got = span_metrics(gold, predicted, labels_of(scheme))
    known = [
        [[t[0].translate(SAME) + t[1:] for t in s] for s in side] for side in (gold, predicted)
    ]
    for suffix, peer, given_tags, more in (
        ("", seqeval_default, known, {}),
        ("_strict", seqeval_strict, (gold, predicted), {"scheme": SCHEMES[scheme]}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of divisions by zero
            count = [s for side in given_tags for s in side if entities(s)]
            if suffix:
                count = [s for side in given_tags for s in side if strict_entities(s, scheme)]
            for average, name in (("micro", ""), ("macro", "_macro"), ("weighted", "_weighted")):
                keys = [f"{score}{suffix}{name}" for score in ("precision", "recall", "f1")]
                want = [0.0] * 3  # seqeval fails where there are no types at all
                if count:
                    want = peer(*given_tags, average=average, zero_division=0, **more)[:3]
                assert [got[key] for key in keys] == pytest.approx([float(x) for x in want])
            if not suffix and count:
                each = peer(*given_tags, average=None, zero_division=0)[2]
                kinds = {kind for s in gold + predicted for *_, kind in entities(s)}
                assert [got[f"f1/{kind}"] for kind in sorted(kinds)] == pytest.approx(list(each))


def test_a_small_case_by_hand():
    """One of two entities is found, and one that is not there; a type that no row has scores 0."""
    gold = [["B-a", "I-a", "O", "B-b"], ["O"]]
    predicted = [["B-a", "I-a", "O", "I-b"], ["B-a"]]
    got = span_metrics(gold, predicted, ("O", "B-a", "I-a", "B-b", "I-b", "B-c", "I-c"))
    assert (got["entities"], got["precision"], got["recall"]) == (2, pytest.approx(2 / 3), 1)
    assert (got["precision_strict"], got["recall_strict"], got["f1_strict"]) == (0.5, 0.5, 0.5)
    assert (got["f1/a"], got["f1/b"], got["f1/c"]) == (pytest.approx(2 / 3), 1, 0)


@few
@given(both_sides())
def test_entities_written_as_tags_are_read_again(sides):
    """By both readings: so rewriting the entities of illegal tags makes them legal."""
    scheme, sentences, _ = sides
    for sentence in sentences:
        found = entities(sentence)
        legal = tags_of(found, len(sentence), scheme)
        assert entities(legal) == strict_entities(legal, scheme) == found


@pytest.mark.parametrize(
    ("given_tags", "scheme"),
    [
        ({"O", "B-x"}, "IOB2"),
        ({"O", "I-x"}, "IOB2"),
        ({"B-x", "I-x", "E-x"}, "IOBES"),
        ({"O", "S-x"}, "IOBES"),
        ({"O", "U-x", "L-y"}, "BILOU"),
        ({"B-x", "E-x", "U-x"}, "plain"),
        ({"O"}, "plain"),
        ({"NOUN", "O"}, "plain"),
        ({"B-x", "NOUN"}, "plain"),
        ({"O", "B-"}, "plain"),
    ],
)
def test_the_scheme_of_tags(given_tags, scheme):
    assert scheme_of(given_tags) == scheme


def test_iob1_is_told_by_where_b_stands():
    """Its B stands behind an entity of the same type alone, and its I begins entities."""
    assert is_iob1([["I-a", "I-a", "B-a", "I-b", "O"]])
    assert not is_iob1([["I-a", "O"], ["O", "B-a"]])
    assert not is_iob1([["I-a", "B-b"]])
    assert not is_iob1([["O", "O"]])


def test_all_tags_of_a_type():
    """Those that the rows lack too, since others may have them; of other tags those there are."""
    assert all_tags(["S-x", "O"]) == ("O", "B-x", "I-x", "E-x", "S-x")
    assert all_tags(["B-y", "B-x"]) == ("O", "B-x", "I-x", "B-y", "I-y")
    assert all_tags(["VERB", "NOUN"]) == ("NOUN", "VERB")
