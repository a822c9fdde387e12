"""How near generated texts come to their references: BLEU, chrF, ROUGE, exact match, token F1.

Every function takes n generated texts and n lists of references, one or more in each, and gives
scores in 0..100. It raises ValueError where there are no rows, the lengths differ or a row has no
reference; a text may be empty. BLEU and chrF pool the n-grams of all rows, the others are means
over rows. They equal sacrebleu 2.6 and rouge-score 0.1.2, and follow SQuAD's own evaluation.
"""

import functools
import math
import operator
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

BLEU_ORDER = 4  # words of the longest n-grams
CHRF_ORDER = 6  # characters of the longest n-grams
ROUGE_ORDER = 2  # words of the longest n-grams
CHRF_BETA = 2  # recall counts twice as much as precision

# mteval-v13a reads these before it splits a text.
ESCAPES = (("<skipped>", ""), ("-\n", ""), ("\n", " "),
           ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))  # fmt: skip
# Its marks stand apart, but for ' and for what may be part of a number.
MARKS = str.maketrans({mark: f" {mark} " for mark in set(string.punctuation) - set("',-.")})
# A full stop or comma stands apart if there is no digit before or none after, a dash after a digit.
# The neighbour is consumed, so of two in a row ("a.,1") only the first does, as in the standard.
NUMBER_MARKS = (
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"(?<=[0-9])-"), " - "),
)
# What sacrebleu's zh sets apart. It takes U+20000 for U+2000 and "0", so that general punctuation,
# arrows and mathematics are in, and what lies beyond U+FFFF is not; nor is kana.
CHINESE = re.compile(
    "[\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5"
    "\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef]"
)
# Written without spaces: kana and every Chinese character.
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

Texts = Sequence[str]
References = Sequence[Sequence[str]]


def text_metrics(
    hypotheses: Texts, references: References, tokenize: str = "auto"
) -> dict[str, float]:
    """All scores of generated texts, as a trainer logs them.

    Args:
        hypotheses: n generated texts.
        references: n lists of right ones.
        tokenize: "default", "zh" or "unicode", the words of ROUGE and F1 (see `rouge`); BLEU takes
            "zh" with "zh" and "13a" with the others. "auto": by most letters of the references:
            "zh" where they are Chinese or kana, "unicode" where they are others beyond ASCII.

    Returns:
        bleu, chrf, rouge1, rouge2, rougeL, exact_match, f1, each in 0..100.

    Raises:
        ValueError: there are no rows, there are not as many lists as texts, a row has no
            reference, or `tokenize` is unknown.
    """
    words = _words_for(references) if tokenize == "auto" else tokenize
    return {
        "bleu": bleu(hypotheses, references, "zh" if words == "zh" else "13a"),
        "chrf": chrf(hypotheses, references),
        **rouge(hypotheses, references, words),
        "exact_match": exact_match(hypotheses, references),
        "f1": token_f1(hypotheses, references, words),
    }


def bleu(hypotheses: Texts, references: References, tokenize: str = "13a") -> float:
    """BLEU of a corpus (Papineni et al. 2002), n-grams of up to 4 words, case kept, as sacrebleu's.

    An n-gram may match as often as it comes in the reference that has it most; the brevity penalty
    is by the reference nearest in length. Orders without a match count 1/2 of one, then 1/4, and so
    on (sacrebleu's smoothing "exp"), but no match at all is 0, as is no text of 4 words.

    Args:
        hypotheses, references: as `text_metrics` takes them.
        tokenize: "13a", words and marks, as WMT does; "zh", Chinese characters one by one, the rest
            almost as "13a"; "char", all characters.

    Returns:
        0..100. Raises what `text_metrics` does.
    """
    tokens_of = _chosen(BLEU_TOKENS, tokenize)
    counted = np.zeros((2, BLEU_ORDER), np.int64)
    length = nearest = 0
    for hypothesis, row in _checked_rows(hypotheses, references):
        tokens, others = tokens_of(hypothesis), [tokens_of(text) for text in row]
        most = functools.reduce(operator.or_, [_ngrams(other, BLEU_ORDER) for other in others])
        matches = _matches(_ngrams(tokens, BLEU_ORDER), most, BLEU_ORDER)
        counted += matches, _totals(tokens, BLEU_ORDER)
        length += len(tokens)
        nearest += _nearest(len(tokens), map(len, others))
    return _bleu_score(counted, length, nearest)


