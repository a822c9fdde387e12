"""The batches on which attention is timed, and what is asked of ours on an H200.

A batch has 16,384 tokens: sequences of one length, or a mix as it comes out of a data set.
"""

import random
from dataclasses import dataclass

from bench.operations import Ratio

TOKENS = 16384
KINDS = ("forward", "backward")


@dataclass(frozen=True)
class Batch:
    """Sequences, heads, and the targets of ours."""

    name: str  # of the lengths
    lengths: tuple[int, ...]
    H: int
    D: int
    Hk: int = 0  # heads of the keys; 0: H
    causal: bool = False
    p: float = 0.0
    rates: tuple[float, float] | None = None  # TFLOP/s, forward and backward: at least
    target_ms: tuple[float, float] | None = None  # at most
    ratios: tuple[Ratio, ...] = ()
    flex: bool = False  # flex attention takes part: it compiles for ten seconds

    def __str__(self) -> str:
        keys = f", {self.key_heads} of keys" if self.key_heads != self.H else ""
        causal = ", causal" if self.causal else ""
        dropout = f", dropout {self.p}" if self.p else ""
        return f"{self.name}, {self.H} heads of {self.D}{keys}{causal}{dropout} bf16"

    @property
    def key_heads(self) -> int:
        return self.Hk or self.H

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1

    def flops(self, kind: str) -> int:
        """Two products of every score that is seen; the gradient has five."""
        seen = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return (4 if kind == "forward" else 10) * self.D * self.H * seen

    def bytes(self, kind: str) -> int:
        """q, k, v read and out written; for the gradient also dout, and dq, dk, dv written."""
        rows = 2 * (self.H + self.key_heads)
        return (1 if kind == "forward" else 2) * rows * sum(self.lengths) * self.D * 2

    def target(self, kind: str) -> dict[str, float]:
        """Of an H200, in milliseconds."""
        i = KINDS.index(kind)
        if self.target_ms:
            return {"H200": self.target_ms[i]}
        return {"H200": self.flops(kind) / self.rates[i] / 1e9} if self.rates else {}


# ------------------------------------------------------------------- batches


def equal(length: int, H: int, D: int, tokens: int = TOKENS, **facts) -> Batch:
    n = max(tokens // length, 1)
    return Batch(f"{n} of {length}", (length,) * n, H, D, **facts)


def mixed(kind: str, H: int, D: int, tokens: int = TOKENS, **facts) -> Batch:
    """Lengths as they come: sentences of 25 tokens, or questions with their text, as in SQuAD."""
    mean, deviation, least, most = {"sentences": (25, 10, 5, 64), "squad": (175, 70, 20, 384)}[kind]
    draw, lengths, left = random.Random(0), [], tokens
    while left:
        length = min(max(round(draw.gauss(mean, deviation)), least), most, left)
        lengths.append(length)
        left -= length
    return Batch(f"{len(lengths)} {kind}", tuple(lengths), H, D, **facts)


def batches(tokens: int = TOKENS) -> list[Batch]:
    """In the order of their weight; what a ratio refers to comes first."""
    half = 512, 12, 64, tokens
    sentences = "sentences", 12, 64, tokens
    varlen = Ratio("torch varlen", 1 / 1.5)
    plain, mix = equal(*half), mixed(*sentences)

    def dropped(batch: Batch) -> dict:
        ratios = Ratio("ours", 1.2, str(batch)), Ratio("flash, private", 1 / 1.25)
        return {"p": 0.1, "ratios": ratios}

    wide = {"rates": (450, 340)}
    return [
        equal(*half, rates=(340, 215), flex=True),
        mixed(*sentences, ratios=(varlen,), flex=True),
        equal(*half, **dropped(plain)),
        mixed(*sentences, **dropped(mix)),
        equal(2048, 12, 64, tokens, rates=(400, 300)),
        equal(128, 12, 64, tokens, target_ms=(0.035, 0.080)),
        mixed("squad", 12, 64, tokens),
        equal(8192, 12, 64, tokens, rates=(400, 330)),
        equal(2048, 16, 128, tokens, **wide),
        equal(512, 16, 128, tokens, **wide),
        equal(8192, 16, 128, tokens, **wide),
        equal(2048, 12, 64, tokens, causal=True, flex=True),
        equal(8192, 12, 64, tokens, causal=True),
        equal(2048, 16, 128, tokens, Hk=4, causal=True),
        equal(128, 12, 32, tokens),
        Batch("128 to 512", (512, 512, 384, 384, 256, 256, 128, 128), 12, 64),
    ]
