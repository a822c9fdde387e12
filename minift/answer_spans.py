"""Answers that stand in a context: its windows, an answer's tokens, and which spans score best.

A span's score is the logit of its first token as a begin plus that of its last one as an end.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# Logit of a place behind the end of a sequence: its share is 0 beside any logit of a model. A row
# of nothing else has no loss, and must not make the cross-entropy overflow, as -1e30 does.
NOWHERE = -1e4

Ends = tuple[int, int]  # the first character, and the one behind the last


def window_begins(tokens: int, room: int, shared: int) -> list[int]:
    """The first token of each window of `room` tokens; neighbours share so many, at most half."""
    step = room - min(shared, room // 2)
    return list(range(0, max(tokens - room, 0) + step, step)) if tokens else []


def tokens_at(offsets: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """The first and the last token of characters; one that holds a part of them belongs to them.
    The first is behind the last where no token does.

    Args:
        offsets: (n, 2) characters of each token.
        start, stop: the first character, and the one behind the last.
    """
    first = int(np.searchsorted(offsets[:, 1], start, "right"))
    return first, int(np.searchsorted(offsets[:, 0], stop, "left")) - 1


def chosen_spans(
    logits: np.ndarray, offsets: np.ndarray, choices: Sequence[Ends]
) -> Iterator[tuple[Ends, float]]:
    """Those of `choices` that a window holds the whole of, with their scores.

    Args:
        logits: (n, 2) of the window's part of the context, as begins and as ends.
        offsets: (n, 2) characters of its tokens.
        choices: of the context.
    """
    for start, stop in choices:
        b, e = tokens_at(offsets, start, stop)
        if offsets[0, 0] <= start and stop <= offsets[-1, 1] and b <= e:
            score = float(logits[b, 0] + logits[e, 1])
            yield (start, stop), NOWHERE if np.isnan(score) else score


def free_spans(
    logits: np.ndarray, offsets: np.ndarray, context: str, longest: int, count: int
) -> Iterator[tuple[Ends, float]]:
    """The best spans of a window, without white space around them, and their scores.

    Args:
        logits, offsets: as for `chosen_spans`.
        context: what the characters are of.
        longest: tokens of a span at most.
        count: of spans at most.
    """
    for b, e, score in best_spans(*logits.T, longest, count):
        start, stop = int(offsets[b, 0]), int(offsets[e, 1])
        text = context[start:stop]
        start += len(text) - len(text.lstrip())  # a token of bytes may hold a space
        yield (start, start + len(text.strip())), score


def best_spans(
    begins: np.ndarray, ends: np.ndarray, longest: int, count: int
) -> list[tuple[int, int, float]]:
    """(begin, end, sum of logits) of the best spans, the best first; of all that there are.

    Args:
        begins, ends: (n,) logits.
        longest: tokens of a span at most.
        count: of spans at most.
    """
    n, longest = len(begins), min(longest, len(begins))
    padded = np.concatenate([ends, np.full(longest - 1, -np.inf)])
    scores = begins[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)
    flat = np.where(np.isnan(scores), NOWHERE, scores).ravel()  # (n * longest,)
    count = min(count, n * longest)
    top = np.argpartition(-flat, count - 1)[:count]
    top = top[np.lexsort((top, -flat[top]))]
    spans = ((*divmod(int(i), longest), float(flat[i])) for i in top)
    return [(b, b + more, score) for b, more, score in spans if score > -np.inf]
