"""A decoder with a cache: a prompt is read once, then a step takes one token of every sequence.

    tokens     (S,) int64   of each slot its newest token, which no layer has seen yet
    lengths    (S,) int32   how many tokens it had before; -1: the slot is empty
    memory     (layers, 2, S, H, L, D)   keys and values of those tokens

    slot                    0        1        2        3
    seen so far           The cat   Once                         in memory
    tokens                  sat     upon      -        -
    lengths                  2        1      -1       -1

A prompt is read up to its last token, which the next step takes: that step makes the prompt's first
new token, so that only steps choose tokens. Neither prompts nor steps are padded. Virtual tokens,
if the model has some, are read with the prompt: they are the first in a slot.

Slots in use are the first ones, so a step costs what they cost. All of it stays where it is: on a
GPU a step is captured in a CUDA graph, once for each power of two of slots, and replayed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch, Example, collate
from .layers import Projected, body_of
from .ops import IGNORE_INDEX, KeyValues, Layout, Ops, Virtual, fill_, ops_for
from .step import CudaGraphs
from .step_weights import FEW, StepWeights

EMPTY = -1  # length of a slot without a sequence


def make_weights(model: nn.Module, dtype: torch.dtype, rows: int) -> StepWeights:
    """The weights of a `minift.gpt.GPTLanguageModel` for steps of so many rows. Several calls may
    share them, as long as the model is not trained."""
    return StepWeights(model, model.gpt.embeddings.word.weight, dtype, rows)


@dataclass(frozen=True)
class Room:
    """What a decoder has room for."""

    slots: int  # S, sequences in a step
    tokens: int  # L, of the longest sequence, virtual ones not counted


class Decoder:
    """A language model, its cache, and the steps over them."""

    def __init__(
        self,
        model: nn.Module,
        room: Room,
        choose: Callable[["Decoder", Tensor], None],
        dtype: torch.dtype = torch.float32,
        ops: Ops | None = None,
        weights: StepWeights | None = None,
    ):
        """
        Args:
            model: predicts tokens, as `minift.gpt.GPTLanguageModel`.
            room: of the cache.
            choose: after every step, with the logits (n, V) of the first n slots: writes `tokens`
                and `lengths` of those. It is part of the graph, so it must not look at values.
            dtype: of activations, products and the cache.
            ops: table of operations; default, the one for the model's device.
            weights: the model's, for steps; default: made here, where that pays in one call.
        """
        config, self.device = model.config, next(model.parameters()).device
        S, H, D = room.slots, config.n_head, config.dim // config.n_head
        self.model, self.room, self.choose, self.dtype = model, room, choose, dtype
        self.ops = ops or ops_for(self.device)
        self.tokens = torch.zeros(S, dtype=torch.int64, device=self.device)
        self.lengths = torch.full((S,), EMPTY, dtype=torch.int32, device=self.device)
        virtual = body_of(model).virtual
        self.virtual = virtual.count if virtual else 0
        size = config.n_layer, 2, S, H, self.virtual + room.tokens, D
        self.memory = torch.empty(size, dtype=dtype, device=self.device)
        pays = dtype != torch.float32 or S >= FEW
        self._weights = weights or (make_weights(model, dtype, S) if pays else None)
        self._graphs = CudaGraphs(self.device) if self._can_capture() else None
        self._replays: dict[int, Callable[[], None] | None] = {}
        self._batches: dict[int, Batch] = {}

    def _can_capture(self) -> bool:
        return self.device.type == "cuda" and self.ops.captured

    @torch.no_grad()
    def read(self, prompts: Sequence[np.ndarray], slots: Sequence[int]) -> None:
        """Begins sequences: keys and values of all but the last token of each prompt go into the
        cache, in one batch without padding.

        Args:
            prompts: (P,) int64 token ids, one at least in each.
            slots: the place of each.
        """
        long = [i for i, prompt in enumerate(prompts) if len(prompt) > 1 or self.virtual]
        if long:
            examples = [Example(prompts[i][:-1], (), IGNORE_INDEX) for i in long]
            batch = collate(examples, range(len(examples)))
            one = batch.layout.last[:1][: len(batch.tokens)]  # what is kept of the last layer
            batch = replace(batch, at=one).to(self.device)
            self._forward(batch, [slots[long[row]] for row in batch.rows])
        at = torch.tensor(slots, device=self.device)
        self.tokens[at] = torch.tensor([int(p[-1]) for p in prompts], device=self.device)
        lengths = [self.virtual + len(prompt) - 1 for prompt in prompts]
        self.lengths[at] = torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def _forward(self, batch: Batch, slots: list[int] | None) -> Projected:
        """The model over whole prompts, whose keys go to `slots`; or over a token of each of the
        first slots, if `slots` is None."""
        count, layer, at = len(batch.tokens), -1, None

        def attention(qkv, layout, n_head, causal=False, dropout=None):
            nonlocal layer
            layer += 1
            if slots is None:
                k, v = self.memory[layer, :, :count]
                return self.ops.attention_step_(qkv, KeyValues(k, v), self.lengths[:count])
            fill_(KeyValues(*self.memory[layer]), qkv, layout, slots)
            return self.ops.attention(qkv, layout, n_head, causal, dropout)

        def attention_prefix(qkv, prefix, layout, n_head, causal=False, dropout=None, where=None):
            nonlocal layer, at
            layer += 1
            at = at or Virtual.pack(layout, len(prefix)).to(qkv.device)  # of all layers
            fill_(KeyValues(*self.memory[layer]), at.with_prefix(qkv, prefix), at.layout, slots)
            return self.ops.attention_prefix(qkv, prefix, layout, n_head, causal, dropout, where)

        ops = replace(self.ops, attention=attention, attention_prefix=attention_prefix)
        weights = self._weights
        stands = weights and (weights.stepping if slots is None else weights.standing)
        with stands() if stands else nullcontext():
            return self.model(batch, ops, self.dtype)

    @torch.no_grad()
    def step(self, slots: int) -> None:
        """Takes a step of the first `slots` slots."""
        if self._graphs is None:
            self._step(slots)
            return
        n = min(1 << (slots - 1).bit_length(), self.room.slots)
        if n not in self._replays:  # compiles kernels, and makes what is kept
            self._replays[n] = None
            self._graphs.launch(lambda: self._step(n))
            return
        if self._replays[n] is None:
            try:
                self._replays[n] = self._graphs.capture(lambda: self._step(n))
            except RuntimeError:  # nothing of it has run
                self._graphs = None
                self._step(slots)
                return
        self._replays[n]()

    def _step(self, n: int) -> None:
        if n not in self._batches:
            self._batches[n] = self._batch(n)
        batch = self._batches[n]
        batch.positions.copy_(self.lengths[:n]).clamp_(min=0)
        x, table, bias, vocab = self._forward(batch, None)
        table = table if self._weights is None else self._weights.table
        self.choose(self, F.linear(x, table, bias)[:, :vocab])

    def _batch(self, n: int) -> Batch:
        """A token of each of the first n slots, as n sequences."""
        layout, positions = Layout.pack([1] * n).to(self.device), torch.zeros_like(self.tokens[:n])
        tokens, none = self.tokens[:n], positions[:0]
        own = tokens, positions, none, none, none, None, layout, None, (), none
        return Batch(*own, continues=True)

    @torch.no_grad()
    def gather(self, source: Tensor, tokens: int) -> None:
        """In memory slot i becomes what slot `source[i]` was, of at most so many tokens; for the
        first slots."""
        used = self.memory[:, :, :, :, : self.virtual + tokens]
        used[:, :, : len(source)] = used.index_select(2, source)

    @torch.no_grad()
    def move(self, source: int, target: int, width: int) -> None:
        """The sequences of `width` slots from `source` on go to those from `target` on."""
        here, there = slice(source, source + width), slice(target, target + width)
        for x in (self.tokens, self.lengths):
            x[there] = x[here]
        self.memory[:, :, there] = self.memory[:, :, here]
        self.leave(source, width)

    def leave(self, slot: int, width: int) -> None:
        """Empties slots."""
        self.lengths[slot : slot + width] = EMPTY
