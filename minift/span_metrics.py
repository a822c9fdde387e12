"""Entities in tags, and how many of them were found. No model needed.

    IOB2      B-person I-person O B-place
    IOBES     B-person E-person O S-place        BILOU says L and U for E and S
    entities  (0, 2, person), (3, 4, place)

Tags that break a scheme are read in two ways, both as seqeval has them: `entities` makes one of
whatever looks like it (conlleval, Tjong Kim Sang and Buchholz 2000), `strict_entities` of those
alone that are spelled right.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

Entity = tuple[int, int, str]  # first word, one behind the last, type

PLAIN = "plain"  # tags that are no parts of entities, as those of speech
LETTERS = {"IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}
_TAG = re.compile("O|[BIESLU]-.+", re.DOTALL)
_SAME = str.maketrans("LU", "ES")


def scheme_of(tags: Iterable[str]) -> str:
    """IOB2, IOBES, BILOU or PLAIN: the first whose tags all of them are, if any tag is more than
    O. Tags of IOB1 are those of IOB2: see `is_iob1`."""
    tags = set(tags)
    letters = {tag[0] for tag in tags} - {"O"}
    if letters and all(map(_TAG.fullmatch, tags)):
        for scheme, known in LETTERS.items():
            if letters <= set(known):
                return scheme
    return PLAIN


def is_iob1(sentences: Iterable[Sequence[str]]) -> bool:
    """Whether entities begin with I, and with B only behind another one of their type."""
    begun = False
    for tags in sentences:
        before = "O"
        for tag in tags:
            letter, kind = _parts(tag)
            follows = before != "O" and _parts(before)[1] == kind
            if letter == "B" and not follows:
                return False
            begun |= letter == "I" and not follows
            before = tag
    return begun


def entities(tags: Sequence[str]) -> list[Entity]:
    """All that look like one, as seqeval's default and conlleval have it: I without B begins one,
    and so does any change of the type."""
    found, begin, before, last = [], 0, "O", "_"
    for i, tag in enumerate([*tags, "O"]):
        letter, kind = _parts(tag)
        if before != "O" and (before in "ES" or letter in "BSO" or kind != last):
            found.append((begin, i, last))
        if letter in "BS" or (letter != "O" and (before in "ESO" or kind != last)):
            begin = i
        before, last = letter, kind
    return found


def strict_entities(tags: Sequence[str], scheme: str) -> list[Entity]:
    """Those alone that are spelled as the scheme wants it, as seqeval's strict mode."""
    parts, found, i = [_parts(tag) for tag in tags], [], 0
    while i < len(parts):
        (letter, kind), begin = parts[i], i
        i += 1
        if letter == "S":
            found.append((begin, i, kind))
        if letter != "B":
            continue
        while i < len(parts) and parts[i] == ("I", kind):
            i += 1
        closed = i < len(parts) and parts[i] == ("E", kind)
        i += closed
        if closed or scheme == "IOB2":
            found.append((begin, i, kind))
    return found


def tags_of(spans: Iterable[Entity], words: int, scheme: str = "IOB2") -> list[str]:
    """The tags of so many words in which entities stand that do not overlap."""
    tags, letters = ["O"] * words, LETTERS[scheme]
    first, inside, last, single = letters if len(letters) == 4 else "BIIB"
    for begin, end, kind in spans:
        tags[begin:end] = [f"{inside}-{kind}"] * (end - begin)
        tags[end - 1] = f"{last}-{kind}"
        tags[begin] = f"{single if end - begin == 1 else first}-{kind}"
    return tags


def all_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The tags by name; of entities O first, and each type with every letter of the scheme, so
    that a model can write what its training rows happen to lack."""
    tags = set(tags)
    if (scheme := scheme_of(tags)) == PLAIN:
        return tuple(sorted(tags))
    kinds = sorted({tag[2:] for tag in tags if tag != "O"})
    return "O", *(f"{letter}-{kind}" for kind in kinds for letter in LETTERS[scheme])


def span_metrics(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, float | int]:
    """Precision, recall and F1 of entities, equal to seqeval's with zero_division=0.

    Args:
        gold: the true tags of each sentence.
        predicted: as many, what a model says.
        labels: all tags that there are, which show the scheme.

    Returns:
        A flat dict, ready for JSON: entities (there are), precision, recall, f1 over all of them;
        each as _macro (mean of the types present) and _weighted; f1/<type>; and each again as
        precision_strict, ..., of `strict_entities`.
    """
    scheme = scheme_of(labels)
    loose = _scores([entities(tags) for tags in gold], [entities(tags) for tags in predicted])
    strict = _scores(*([strict_entities(t, scheme) for t in side] for side in (gold, predicted)))
    kinds = dict.fromkeys(f"f1/{_parts(label)[1]}" for label in labels if label != "O")
    of_types = {name: loose.get(name, 0.0) for name in kinds}
    strict = {
        "_".join([name.split("_")[0], "strict", *name.split("_")[1:]]): value
        for name, value in strict.items()
        if "/" not in name and name != "entities"
    }
    return {name: v for name, v in loose.items() if "/" not in name} | strict | of_types


def _parts(tag: str) -> tuple[str, str]:
    """Letter, with those of BILOU as of IOBES, and type."""
    return tag[0].translate(_SAME), tag[2:] or "_"


def _scores(gold: list[list[Entity]], predicted: list[list[Entity]]) -> dict[str, float | int]:
    hits, support, guesses = Counter(), Counter(), Counter()
    for true, found in zip(gold, predicted, strict=True):
        hits.update(kind for *_, kind in set(true) & set(found))
        support.update(kind for *_, kind in true)
        guesses.update(kind for *_, kind in found)
    total = support.total()
    kinds = sorted(support.keys() | guesses.keys())
    each = {kind: _three(hits[kind], support[kind], guesses[kind]) for kind in kinds}
    scores: dict[str, float | int] = {"entities": total}
    pooled = _three(hits.total(), total, guesses.total())
    for i, name in enumerate(("precision", "recall", "f1")):
        scores[name] = pooled[i]
        scores[f"{name}_macro"] = sum(each[kind][i] for kind in kinds) / max(1, len(kinds))
        weighted = sum(each[kind][i] * support[kind] for kind in kinds)
        scores[f"{name}_weighted"] = weighted / max(1, total)
    return scores | {f"f1/{kind}": each[kind][2] for kind in kinds}


def _three(hits: int, support: int, guesses: int) -> tuple[float, float, float]:
    """Precision, recall, F1."""
    precision, recall = hits / max(1, guesses), hits / max(1, support)
    return precision, recall, 2 * precision * recall / ((precision + recall) or 1)
