"""Regression: rows of text, or pairs, to a number each, such as how alike two sentences are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch, Example
from ..config import RunConfig
from ..data import Row
from ..errors import InputError
from ..ops import Ops, TargetReport
from ..score_metrics import regression_metrics
from .task import Setup
from .texts import TextTask, logits_of, without_target

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Regression(TextTask):
    """One output; the loss is the squared error, as transformers has it."""

    name: ClassVar = "regression"
    answered: ClassVar = "value"
    best: ClassVar = "pearson"

    labels: tuple[str, ...] = ("score",)

    @staticmethod
    def parse(value: object) -> float:
        """A number, or text that is one.

        Raises:
            ValueError: it is something else, not finite, or too large for 32 bits.
        """
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            try:
                number = math.nan if "_" in str(value) else float(value)
            except (ValueError, OverflowError):
                number = math.nan
            if abs(number) <= LARGEST:  # NaN compares false
                return number
        raise ValueError("a number")

    @classmethod
    def spread(cls, rows: Sequence[Row]) -> tuple[str, str]:
        """See `TextTask.spread`."""
        numbers = np.array([row.label for row in rows])
        low, high, mean = (float(f(numbers)) for f in (np.min, np.max, np.mean))
        return "a number each", f"numbers    {low:g} to {high:g}, {mean:g} on average"

    @classmethod
    def labels_of(cls, rows: Sequence[Row], run: RunConfig) -> tuple[str, ...]:
        """The name of the output."""
        return cls.labels

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Row]) -> "Regression":
        """See `Task.of`."""
        return cls(cls.note(setup, rows), augmenter=setup.augmenter())

    @classmethod
    def trained(cls, setup: Setup) -> "Regression":
        """See `Task.trained`.

        Raises:
            InputError: the model has several outputs.
        """
        labels = setup.model.config.labels
        if len(labels) != 1:
            raise InputError(f"expected one output of a regression, got {len(labels)}: not built")
        return cls(labels)

    def targets(self, rows: Sequence[Row]) -> list[float]:
        """The numbers."""
        return [math.nan if row.label is None else row.label for row in rows]

    def loss(
        self, logits: Tensor, batch: Batch, ops: Ops, report: TargetReport | None = None
    ) -> Tensor:
        """See `Task.loss`."""
        error = logits.squeeze(-1).float() - batch.targets.nan_to_num(0.0)
        return error.square().masked_fill(without_target(batch), 0.0).sum()

    def weight(self, batch: Batch) -> float:
        """The number of rows."""
        return float(torch.count_nonzero(~without_target(batch)))

    def outputs(
        self, model: nn.Module, examples: Sequence[Example], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """(N, 2): target, and what the model says."""
        targets = np.array([example.target for example in examples])
        return np.stack([targets, logits_of(model, examples, dtype, ops)[:, 0]], -1)

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """loss, which is the mean squared error, and all of `regression_metrics`."""
        measured = regression_metrics(*outputs.T)
        return {"loss": measured["mse"], **measured}

    def answer(self, logits: np.ndarray, top_k: int) -> dict[str, Any]:
        """value: the number."""
        return {"value": round(float(logits[0]), 6)}

    def headline(self, metrics: dict[str, float | None]) -> str:
        """See `Task.headline`."""
        shown = (
            f"{name} {'undefined' if metrics[name] is None else format(metrics[name], '.4f')}"
            for name in ("loss", "pearson", "spearman")
        )
        return "  ".join(shown)

    def verdict(self, metrics: dict[str, float | None]) -> str:
        """Warns when a model is no better than always answering the mean, or when all rows have
        the same number, so that none could be."""
        loss, mean = metrics["loss"], metrics["mean_mse"]
        if mean == 0 and loss is not None:
            return "all rows have the same number: no model could beat always answering it"
        if loss is not None and loss < mean:
            return ""
        shown = "that is not finite" if loss is None else f"{loss:.4f}"
        return (
            f"mean squared error {shown} does not beat always answering the mean ({mean:.4f}): "
            "more --epochs or a higher --lr may help"
        )