def chrf(hypotheses: Texts, references: References) -> float:
    """chrF2 of a corpus (Popović 2015), n-grams of up to 6 characters without white space, as
    sacrebleu's. Of several references the best for its row counts; precision and recall are means
    over the orders that both sides have."""
    best = []
    for hypothesis, row in _checked_rows(hypotheses, references):
        text = _characters(hypothesis)
        counts = _ngrams(text, CHRF_ORDER)
        every = [_chrf_counts(text, counts, _characters(other)) for other in row]
        best.append(max(every, key=_chrf_score))
    return 100 * _chrf_score(np.sum(best, axis=0).tolist())


def rouge(hypotheses: Texts, references: References, tokenize: str = "default") -> dict[str, float]:
    """ROUGE (Lin 2004): F1 of words, of pairs of words and of the longest common subsequence.

    The mean over rows, in lower case, without a stemmer; of several references the best for each
    row and each of the three.

    Args:
        hypotheses, references: as `text_metrics` takes them.
        tokenize: "default", a-z and 0-9 alone, as rouge-score: nothing is left of Chinese or
            Russian. "unicode": letters and digits of all scripts. "zh": as "unicode", and each
            Chinese character and each kana is a word.

    Returns:
        rouge1, rouge2, rougeL, each in 0..100. Raises what `text_metrics` does.
    """
    words_of = _chosen(WORDS, tokenize)
    rows = []
    for hypothesis, row in _checked_rows(hypotheses, references):
        words = words_of(hypothesis)
        counts = _ngrams(words, ROUGE_ORDER)
        rows.append(np.max([_rouge_scores(words, counts, words_of(text)) for text in row], axis=0))
    ones, twos, longest = (100 * np.mean(rows, axis=0)).tolist()
    return {"rouge1": ones, "rouge2": twos, "rougeL": longest}


def exact_match(hypotheses: Texts, references: References) -> float:
    """Share of texts that are one of their references once both are normalised as SQuAD v1.1 does:
    lower case, no ASCII punctuation, no articles, single spaces."""
    return 100 * fmean(
        _normalised(hypothesis) in map(_normalised, row)
        for hypothesis, row in _checked_rows(hypotheses, references)
    )


def token_f1(hypotheses: Texts, references: References, tokenize: str = "default") -> float:
    """F1 of the words of normalised texts (see `exact_match`), as SQuAD's: the mean over rows, each
    by its best reference.

    No words are right where none are expected, by the rule of SQuAD v2.0 (v1.1 gives 0), so this
    is never below the exact match. `tokenize`: "default", what stands between spaces, as SQuAD;
    "zh" or "unicode", as in `rouge`.
    """
    words_of = str.split if tokenize == "default" else _chosen(WORDS, tokenize)
    scores = []
    for hypothesis, row in _checked_rows(hypotheses, references):
        words = words_of(_normalised(hypothesis))
        scores.append(max(_word_f1(words, words_of(_normalised(text))) for text in row))
    return 100 * fmean(scores)


def _checked_rows(hypotheses: Texts, references: References) -> Iterable[tuple[str, Sequence[str]]]:
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"expected hypotheses and as many lists of references, got {len(hypotheses)} and "
            f"{len(references)}: pass a list for each text"
        )
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(
                f"expected a list of references for row {row}, got {texts!r}: pass one text at "
                "least, in a list"
            )
    return zip(hypotheses, references, strict=True)


def _chosen(known: Mapping[str, Callable], tokenize: str) -> Callable[[str], Sequence[str]]:
    if tokenize not in known:
        raise ValueError(f"expected tokenize to be one of {', '.join(known)}, got {tokenize!r}")
    return known[tokenize]


def _words_for(references: References) -> str:
    text = "".join(text for row in references for text in row)
    letters = [char for char in text if char.isalpha()]
    if 2 * len(UNSPACED.findall(text)) > len(letters):
        return "zh"
    return "unicode" if 2 * sum(map(str.isascii, letters)) < len(letters) else "default"


def _tokens_13a(text: str) -> list[str]:
    text = text.rstrip()
    for escape, meant in ESCAPES:
        text = text.replace(escape, meant)
    return _marks_apart(f" {text} ")


def _tokens_zh(text: str) -> list[str]:
    return _marks_apart(CHINESE.sub(r" \g<0> ", text.strip()))


