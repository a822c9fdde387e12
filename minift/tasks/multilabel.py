"""Multi-label classification: rows of text, or pairs, to any number of labels each, or to none.

    logits     2.1  -0.3  -4.0        one for each label
    sigmoid   0.89  0.43  0.02        its probability, whatever the others are
    labels     yes    no    no        from a threshold on, the same for all labels

A threshold that is not given is chosen on the validation rows: it is the one of the best micro F1.
"""

import ast
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..balance import label_weights, rare
from ..batch import Batch, Example
from ..config import ModelConfig, RunConfig
from ..data import Row, one_label
from ..errors import InputError, Notice
from ..ops import Ops, TargetReport
from ..score_metrics import best_threshold, multilabel_metrics
from ..tokenizer import Tokenizer
from .task import Parts, Setup
from .texts import (
    TextTask,
    commonest,
    declared,
    in_order,
    logits_of,
    uploaded,
    without_target,
)

SEPARATORS = "|;,"  # of labels in a cell: the first of them that is there


@dataclass(frozen=True)
class MultiLabel(TextTask):
    """What the labels are, how the loss counts them, and from which probability they are given."""

    name: ClassVar = "multilabel"
    answered: ClassVar = "labels"
    flags: ClassVar = (*TextTask.flags, "labels", "class_weights", "threshold")
    best: ClassVar = "f1"
    tunes: ClassVar = True

    class_weights: tuple[float, ...] | None = None  # one a label, of rows that have it; None: 1
    threshold: float = 0.5
    tuning: bool = False  # whether the threshold is chosen on validation rows

    @staticmethod
    def parse(value: object) -> tuple[str, ...]:
        """The labels of a row: a list of JSON, or text that is one or has separators in it, see
        SEPARATORS; nothing: no label."""
        if isinstance(value, str):
            value = _listed(value.strip())
        labels = value if isinstance(value, list) else [value]
        try:
            return tuple(dict.fromkeys(map(one_label, labels)))
        except ValueError:
            raise ValueError("a list of labels") from None

    @staticmethod
    def names(answer: tuple[str, ...]) -> tuple[str, ...]:
        """See `TextTask.names`."""
        return answer

    @classmethod
    def split(
        cls, rows: Sequence[Row], run: RunConfig, seed: int
    ) -> tuple[list[Row], list[Row], str]:
        """Some of the rows, drawn with the seed; but for those with a label that no other has."""
        train, validation, how = super().split(rows, run, seed)
        known, back = set(chain.from_iterable(row.label for row in train)), set()
        for row in validation:
            if not known.issuperset(row.label):
                known.update(row.label)
                back.add(id(row))
        held_out = {id(row) for row in validation} - back
        if not held_out:
            raise InputError(
                f"{run.train_file}: too few rows of each label to keep some for validation: give "
                "--validation_file"
            )
        train = [row for row in rows if id(row) not in held_out]
        validation = [row for row in validation if id(row) in held_out]
        how = how.replace(f"{len(held_out) + len(back):,}", f"{len(held_out):,}", 1)
        return train, validation, how

    @classmethod
    def spread(cls, rows: Sequence[Row]) -> tuple[str, str]:
        """See `TextTask.spread`."""
        names = [name for row in rows for name in row.label]
        without = sum(not row.label for row in rows)
        line = f"{commonest(names)}; {len(names) / len(rows):.2f} a row"
        return f"{len(set(names))} labels", line + (f", {without:,} rows have none" * bool(without))

    @classmethod
    def labels_of(cls, rows: Sequence[Row], run: RunConfig) -> tuple[str, ...]:
        """Those that are declared, or else stand in the rows, in order."""
        labels = declared(run.labels) if run.labels else in_order(n for r in rows for n in r.label)
        if not labels:
            raise InputError(f"{run.train_file}: expected labels, no row has one")
        return labels

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Row]) -> "MultiLabel":
        """See `Task.of`."""
        labels, run = cls.note(setup, rows), setup.run
        weights = cls.weights(run.class_weights, labels, rows)
        augmenter = setup.augmenter()
        return cls(labels, weights, run.threshold or 0.5, not run.threshold, augmenter=augmenter)

    @classmethod
    def trained(cls, setup: Setup) -> "MultiLabel":
        """See `Task.trained`."""
        config = setup.model.config
        noted = config.settings.get("threshold", 0.5)
        if not isinstance(noted, int | float) or not 0 <= noted <= 1:
            raise InputError(f"expected a threshold in [0, 1] in config.json, got {noted!r}")
        return cls(config.labels, None, setup.run.threshold or noted)

    @staticmethod
    def weights(
        text: str, labels: tuple[str, ...], rows: Sequence[Row]
    ) -> tuple[float, ...] | None:
        """See `label_weights`; they are BCEWithLogitsLoss's `pos_weight`. Balanced are rows
        without the label / rows with it, so that both weigh the same."""

        def balanced() -> Iterator[float]:
            count = Counter(name for row in rows for name in row.label)
            having = (count[label] for label in labels)
            return (max(1, len(rows) - n) / max(1, n) for n in having)

        return label_weights("class_weights", text, labels, balanced)

    def targets(self, rows: Sequence[Row]) -> np.ndarray:
        """(n, labels) uint8: 1 for each label of a row."""
        number = {label: i for i, label in enumerate(self.labels)}
        targets = np.zeros((len(rows), len(number)), np.uint8)
        for row, line in zip(rows, targets, strict=True):
            line[[number[name] for name in row.label or ()]] = 1
        return targets

    def loss(
        self, logits: Tensor, batch: Batch, ops: Ops, report: TargetReport | None = None
    ) -> Tensor:
        """See `Task.loss`. Of a row it is the mean over the labels."""
        weight = self.class_weights and uploaded(self.class_weights, logits.device)
        # No shape depends on the data, and nothing waits for the device: a graph captures it.
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), batch.targets.nan_to_num(0.0), reduction="none", pos_weight=weight
        )
        return losses.mean(-1).masked_fill(without_target(batch), 0.0).sum()

    def weight(self, batch: Batch) -> float:
        """The number of rows."""
        return float(torch.count_nonzero(~without_target(batch)))

    def outputs(
        self, model: nn.Module, examples: Sequence[Example], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """(N, 2 labels) float32: which labels each row has, as 0 and 1, and their logits."""
        targets = np.array([example.target for example in examples], np.float32)
        return np.concatenate([targets, logits_of(model, examples, dtype, ops)], 1)

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """loss (the mean of the binary cross-entropies in nats, unweighted), the threshold, and
        all of `multilabel_metrics`."""
        targets, logits = np.split(outputs.astype(np.float64), 2, 1)
        has = targets > 0
        loss = float(np.logaddexp(0, np.where(has, -logits, logits)).mean())
        measured = multilabel_metrics(has, sigmoid(logits) >= self.threshold, self.labels)
        known = {"loss": loss if np.isfinite(loss) else None, "threshold": self.threshold}
        return known | measured

    def tuned(self, outputs: np.ndarray) -> "MultiLabel":
        """With the threshold of the best micro F1, if it is to be chosen."""
        if not self.tuning or not np.isfinite(outputs).all():
            return self
        targets, logits = np.split(outputs.astype(np.float64), 2, 1)
        return replace(self, threshold=best_threshold(sigmoid(logits), targets > 0))

    def noted(self, config: ModelConfig) -> ModelConfig:
        """See `Task.noted`."""
        return replace(config, settings={"threshold": self.threshold})

    def answer(self, logits: np.ndarray, top_k: int) -> dict[str, Any]:
        """labels, the likeliest first, and scores: the probabilities of all labels, or of the
        `top_k` likeliest where there are more."""
        scores = sigmoid(logits.astype(np.float64))
        order = np.argsort(-scores, kind="stable")
        shown = order[:top_k] if 0 < top_k < len(scores) else range(len(scores))
        return {
            "labels": [self.labels[i] for i in order if scores[i] >= self.threshold],
            "scores": {self.labels[i]: round(float(scores[i]), 6) for i in shown},
        }

    def headline(self, metrics: dict[str, float | None]) -> str:
        """See `Task.headline`."""
        loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        f1 = f"f1 {metrics['f1']:.4f}  macro {metrics['f1_macro']:.4f}"
        return f"loss {loss}  {f1}  exact match {metrics['exact_match']:.4f}"

    def verdict(self, metrics: dict[str, float | None]) -> str:
        """Warns when a model is no better than giving the same labels to every row, or when no row
        has any."""
        f1, constant = metrics["f1"], metrics["constant_f1"]
        if f1 > constant:
            return ""
        if not constant:
            return "no row has a label: f1 is 0 whatever the model says"
        return (
            f"f1 {f1:.4f} does not beat giving the same labels to every row ({constant:.4f}): the "
            "model has learned nothing of use; more --epochs or a higher --lr may help"
        )

    def strange(self, rows: Parts, examples: Parts, tokenizer: Tokenizer) -> Iterator[Notice]:
        """Labels that few rows have, and what is strange about texts."""
        yield from super().strange(rows, examples, tokenizer)
        if self.class_weights is None:
            names = chain.from_iterable(row.label for row in rows["train"])
            yield from rare(names, len(rows["train"]), "rows")


def _listed(text: str) -> object:
    """The labels in a cell."""
    if text[:1] == "[":
        for read in (json.loads, ast.literal_eval):  # as pandas writes lists
            try:
                return read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    found = next((mark for mark in SEPARATORS if mark in text), None)
    return [part for part in text.split(found) if part.strip()] if found else [text] * bool(text)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Without an overflow, in the precision of `x`."""
    return np.exp(-np.logaddexp(0, -x))
