"""How the next token is chosen from the logits: the largest one, or one drawn.

    logits -> repetition penalty -> temperature -> top_k -> top_p -> a draw

The order and the meaning of each are those of transformers. A draw takes one uniform number, a
function of (seed, number of the prompt, how many tokens it has got): what else is in the batch does
not matter to it. Keskar et al. 2019, arXiv:1909.05858 (repetition penalty); Fan et al. 2018,
arXiv:1805.04833 (top k); Holtzman et al. 2019, arXiv:1904.09751 (top p). S slots, V tokens.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .config import flag
from .decoder import Decoder
from .errors import InputError


@dataclass(frozen=True)
class GenerateConfig:
    """How texts are continued."""

    max_new_tokens: int = flag(64, "tokens after a prompt, at most")
    temperature: float = flag(0.0, "logits are divided by it before a draw; 0: the most probable "
                              "token, nothing is drawn")  # fmt: skip
    top_k: int = flag(0, "draw from so many of the most probable tokens; 0: from all")
    top_p: float = flag(1.0, "draw from the fewest tokens whose probabilities reach this sum")
    num_beams: int = flag(1, "sequences that are followed side by side; the best one is the answer")
    length_penalty: float = flag(1.0, "a beam's log probability is divided by its length to this "
                                 "power")  # fmt: skip
    repetition_penalty: float = flag(1.0, "logits of tokens that are there already are divided by "
                                     "it, or multiplied below 0")  # fmt: skip
    seed: int = flag(0, "of the draws")
    batch_size: int = flag(32, "sequences in a step, at most")
    cache_tokens: int = flag(16384, "tokens that the cache has room for; one sequence at least")
    stop: tuple[str, ...] = flag((), "texts that end an answer, and are no part of it")

    def __post_init__(self):
        for name, low, high in (
            ("max_new_tokens", 1, 1e9), ("temperature", 0, 1e3), ("top_k", 0, 1e9),
            ("top_p", 0, 1), ("num_beams", 1, 1e3), ("length_penalty", -1e3, 1e3),
            ("repetition_penalty", 1e-3, 1e3), ("seed", 0, 2**63 - 1), ("batch_size", 1, 1e6),
            ("cache_tokens", 1, 1e12),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:  # NaN compares false
                raise InputError(f"expected {name} between {low:g} and {high:g}, got {value}")
        if 0 < self.temperature < 1e-3:
            raise InputError(f"expected temperature 0 or above 0.001, got {self.temperature}")
        if self.num_beams > 1 and self.temperature:
            raise InputError(
                f"expected temperature 0 with num_beams {self.num_beams}, got {self.temperature}: "
                "beams follow the most probable sequences, nothing is drawn"
            )
        if self.num_beams > 1 and self.stop:
            raise InputError("expected num_beams 1 with stop: beams are compared as whole answers")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"expected stop as texts that are not empty, got {self.stop!r}")


FLAGS = [f.name for f in fields(GenerateConfig) if f.name != "stop"]  # that one may come twice


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(S, V) scores, where `seen` divided by the penalty above 0 and multiplied below."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """(S, V): what is smaller than the k-th largest becomes -inf; ties with it stay."""
    k = min(k, scores.shape[1])
    return scores.masked_fill(scores < scores.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """(S, V): the smallest, whose probabilities have a sum of at most 1 - p, become -inf. The
    largest stays."""
    ordered, index = scores.sort()
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -1] = False
    return scores.masked_fill(torch.empty_like(drop).scatter_(1, index, drop), -torch.inf)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """(S,) tokens, each drawn with the probabilities softmax(scores).

    Args:
        scores: (S, V).
        uniform: (S,) float64 in [0, 1): the token is the one where the running sum of
            probabilities passes it.
    """
    probs = scores.softmax(-1)
    total = probs.cumsum(-1, dtype=torch.float64)
    # A parallel sum may waver in its last bits: a token that cannot be drawn is left out by name.
    passed = (total > uniform[:, None] * total[:, -1:]) & (probs > 0)
    return passed.to(torch.uint8).argmax(-1)  # the first


def uniforms(seed: int, number: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): those of the prompt with this number."""
    # The number is the highest word of the counter: the streams of two prompts never meet.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, number])).random(count)


class Sampling:
    """One sequence a prompt: each step adds a token to it, the most probable one or a drawn one.

    All that a step reads lies on the device, so that it can be captured.
    """

    width = 1  # slots of a prompt

    def __init__(
        self, config: GenerateConfig, slots: int, vocab: int, most: int, device: torch.device
    ):
        """At most `most` tokens will follow a prompt."""
        self.config, penalty = config, config.repetition_penalty != 1
        self.seen = torch.zeros(slots, vocab, dtype=torch.bool, device=device) if penalty else None
        self.uniform: Tensor | None = None  # (S, max_new_tokens) float64, of each slot's prompt
        self.made = torch.zeros(slots, 1, dtype=torch.int64, device=device)  # by each slot
        if config.temperature:
            self.uniform = torch.zeros(slots, most, dtype=torch.float64, device=device)

    def begin(self, slot: int, prompt: np.ndarray, number: int, limit: int) -> None:
        """A prompt has come into a slot; at most `limit` tokens will follow it."""
        self.made[slot] = 0
        if self.uniform is not None:
            given = uniforms(self.config.seed, number, limit)
            self.uniform[slot, :limit] = torch.from_numpy(given)
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, torch.from_numpy(prompt).to(self.seen.device)] = True

    def move(self, source: int, target: int) -> None:
        """The prompt of a slot goes to another."""
        for x in (self.seen, self.uniform, self.made):
            if x is not None:
                x[target] = x[source]

    def choose(self, decoder: Decoder, logits: Tensor) -> None:
        """The next token of the first n slots from their logits (n, V)."""
        config, n, scores = self.config, len(logits), logits.float()
        if self.seen is not None:
            scores = penalise(scores, self.seen[:n], config.repetition_penalty)
        if self.uniform is None:
            tokens = scores.argmax(-1)
        else:
            scores = scores / config.temperature
            scores = keep_top_k(scores, config.top_k) if config.top_k else scores
            scores = keep_top_p(scores, config.top_p) if config.top_p < 1 else scores
            made = self.made[:n].clamp(max=self.uniform.shape[1] - 1)  # an empty slot's goes on
            tokens = draw(scores, self.uniform[:n].gather(1, made)[:, 0])
        if self.seen is not None:
            self.seen[:n].scatter_(1, tokens[:, None], True)
        self.made[:n] += 1
        decoder.tokens[:n] = tokens
        lengths = decoder.lengths[:n]
        lengths += (lengths >= 0).to(lengths.dtype)

    def read(self, decoder: Decoder, prompts: int) -> list[list[int]]:
        """Of each of the first prompts: its new token. Waits for the device, once a step."""
        return [[token] for token in decoder.tokens[:prompts].tolist()]
