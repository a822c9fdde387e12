"""Classification: rows of text, or pairs, to one label each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..balance import by_frequency, imbalance, label_weights, row_weights
from ..batch import Batch, Example
from ..config import RunConfig
from ..data import Row
from ..errors import InputError, Notice
from ..metrics import classification_metrics, format_confusion
from ..ops import IGNORE_INDEX, Ops, TargetReport
from ..splits import stratified_split
from ..tokenizer import Tokenizer
from .task import Parts, Setup
from .texts import TextTask, commonest, declared, in_order, logits_of, uploaded


def label_names(rows: Sequence[Row], path: str | Path = "training rows") -> tuple[str, ...]:
    """The labels of the rows, in the order of numbers if all are whole numbers, else of names.

    Raises:
        InputError: there are fewer than two.
    """
    labels = in_order(row.label for row in rows)
    if len(labels) < 2:
        raise InputError(f"{path}: expected two labels or more, every row says {labels[0]!r}")
    return labels


@dataclass(frozen=True)
class Classification(TextTask):
    """What the labels are and how the loss counts them."""

    name: ClassVar = "classification"
    flags: ClassVar = (
        *(*TextTask.flags, "labels", "class_weights", "sampling_weights"),
        "label_smoothing_factor",
    )
    best: ClassVar = "accuracy"
    tabled: ClassVar = True

    class_weights: tuple[float, ...] | None = None  # one a label; None: all 1
    label_smoothing: float = 0.0
    sampling_weights: tuple[float, ...] | None = None  # one a label; None: each row once an epoch

    @staticmethod
    def names(answer: str) -> tuple[str, ...]:
        """See `TextTask.names`."""
        return (answer,)

    @classmethod
    def split(
        cls, rows: Sequence[Row], run: RunConfig, seed: int
    ) -> tuple[list[Row], list[Row], str]:
        """By label: see `stratified_split`."""
        train, validation = stratified_split(rows, run.validation_split, seed)
        labels = {row.label for row in rows}
        if not validation:
            hint = "" if len(labels) < len(train) / 2 else ", or is it another column"
            raise InputError(
                f"{run.train_file}: too few rows of each of {len(labels):,} labels to keep some "
                f"for validation: give --validation_file{hint}"
            )
        how = f"{len(validation):,} of the training rows, drawn by label with seed {seed}"
        return train, validation, f"{how}, are kept for validation"

    @classmethod
    def spread(cls, rows: Sequence[Row]) -> tuple[str, str]:
        """See `TextTask.spread`."""
        labels = [row.label for row in rows]
        return f"{len(set(labels))} labels", commonest(labels)

    @classmethod
    def labels_of(cls, rows: Sequence[Row], run: RunConfig) -> tuple[str, ...]:
        """Those that are declared, or else stand in the rows: see `label_names`."""
        if not run.labels:
            return label_names(rows, run.train_file)
        labels = declared(run.labels)
        if len(labels) < 2:
            raise InputError(f"expected two labels or more in --labels, got {run.labels!r}")
        return labels

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Row]) -> "Classification":
        """See `Task.of`."""
        labels, run = cls.note(setup, rows), setup.run
        found = [row.label for row in rows]
        counted, drawn = (
            label_weights(flag, getattr(run, flag), labels, lambda: by_frequency(labels, found))
            for flag in ("class_weights", "sampling_weights")
        )
        smoothing, augmenter = setup.config.label_smoothing_factor, setup.augmenter()
        return cls(labels, counted, smoothing, drawn, augmenter=augmenter)

    @classmethod
    def trained(cls, setup: Setup) -> "Classification":
        """See `Task.trained`."""
        return cls(setup.model.config.labels)

    def sampling(self, examples: Sequence[Example]) -> np.ndarray | None:
        """By label. See `Task.sampling`."""
        return row_weights(self.sampling_weights, [example.target for example in examples])

    def targets(self, rows: Sequence[Row]) -> list[int]:
        """The number of each row's label."""
        number = {label: i for i, label in enumerate(self.labels)}
        return [IGNORE_INDEX if row.label is None else number[row.label] for row in rows]

    def loss(
        self,
        logits: Tensor,
        batch: Batch,
        ops: Ops,
        report: TargetReport | None = None,
    ) -> Tensor:
        """See `Task.loss`."""
        weight = self.class_weights and uploaded(self.class_weights, logits.device)
        smoothing = self.label_smoothing
        losses = ops.cross_entropy(logits, batch.targets, weight, smoothing, report=report)
        return losses.sum()

    def weight(self, batch: Batch) -> float:
        """The sum of the weights of a batch's valid targets: what its loss is divided by."""
        targets = [t for t in batch.targets.tolist() if t >= 0]
        return float(
            len(targets)
            if self.class_weights is None
            else sum(self.class_weights[t] for t in targets)
        )

    def outputs(
        self, model: nn.Module, examples: Sequence[Example], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """(N, 3) of examples that all have targets: target, what the model says, the loss in nats
        (unweighted, unsmoothed)."""
        logits = logits_of(model, examples, dtype, ops)
        target = np.array([e.target for e in examples])
        losses = -log_softmax(logits)[np.arange(len(target)), target]
        return np.stack([target, logits.argmax(-1), losses], -1)

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """loss, and all of `classification_metrics`."""
        target, predicted = outputs[:, :2].T.astype(np.int64)
        loss = float(outputs[:, 2].mean())
        measured = classification_metrics(target, predicted, len(self.labels), self.labels)
        return {"loss": loss if np.isfinite(loss) else None, **measured}

    def answer(self, logits: np.ndarray, top_k: int) -> dict[str, Any]:
        """label, score (its probability), scores of all labels, or of the `top_k` likeliest where
        there are more."""
        scores, labels = np.exp(log_softmax(logits)), self.labels
        best, shown = int(scores.argmax()), range(len(labels))
        if 0 < top_k < len(labels):
            shown = np.argsort(-scores, kind="stable")[:top_k]
        return {
            "label": labels[best],
            "score": round(float(scores[best]), 6),
            "scores": {labels[i]: round(float(scores[i]), 6) for i in shown},
        }

    def headline(self, metrics: dict[str, float | None]) -> str:
        """See `Task.headline`."""
        loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        return f"loss {loss}  accuracy {metrics['accuracy']:.4f}  f1 {metrics['f1']:.4f}"

    def table(self, outputs: np.ndarray) -> str:
        """The confusion table."""
        return format_confusion(*outputs[:, :2].T.astype(np.int64), self.labels)

    def verdict(self, metrics: dict[str, float | None]) -> str:
        """Warns when a model is no better than always answering the commonest label."""
        accuracy, majority = metrics["accuracy"], metrics["majority_accuracy"]
        if accuracy > majority:
            return ""
        return (
            f"accuracy {accuracy:.4f} does not beat always answering the commonest label "
            f"({majority:.4f}): the model has learned nothing of use; more --epochs or a higher "
            "--lr may help"
        )

    def strange(self, rows: Parts, examples: Parts, tokenizer: Tokenizer) -> Iterator[Notice]:
        """An imbalance of the labels, too. See `TextTask.strange`."""
        found = [row.label for row in rows["train"]]
        yield from imbalance(found, self.class_weights, self.sampling_weights)
        yield from super().strange(rows, examples, tokenizer)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def predict(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    dtype: torch.dtype = torch.float32,
    top_k: int = 0,
) -> Iterator[dict]:
    """What a classifier makes of each row, in order: see `TextTask.predict` and
    `Classification.answer`."""
    return Classification(model.config.labels).predict(model, tokenizer, rows, dtype, top_k)
