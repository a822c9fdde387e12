"""minift.text_metrics against sacrebleu and rouge-score, and what no text is too short for."""

import csv
import itertools
import random
import string
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from minift.text_metrics import (
    BLEU_TOKENS,
    WORDS,
    bleu,
    chrf,
    exact_match,
    rouge,
    text_metrics,
    token_f1,
)

DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(
    not (DATA / "e2e_nlg").is_dir() or not (DATA / "tatoeba_en_zh").is_dir(),
    reason=f"real data is not at {DATA}",
)

# Few words and few marks, so that n-grams match; then anything.
WORD = st.sampled_from(["a", "b", "The", "the", "an", "7", "7.5", "1,", "x-y", "3-", "你好", "é"])
TEXT = st.one_of(
    st.lists(WORD, max_size=12).map(" ".join),
    st.text("ab1.,-'\"&$_; \n你好。、—か", max_size=12),
    st.lists(st.sampled_from(["a", "1", "-\n", "\n", "<skipped>", "&quot;", "&amp;", "lt;"])).map(
        "".join
    ),
    st.text(max_size=8),
)
ROWS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=5)
close = pytest.approx


def columns(rows) -> tuple[list[str], list[list[str]]]:
    return [text for text, _ in rows], [list(references) for _, references in rows]


