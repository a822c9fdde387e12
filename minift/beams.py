"""Beam search: W sequences a prompt side by side, and the finished ones that are worth keeping.

    W = 2             running                     finished, with score / length ** length_penalty
    step 1            a (-0.3)    b (-1.4)
    step 2            a c (-0.9)  b a (-1.6)      a <end> (-0.55)
    step 3            ...

In a step each running sequence has V continuations. Of the best 2 W of all W * V, those that end
are finished if they are among the first W, and the best W others run on: at most W end, one a
sequence, so as many are left. The search is over when W are finished and the best running one could
not beat the worst of them if it ended now, or at the limit, where the first W all finish. These are
transformers' rules (early_stopping False) and, in fp32, its arithmetic. G prompts, V tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .decoder import EMPTY, Decoder
from .sampling import GenerateConfig, penalise

NEVER = -1e9  # score of a sequence that does not exist


@dataclass(eq=False)
class Beams:
    """The search for one prompt."""

    width: int
    prompt: int  # its tokens
    limit: int  # new tokens, at most
    eos: int | None
    length_penalty: float
    running: list[list[int]] = field(default_factory=lambda: [[]])  # new tokens, best first
    finished: list[tuple[np.float32, list[int]]] = field(default_factory=list)  # best first

    def advance(
        self, scores: Sequence[np.float32], sources: Sequence[int], tokens: Sequence[int]
    ) -> list[int]:
        """Takes the 2 W best continuations, best first.

        Args:
            scores: log probability of each, of all its new tokens.
            sources: which running sequence it continues.
            tokens: with what.

        Returns:
            Which of them run on, best first; none when the search is over.
        """
        size = len(self.running[0]) + 1
        share = np.float32(size**self.length_penalty)
        last, goes_on = size == self.limit, []
        for i, (source, token) in enumerate(zip(sources, tokens, strict=True)):
            ends = last or token == self.eos
            if ends and i < self.width:
                self.finished.append((scores[i] / share, [*self.running[source], token]))
            elif not ends and len(goes_on) < self.width:
                goes_on.append(i)
        self.finished.sort(key=lambda pair: -pair[0])
        del self.finished[self.width :]
        full = len(self.finished) == self.width
        if last or (full and not scores[goes_on[0]] / share > self.finished[-1][0]):
            return []
        self.running = [[*self.running[sources[i]], tokens[i]] for i in goes_on]
        return goes_on

    @property
    def best(self) -> list[int]:
        return self.finished[0][1]


class BeamSearch:
    """The searches of G prompts: W slots each, side by side. The device finds the best
    continuations; which of them run on is decided on the host, once a step."""

    def __init__(
        self, config: GenerateConfig, slots: int, vocab: int, eos: int | None, device: torch.device
    ):
        self.config, self.width, self.eos = config, config.num_beams, eos
        self.searches: list[Beams | None] = [None] * (slots // self.width)
        penalty = config.repetition_penalty != 1
        self.seen = torch.zeros(slots, vocab, dtype=torch.bool, device=device) if penalty else None
        self.scores = torch.full((slots,), NEVER, device=device)  # of each running sequence
        kept = slots // self.width, 2 * self.width
        self.top = torch.zeros(kept, device=device)  # of the best continuations, best first
        self.index = torch.zeros(kept, dtype=torch.int64, device=device)  # beam * V + token
        self.vocab = vocab

    def begin(self, slot: int, prompt: np.ndarray, number: int, limit: int) -> None:
        """A prompt has come into the first of its slots; at most `limit` tokens will follow it."""
        config, last = self.config, slot + self.width
        search = Beams(self.width, len(prompt), limit, self.eos, config.length_penalty)
        self.searches[slot // self.width] = search
        self.scores[slot] = 0
        self.scores[slot + 1 : last] = NEVER  # one sequence, so its continuations are all others
        if self.seen is not None:
            self.seen[slot:last] = False
            self.seen[slot, torch.from_numpy(prompt).to(self.seen.device)] = True

    def move(self, source: int, target: int) -> None:
        """The prompt of the slots from `source` goes to those from `target`."""
        W = self.width
        self.searches[target // W] = self.searches[source // W]
        for x in (self.seen, self.scores):
            if x is not None:
                x[target : target + W] = x[source : source + W]

    def choose(self, decoder: Decoder, logits: Tensor) -> None:
        """The best 2 W continuations of each prompt, from the logits (n, V) of the first slots."""
        W, n = self.width, len(logits) // self.width * self.width
        scores = logits[:n].float().log_softmax(-1)
        if self.seen is not None:
            scores = penalise(scores, self.seen[:n], self.config.repetition_penalty)
        scores = (scores + self.scores[:n, None]).view(n // W, W * logits.shape[1])
        top, index = scores.topk(2 * W)
        self.top[: n // W], self.index[: n // W] = top, index

    def read(self, decoder: Decoder, prompts: int) -> list[list[int]]:
        """Of each of the first prompts: the answer, if its search is over. Moves the sequences that
        run on to the slots of their ranks."""
        W, n = self.width, prompts * self.width
        top, index = self.top[:prompts].cpu().numpy(), self.index[:prompts].cpu().numpy()
        beams, words = np.divmod(index, self.vocab)
        source, tokens, scores = np.arange(n), np.zeros(n, np.int64), np.full(n, NEVER, np.float32)
        answers = []
        for g, search in enumerate(self.searches[:prompts]):
            goes_on = search.advance(top[g], beams[g].tolist(), words[g].tolist())
            if goes_on:
                part = slice(g * W, g * W + W)
                source[part], tokens[part] = g * W + beams[g, goes_on], words[g, goes_on]
                scores[part] = top[g, goes_on]
            answers.append([] if goes_on else search.finished[0][1])
        longest = max(search.prompt + len(search.running[0]) for search in self.searches[:prompts])
        self._reorder(decoder, longest, source, tokens, scores)
        return answers

    @torch.no_grad()
    def _reorder(self, decoder, longest, *arrays):
        source, tokens, scores = (torch.from_numpy(x).to(decoder.device) for x in arrays)
        n = len(source)
        decoder.gather(source, longest)
        decoder.tokens[:n], self.scores[:n] = tokens, scores
        lengths = decoder.lengths.index_select(0, source)
        decoder.lengths[:n] = torch.where(lengths == EMPTY, EMPTY, lengths + 1)
        if self.seen is not None:
            self.seen[:n] = self.seen.index_select(0, source)
            self.seen[:n].scatter_(1, tokens[:, None], True)
