"""Responses of a trained model to the prompts of a file, and how good they are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .errors import InputError
from .sampling import GenerateConfig
from .stream_text import stream_text
from .tasks.instruct import Turns
from .text_metrics import text_metrics
from .tokenizer import Tokenizer


class Answers(NamedTuple):
    """What a model answers to each different prompt that is not too long, in their order."""

    prompts: list[str]
    answers: list[str]
    references: list[list[str]]  # all responses of the file to a prompt
    left_out: int  # prompts that leave no room for an answer
    unfinished: int  # answers that end where max_new_tokens or the model's positions do

    def metrics(self) -> dict[str, float]:
        """BLEU, chrF, ROUGE, exact match and token F1: see `text_metrics`."""
        return text_metrics(self.answers, self.references)


def respond(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[Turns],
    config: GenerateConfig,
    dtype: torch.dtype = torch.float32,
) -> Answers:
    """Answers the prompts of records; those with the same prompt are references of one answer.

    Args:
        model: predicts tokens.
        tokenizer: its own.
        rows: records with their responses.
        config: how it answers.
        dtype: of activations and products.

    Raises:
        InputError: no prompt leaves room for an answer.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.prompt(tokenizer), []).append(row.response.strip())
    lengths = [len(ids) for ids in tokenizer.ids(list(found))]
    prompts = [p for p, n in zip(found, lengths, strict=True) if n < model.config.room]
    if not prompts:
        raise InputError(f"every prompt fills the model's {model.config.room} positions")
    answers, unfinished = [""] * len(prompts), 0
    for piece in stream_text(model, tokenizer, prompts, config, dtype=dtype):
        answers[piece.prompt] += piece.text
        unfinished += piece.end in ("length", "positions")
    answers = [answer.strip() for answer in answers]
    references = [found[prompt] for prompt in prompts]
    return Answers(prompts, answers, references, len(found) - len(prompts), unfinished)
