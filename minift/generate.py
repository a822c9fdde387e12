"""Continues prompts: many at once, without padding, in memory that does not grow with them.

    for new in stream(model, prompts, GenerateConfig(max_new_tokens=20), eos=tokenizer.eos):
        print(new.prompt, new.token, new.end)

Prompts wait until slots are free; a sequence that ends leaves its slots to the next prompt, and
when none waits the last ones move up. So 10,000 prompts of any lengths take the steps and the
memory of `batch_size` sequences.

What holds: a greedy or beam answer is that of a full forward pass for every token. A prompt gets
the same random numbers wherever it stands, alone or among others. Its logits may differ in their
last bits between batches of different sizes, as products do: so may its tokens where two are that
close.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .beams import BeamSearch
from .config import ModelConfig
from .decoder import Decoder, Room
from .errors import InputError
from .ops import Ops
from .sampling import GenerateConfig, Sampling
from .step_weights import StepWeights

READ = 4096  # tokens of prompts that are read together, or one prompt


class NewToken(NamedTuple):
    """A token of an answer. The tokens of an answer come in order, those of others in between."""

    prompt: int  # which prompt it continues
    token: int
    end: str  # "", or why it is the answer's last: eos, length, positions or stop


@dataclass(eq=False)
class Request:
    """A prompt, and how far its answer is."""

    index: int
    number: int  # of its random numbers
    prompt: np.ndarray  # (P,) int64
    limit: int  # new tokens, at most: positions end
    made: int = 0


def stream(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    eos: int | None = None,
    numbers: Sequence[int] | None = None,
    stopped: Callable[[int, int], bool] | None = None,
    dtype: torch.dtype = torch.float32,
    ops: Ops | None = None,
    weights: StepWeights | None = None,
) -> Iterator[NewToken]:
    """The tokens that continue each prompt, as they are made; those of beams when a search is over.

    Args:
        model: predicts tokens, as `minift.gpt.GPTLanguageModel`.
        prompts: token ids, of any lengths.
        config: default `GenerateConfig()`: greedy, 64 tokens.
        eos: the token that ends an answer, as its last; None: answers end by their length.
        numbers: of each prompt, instead of its place: which random numbers it draws.
        stopped: called with a prompt's index and its new token: whether that is the last.
        dtype: of activations, products and the cache.
        ops: table of operations; default, the one for the model's device.
        weights: for several calls on a CPU: `minift.decoder.make_weights` of the model.

    Raises:
        InputError: a prompt is empty, too long, or holds an id that the model does not have.
    """
    config, known = config or GenerateConfig(), model.config
    if not (known.kind.decoder and known.head == "lm"):
        raise InputError(f"expected a GPT-2 that predicts tokens, got a {known.family}")
    if config.stop and stopped is None:
        raise InputError("expected a tokenizer for stop strings: use stream_text")
    if config.num_beams > 1 and known.vocab_size < 2 * config.num_beams:
        raise InputError(f"expected num_beams of at most half of {known.vocab_size} tokens")
    numbers = range(len(prompts)) if numbers is None else numbers
    waiting = deque(
        _request(i, number, prompt, config, known)
        for i, (number, prompt) in enumerate(zip(numbers, prompts, strict=True))
    )
    if weights is not None and weights.dtype != dtype:
        raise ValueError(f"expected weights in {dtype}, got {weights.dtype}")
    if not waiting:
        return iter(())
    return _answers(model, waiting, config, eos, stopped, (dtype, ops, weights))


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    eos: int | None = None,
    **options,
) -> list[list[int]]:
    """The new tokens of each prompt, with the `eos` that ended it; see `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, config, eos, **options):
        answers[new.prompt].append(new.token)
    return answers


def _request(
    index: int, number: int, prompt: Sequence[int], config: GenerateConfig, known: ModelConfig
) -> Request:
    """A prompt whose tokens the model has."""
    where, ids, longest = f"prompt {number + 1}", np.asarray(prompt), known.room - 1
    if not ids.size:
        raise InputError(f"{where}: expected tokens, got none: there is nothing to continue")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"{where}: expected a list of token ids, got {ids.dtype} {ids.shape}")
    if len(ids) > longest:
        raise InputError(
            f"{where}: expected at most {longest} tokens, so that one can follow, got {len(ids)}: "
            "cut it"
        )
    if ids.min() < 0 or ids.max() >= known.vocab_size:
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(f"{where}: expected ids in 0 to {known.vocab_size - 1}, got {bad}")
    limit = min(config.max_new_tokens, known.room - len(ids))
    return Request(index, number, ids.astype(np.int64), limit)


def _room(requests: Sequence[Request], config: GenerateConfig) -> Room:
    """Slots for as many prompts as come and as the configuration allows, one at least."""
    W = config.num_beams
    # The last token of an answer is never read.
    longest = max(len(request.prompt) + request.limit - 1 for request in requests)
    groups = min(config.batch_size // W, config.cache_tokens // (W * longest), len(requests))
    return Room(W * max(groups, 1), longest)


def _answers(model, waiting, config, eos, stopped, computed) -> Iterator[NewToken]:
    room, vocab, W = _room(waiting, config), model.config.vocab_size, config.num_beams
    device = next(model.parameters()).device
    if W > 1:
        search = BeamSearch(config, room.slots, vocab, eos, device)
    else:
        most = max(request.limit for request in waiting)
        search = Sampling(config, room.slots, vocab, most, device)
    decoder = Decoder(model, room, search.choose, *computed)
    places = _Places(decoder, search, waiting)
    over: list[int] = []
    while places.fill(over):
        decoder.step(W * len(places.running))
        over = []
        for place, tokens in enumerate(search.read(decoder, len(places.running))):
            request = places.running[place]
            for token in tokens:
                end = _end(request, token, config, eos, stopped)
                yield NewToken(request.index, token, end)
                if end:
                    over.append(place)
                    break


def _end(request, token, config, eos, stopped) -> str:
    """Why an answer ends with its new token; "" if it does not."""
    request.made += 1
    if token == eos:
        return "eos"
    if stopped is not None and stopped(request.index, token):
        return "stop"
    if request.made < request.limit:
        return ""
    return "length" if request.limit == config.max_new_tokens else "positions"


class _Places:
    """Who is in which slots: place i is those from W * i on."""

    def __init__(self, decoder: Decoder, search: Sampling | BeamSearch, waiting: deque[Request]):
        self.decoder, self.search, self.waiting = decoder, search, waiting
        self.running: list[Request] = []

    def fill(self, over: list[int]) -> bool:
        """Waiting prompts come to the places that are over and to those that were never used; the
        last ones move to what is left. Whether anybody is there."""
        W = self.search.width
        for place in over:
            self.decoder.leave(W * place, W)
        free = [*over, *range(len(self.running), self.decoder.room.slots // W)]
        begun = [(place, self.waiting.popleft()) for place in free[: len(self.waiting)]]
        for place, request in begun:
            self.running[place : place + 1] = [request]
        self._read(begun)
        for place in sorted(free[len(begun) :], reverse=True):
            if place < len(self.running):
                self._close(place)
        return bool(self.running)

    def _read(self, begun: list[tuple[int, Request]]) -> None:
        """Reads prompts, so many tokens at a time."""
        W, some = self.search.width, []
        for i, (place, request) in enumerate(begun):
            self.search.begin(W * place, request.prompt, request.number, request.limit)
            some.append((W * place, request.prompt))
            tokens = sum(len(prompt) for _, prompt in some)
            if i + 1 == len(begun) or tokens + len(begun[i + 1][1].prompt) > READ:
                slots, prompts = zip(*some, strict=True)
                self.decoder.read(prompts, slots)
                some = []

    def _close(self, place: int) -> None:
        """The last one comes to a place that is over."""
        W, last = self.search.width, self.running.pop()
        if place < len(self.running):
            self.running[place] = last
            self.decoder.move(W * len(self.running), W * place, W)
            self.search.move(W * len(self.running), W * place)