def _marks_apart(text: str) -> list[str]:
    text = text.translate(MARKS)
    for pattern, apart in NUMBER_MARKS:
        text = pattern.sub(apart, text)
    return text.split()


def _characters(text: str) -> str:
    return "".join(text.split())


def _words_ascii(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _words_unicode(text: str) -> list[str]:
    return "".join(map(_of_a_word, text.lower())).split()


def _words_zh(text: str) -> list[str]:
    return _words_unicode(UNSPACED.sub(r" \g<0> ", text))


@functools.cache
def _of_a_word(char: str) -> str:
    """The character, if it is a letter, a digit or a mark on one (vowels of Hindi), or a space."""
    return char if unicodedata.category(char)[0] in "LMN" else " "


BLEU_TOKENS = {"13a": _tokens_13a, "zh": _tokens_zh, "char": _characters}
WORDS = {"default": _words_ascii, "zh": _words_zh, "unicode": _words_unicode}


def _ngrams(tokens: Sequence[str], order: int) -> Counter:
    """How often each n-gram of 1 to `order` words comes, as tuples; of a text, characters."""
    tokens = tokens if isinstance(tokens, str) else tuple(tokens)
    sizes = range(1, order + 1)
    return Counter([tokens[i : i + n] for n in sizes for i in range(len(tokens) - n + 1)])


def _totals(tokens: Sequence[str], order: int) -> list[int]:
    """By order: how many n-grams there are."""
    return [max(0, len(tokens) - n) for n in range(order)]


def _matches(counts: Counter, other: Counter, order: int) -> list[int]:
    """By order: n-grams that both have, each as often as both have it."""
    matches = [0] * order
    for ngram, count in counts.items():
        if there := other.get(ngram):
            matches[len(ngram) - 1] += min(count, there)
    return matches


def _nearest(length: int, others: Iterable[int]) -> int:
    """The shorter one of two that are equally near."""
    return min(others, key=lambda other: (abs(other - length), other))


def _bleu_score(counted: np.ndarray, length: int, nearest: int) -> float:
    """Of (2, 4) n-grams by order, those that match and all; of words in texts and references."""
    matches, totals = counted.tolist()
    if not any(matches) or not all(totals):
        return 0.0
    log, smoothing = 0.0, 1
    for match, total in counted.T.tolist():
        smoothing *= 1 if match else 2
        log += math.log(100 * (match or 1 / smoothing) / total)
    return math.exp(log / BLEU_ORDER + min(0.0, 1 - nearest / length))


def _chrf_counts(text: str, counts: Counter, other: str) -> list[tuple[int, int, int]]:
    """By order: n-grams of a text (where the other has any), of the other, of both."""
    totals, others = _totals(text, CHRF_ORDER), _totals(other, CHRF_ORDER)
    matches = _matches(counts, _ngrams(other, CHRF_ORDER), CHRF_ORDER)
    return [(totals[i] if others[i] else 0, others[i], matches[i]) for i in range(CHRF_ORDER)]


def _chrf_score(counted: Sequence[Sequence[int]]) -> float:
    shared = [order for order in counted if order[0] and order[1]]
    precision = recall = 0.0  # added up as sacrebleu does: a rounding can choose the reference
    for total, other, match in shared:
        precision += match / total
        recall += match / other
    if not precision:
        return 0.0
    precision, recall = precision / len(shared), recall / len(shared)
    return (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)


def _rouge_scores(words: Sequence[str], counts: Counter, other: Sequence[str]) -> list[float]:
    ones, twos = _matches(counts, _ngrams(other, ROUGE_ORDER), ROUGE_ORDER)
    longest = _common_subsequence(words, other)
    single, pairs = np.add(_totals(words, ROUGE_ORDER), _totals(other, ROUGE_ORDER)).tolist()
    return [_f1(ones, single), _f1(twos, pairs), _f1(longest, single)]


def _word_f1(words: Sequence[str], other: Sequence[str]) -> float:
    both = Counter(words) & Counter(other)
    return 1.0 if words == other else _f1(both.total(), len(words) + len(other))


def _f1(matches: int, total: int) -> float:
    return 2 * matches / total if matches else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest one, a word of `b` at a time against all of `a` in one integer.

    A zero bit in `row` is a word of `a` at which the length grows by one (Hyyrö 2004, "Bit-parallel
    LCS-length computation revisited").
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        found = row & places.get(word, 0)
        row = row + found | row - found
    return len(a) - (row & full).bit_count()


def _normalised(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())