def as_sacrebleu(references: list[list[str]]) -> list[list[str | None]]:
    """A list for the first reference of every row, one for the second, ...; None where none is."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]


# ---------------------------------------------------------------- equal to sacrebleu, rouge-score


@pytest.mark.parametrize("tokenize", ["13a", "zh", "char"])
@given(rows=ROWS)
@example(rows=[("", [""])])
@example(rows=[("", ["a b c d"]), ("a b c d", [""])])
@example(rows=[("a b c d", ["a x c y", "a b"])])  # smoothed twice
@example(rows=[("a b c d e", ["a b c d", "a b c d e f"])])  # equally near: the shorter
@example(rows=[("a b c d", ["a b c d e f g"])])  # too short
@example(rows=[("a a a a a", ["a a", "a a a b"])])  # as often as in the one that has most
def test_bleu_is_sacrebleus(tokenize, rows):
    """Of any texts, with any number of references."""
    hypotheses, references = columns(rows)
    theirs = BLEU(tokenize=tokenize).corpus_score(hypotheses, as_sacrebleu(references)).score
    ours = bleu(hypotheses, references, tokenize)
    assert ours == close(theirs, abs=1e-9)
    assert type(ours) is float


@pytest.mark.parametrize(("name", "theirs"), [("13a", Tokenizer13a()), ("zh", TokenizerZh())])
def test_tokens_of_every_character_are_sacrebleus(name, theirs):
    """All up to U+34FF, and what lies around each later edge: alone, in a word, beside digits."""
    edges = (0x4D00, 0x4E00, 0x9F00, 0xF900, 0xFA00, 0xFE00, 0xFF00, 0x1F600, 0x20000, 0x2F800)
    for first in (*range(0, 0x3500, 0x100), *edges):
        chars = [chr(i) for i in range(first, first + 0x100)]
        text = " ".join(f"a{c}b {c} 1{c}2 {c}3 c{c}." for c in chars)
        assert BLEU_TOKENS[name](text) == theirs(text.rstrip()).split()


def test_tokens_by_hand():
    """Marks stand apart but within numbers, and a neighbour is consumed once."""
    tokens = BLEU_TOKENS["13a"]
    assert tokens("It's 1,000.5 m-2, or 3-4.") == "It's 1,000.5 m-2 , or 3 - 4 .".split()
    assert tokens("(a.,1)") == ["(", "a", ".", ",1", ")"]
    assert tokens("&quot;a&quot; &amp;lt; co-\nop<skipped>\nend-\n") == '" a " < coop end-'.split()
    assert BLEU_TOKENS["zh"]("我3.5岁,hi。") == ["我", "3.5", "岁", ",", "hi", "。"]
    assert list(BLEU_TOKENS["char"](" a b\u3000你\n")) == ["a", "b", "你"]


@given(rows=ROWS)
@example(rows=[("", [""])])
@example(rows=[("abc", ["", "abd"]), ("ab", ["abcdefgh"])])  # orders that one side lacks
@example(rows=[("abcabc", ["abc", "abcab", "abcxyz"])])
def test_chrf_is_sacrebleus(rows):
    """Of any texts, with any number of references."""
    hypotheses, references = columns(rows)
    theirs = CHRF().corpus_score(hypotheses, as_sacrebleu(references)).score
    assert chrf(hypotheses, references) == close(theirs, abs=1e-9)
    assert type(chrf(hypotheses, references)) is float


ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge_of_google(hypotheses, references) -> dict[str, float]:
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    rows = [scorer.score_multi(row, text) for text, row in zip(hypotheses, references, strict=True)]
    return {name: 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in ROUGE}


@given(rows=ROWS)
@example(rows=[("", [""]), ("a", ["a"])])
@example(rows=[("a b c", ["a b x y z w", "c a"])])  # another reference is best for each score
@example(rows=[("b a b a a b", ["a a b b a a b a"])])
def test_rouge_is_rouge_scores(rows):
    """Of any texts, with any number of references; nothing is left of Chinese."""
    hypotheses, references = columns(rows)
    ours = rouge(hypotheses, references)
    assert ours == close(rouge_of_google(hypotheses, references), abs=1e-9)
    assert tuple(ours) == ROUGE
    assert all(type(score) is float for score in ours.values())


@given(st.text(string.printable, max_size=30), st.sampled_from(["unicode", "zh"]))
def test_words_of_ascii_are_the_same_by_all(text, tokenize):
    assert WORDS[tokenize](text) == WORDS["default"](text)


def test_words_of_other_scripts():
    """Letters with the marks on them; Chinese and kana one by one where asked for."""
    text = "Café_2 Ёлка, हिन्दी 我爱𠀀かー! ५"
    assert WORDS["default"](text) == ["caf", "2"]
    assert WORDS["unicode"](text) == ["café", "2", "ёлка", "हिन्दी", "我爱𠀀かー", "५"]
    words = ["café", "2", "ёлка", "हिन्दी", *"我爱𠀀かー", "५"]
    assert WORDS["zh"](text) == words


def test_rouge_of_chinese():
    """Four of five characters, two of four pairs, by hand; the default sees no word."""
    hypotheses, references = ["我爱吃米饭。"], [["我爱米饭吃", "x"]]
    assert rouge(hypotheses, references, "zh") == close({"rouge1": 100, "rouge2": 50, "rougeL": 80})
    assert set(rouge(hypotheses, references).values()) == {0.0}
    assert set(rouge(hypotheses, references, "unicode").values()) == {0.0}


# ---------------------------------------------------------------- exact match and token F1


@pytest.mark.parametrize(
    ("text", "references", "exact", "f1"),
    [
        ("The Beatles!", ["the  beatles"], 100, 100),
        ("an apple\tpie", ["apple", "Apple-pie"], 0, 200 * 1 / 3),
        ("a b b c", ["b c c", "b"], 0, 200 * 2 / 6),  # b, c of b b c and b c c
        ("can the", ["can"], 100, 100),  # an article is a word, not a part of one
        ("it's", ["its"], 100, 100),
        ("in 1999", ["1999", "in the year 1999"], 0, 200 * 2 / 5),
        ("x", ["y"], 0, 0),
        ("the", ["...", "b"], 100, 100),  # nothing is left of both
        ("", ["b"], 0, 0),
        ("b", [""], 0, 0),
        ("a", ["the"], 100, 100),
        ("我、好", ["我好"], 0, 0),  # one word for SQuAD, and a mark that it does not know
    ],
)
def test_exact_match_and_f1_by_hand(text, references, exact, f1):
    """Beside a row that is right, both are means over rows."""
    assert exact_match([text, "b"], [references, ["b"]]) == close((exact + 100) / 2)
    assert token_f1([text, "b"], [references, ["b"]]) == close((f1 + 100) / 2)


def test_f1_of_other_words():
    """Chinese characters are words where asked for, and punctuation is none."""
    assert token_f1(["我、好"], [["我好"]], "zh") == 100
    assert token_f1(["The 我吃"], [["我好"]], "zh") == close(50)
    assert token_f1(["我、好 b"], [["我 好", "c"]], "unicode") == close(80)


@given(rows=ROWS)
def test_f1_is_at_least_the_exact_match(rows):
    """A text that is right is right for both."""
    hypotheses, references = columns(rows)
    assert 0 <= exact_match(hypotheses, references) <= token_f1(hypotheses, references) + 1e-9


# ---------------------------------------------------------------- all of them

LONG = "a good place to eat, by the river"


def test_text_metrics_are_the_metrics():
    """By the names that are logged, floats all; the tokenization reaches each that has one."""
    hypotheses, references = [LONG, "我爱米饭。吃饭"], [[LONG + " side"], ["我爱米饭、吃"]]
    for tokenize, blue in {"default": "13a", "unicode": "13a", "zh": "zh"}.items():
        ours = text_metrics(hypotheses, references, tokenize)
        assert ours == {
            "bleu": bleu(hypotheses, references, blue),
            "chrf": chrf(hypotheses, references),
            **rouge(hypotheses, references, tokenize),
            "exact_match": exact_match(hypotheses, references),
            "f1": token_f1(hypotheses, references, tokenize),
        }
        assert list(ours) == ["bleu", "chrf", *ROUGE, "exact_match", "f1"]
        assert all(type(value) is float for value in ours.values())


@pytest.mark.parametrize(
    ("references", "text", "words", "other"),
    [
        (["我爱米饭 abc", "你好"], "我 爱abc", "zh", "unicode"),
        (["我爱ab"], "我 ab", "default", "zh"),  # as many others
        (["我爱米ab"], "我 ab", "zh", "default"),
        (["たべもの"], "た べ", "zh", "unicode"),
        (["Привет мир", "abc"], "мир", "unicode", "default"),
        (["abc йцу"], "йцу", "default", "unicode"),
        (["abc йцук"], "йцук", "unicode", "default"),
        (["한국어 말"], "말", "unicode", "default"),
        (["café à la crème"], "café la", "default", "unicode"),
        (["12 34²"], "34", "default", "unicode"),  # no letters at all
    ],
)
def test_words_are_chosen_by_most_letters_of_the_references(references, text, words, other):
    """Not of the hypotheses: a model that writes nonsense is scored as before."""
    nonsense = "我 йцу abc, 我爱米饭 мир! たべもの 말 " * 9
    hypotheses, references = [text, nonsense], [references, ["1"]]
    chosen = text_metrics(hypotheses, references)
    assert chosen == text_metrics(hypotheses, references, words)
    assert chosen != text_metrics(hypotheses, references, other)


def test_a_right_text_has_all():
    """100 for each score, of a text of four words or more; a wrong one has nothing of any."""
    full = text_metrics([LONG, "x"], [["y", LONG], ["x"]])
    assert full == {name: close(100) for name in full} | {"rouge2": 50}  # one word has no pair
    assert set(text_metrics(["b c d e"], [["w x y z"]]).values()) == {0.0}


@pytest.mark.parametrize("text", ["", " ", "x", "我", ".", "\n"])
def test_the_shortest_texts(text):
    """Scores of nothing and of one character, as text and as reference, are numbers in range."""
    right = text_metrics([text], [[text]])
    assert right["exact_match"] == right["f1"] == 100
    assert right["bleu"] == right["rouge2"] == 0
    assert right["chrf"] == (close(100) if text.strip() else 0)
    assert right["rouge1"] == right["rougeL"] == (100 if text.isalpha() else 0)
    for wrong in (text_metrics([text], [["bcde"]]), text_metrics(["bcde"], [[text]])):
        assert set(wrong.values()) == {0.0}


@pytest.mark.parametrize("score", [text_metrics, bleu, chrf, rouge, exact_match, token_f1])
def test_what_cannot_be_scored_is_refused(score):
    """No rows, another number of lists, no reference, a text for a list of texts."""
    with pytest.raises(ValueError, match=r"expected hypotheses .* got 0 and 0: pass a list"):
        score([], [])
    with pytest.raises(ValueError, match=r"got 1 and 2: pass a list for each text"):
        score(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"references for row 1, got \[\]: pass one text"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"references for row 0, got 'abc': pass one text"):
        score(["a"], ["abc"])


@pytest.mark.parametrize("score", [text_metrics, bleu, rouge, token_f1])
def test_unknown_tokenizations_are_refused(score):
    with pytest.raises(ValueError, match=r"expected tokenize to be one of .*, zh, .* got 'intl'"):
        score(["a"], [["a"]], "intl")


def test_rouge_is_quick():
    """1,000 rows of 50 words in under 2 s of processor time; a table of 50 by 50 takes longer."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefghij", k=50)) for _ in range(2000)]
    start = time.process_time()
    scores = rouge(texts[:1000], [[text] for text in texts[1000:]])
    assert time.process_time() - start < 2
    assert 40 < scores["rougeL"] < 60


# ---------------------------------------------------------------- real texts


def shuffled(texts: list[str]) -> list[str]:
    """Texts with a few words dropped and swapped, as a model would write them."""
    draw, changed = random.Random(0), []
    for text in texts:
        words = [word for word in text.split(" ") if draw.random() < 0.9]
        if len(words) > 3 and draw.random() < 0.5:
            words[1], words[2] = words[2], words[1]
        changed.append(" ".join(words))
    return changed


@needs_data
def test_real_english():
    """120 rows of E2E with all their references, as sacrebleu and rouge-score see them."""
    rows: dict[str, list[str]] = {}
    with (DATA / "e2e_nlg/testset_w_refs.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["mr"], []).append(row["ref"])
    references = list(rows.values())[:120]
    hypotheses = shuffled([row[0] for row in references])
    ours, theirs = text_metrics(hypotheses, references), as_sacrebleu(references)
    assert max(map(len, references)) > 2
    assert 50 < ours["bleu"] < 95
    assert ours["bleu"] == close(BLEU().corpus_score(hypotheses, theirs).score, abs=1e-9)
    assert ours["chrf"] == close(CHRF().corpus_score(hypotheses, theirs).score, abs=1e-9)
    assert {name: ours[name] for name in ROUGE} == close(rouge_of_google(hypotheses, references))


@needs_data
def test_real_chinese():
    """Every 30th pair of Tatoeba, in Chinese: scored beside the pair before, told to be Chinese."""
    lines = (DATA / "tatoeba_en_zh/cmn.txt").read_text("utf-8").splitlines()
    texts = [line.split("\t")[1] for line in lines[::30]]
    references = [list(pair) for pair in itertools.pairwise(texts)]
    hypotheses = [text[: len(text) // 2] + other[-2:] for text, other in references]
    ours, theirs = text_metrics(hypotheses, references), as_sacrebleu(references)
    assert ours == text_metrics(hypotheses, references, "zh")
    scores = BLEU(tokenize="zh").corpus_score(hypotheses, theirs).score
    assert ours["bleu"] == close(scores, abs=1e-9)
    assert ours["chrf"] == close(CHRF().corpus_score(hypotheses, theirs).score, abs=1e-9)
    assert 20 < ours["rougeL"] <= ours["rouge1"] < 100
