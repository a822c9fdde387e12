"""Classification: rows of text, or pairs, to one label each."""

import functools
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch, Example, evaluation_batches
from ..data import Row
from ..errors import InputError
from ..metrics import classification_metrics
from ..ops import Ops, TargetReport, ops_for
from ..tokenizer import BLOCK, Tokenizer


def label_names(rows: Sequence[Row], path: str | Path = "training rows") -> tuple[str, ...]:
    """The labels of the rows, in the order of numbers if all are whole numbers, else of names.

    Raises:
        InputError: there are fewer than two.
    """
    labels = {row.label for row in rows}
    if len(labels) < 2:
        raise InputError(f"{path}: expected two labels or more, every row says {labels.pop()!r}")
    if all(re.fullmatch("-?[0-9]{1,18}", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


@dataclass(frozen=True)
class Classification:
    """What the labels are and how the loss counts them."""

    labels: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None  # one a label; None: all 1
    label_smoothing: float = 0.0

    @staticmethod
    def weights(
        text: str, labels: tuple[str, ...], rows: Sequence[Row]
    ) -> tuple[float, ...] | None:
        """Class weights from a flag.

        Args:
            text: '' for none; 'balanced': rows / (labels * rows of the label), as scikit-learn
                has it; or 'name=number,...' for every label.
            labels: in the order of the head.
            rows: the training rows.

        Raises:
            InputError: a label is unknown or left out, or a number is not above 0.
        """
        if not text:
            return None
        if text == "balanced":
            count = {label: 0 for label in labels}
            for row in rows:
                count[row.label] += 1
            return tuple(len(rows) / (len(labels) * max(1, count[label])) for label in labels)
        given = dict(part.rpartition("=")[::2] for part in text.split(","))
        try:
            weights = {name.strip(): float(value) for name, value in given.items()}
        except ValueError:
            weights = {}
        if set(weights) != set(labels) or not all(0 < w < 1e9 for w in weights.values()):
            example = ",".join(f"{label}=1" for label in labels[:3])
            raise InputError(f"expected class_weights 'balanced' or {example!r}..., got {text!r}")
        return tuple(weights[label] for label in labels)

    def encode(
        self, rows: Sequence[Row], tokenizer: Tokenizer, path: str | Path = "rows"
    ) -> list[Example]:
        """Rows to examples; too long texts are cut at the tokenizer's `max_length`.

        Args:
            rows: a row whose label is None has no target.
            tokenizer: of the model.
            path: named in errors.

        Raises:
            InputError: a label is not among `labels`, or a row with one text stands among pairs.
        """
        number = {label: i for i, label in enumerate(self.labels)}
        paired = bool(rows) and rows[0].pair is not None
        for row in rows:
            if row.label is not None and row.label not in number:
                known = ", ".join(map(repr, self.labels[:8])) + (", ..." if len(number) > 8 else "")
                raise InputError(
                    f"{row.file or path}:{row.line}: label {row.label!r} is not among the "
                    f"trained ones ({known}): correct it or add it to the training rows"
                )
            if (row.pair is not None) != paired:
                where = f"{row.file or path}:{row.line}"
                raise InputError(f"{where}: expected {1 + paired} texts as in other rows")
        examples = []
        for i in range(0, len(rows), BLOCK):
            block = rows[i : i + BLOCK]
            pairs = [row.pair for row in block] if paired else None
            encoded = tokenizer.encode([row.text for row in block], pairs)
            for (ids, types, cut), row in zip(encoded, block, strict=True):
                target = -100 if row.label is None else number[row.label]
                # Arrays: a list of ints takes ten times the memory, and rows may be millions.
                examples.append(Example(array("i", ids), array("b", types), target, cut))
        return examples

    def loss(
        self, logits: Tensor, batch: Batch, ops: Ops, report: TargetReport | None = None
    ) -> Tensor:
        """() the sum of the weighted losses of a batch, fp32; `report` sees the targets."""
        weight = self.class_weights and _uploaded(self.class_weights, logits.device)
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

    def metrics(self, logits: np.ndarray, examples: Sequence[Example]) -> dict[str, float | None]:
        """Loss (unweighted, unsmoothed) and all of `classification_metrics`.

        Args:
            logits: (N, labels), in the order of `examples`, which all have targets.
        """
        target = np.array([e.target for e in examples])
        scores = log_softmax(logits)
        loss = float(-scores[np.arange(len(target)), target].mean())
        measured = classification_metrics(target, logits.argmax(-1), len(self.labels), self.labels)
        return {"loss": loss if np.isfinite(loss) else None, **measured}


@functools.cache
@torch.inference_mode(False)
def _uploaded(class_weights: tuple[float, ...], device: torch.device) -> Tensor:
    """(labels,) fp32, the same tensor in every step, captured ones too: each upload would wait for
    the device."""
    return torch.tensor(class_weights, device=device)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@torch.no_grad()
def logits_of(
    model: nn.Module,
    examples: Sequence[Example],
    dtype: torch.dtype = torch.float32,
    ops: Ops | None = None,
) -> np.ndarray:
    """(N, labels) float32, in the order of `examples`; nothing is dropped."""
    device = next(model.parameters()).device
    ops = ops or ops_for(device)
    out = np.empty((len(examples), len(model.config.labels)), np.float32)
    for batch in evaluation_batches(examples):
        out[list(batch.rows)] = model(batch.to(device), ops, dtype).float().cpu().numpy()
    return out


def predict(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    dtype: torch.dtype = torch.float32,
    top_k: int = 0,
) -> Iterator[dict]:
    """For each row, in order: text, (pair), label, score (its probability), scores of all labels,
    or of the `top_k` likeliest where there are more; and `cut`, if the text was too long."""
    labels = model.config.labels
    examples = Classification(labels).encode(
        [Row(r.text, r.pair, None, r.line, r.file) for r in rows], tokenizer
    )
    logits = logits_of(model, examples, dtype)
    for row, example, scores in zip(rows, examples, np.exp(log_softmax(logits)), strict=True):
        best = int(scores.argmax())
        shown = range(len(labels))
        if 0 < top_k < len(labels):
            shown = np.argsort(-scores, kind="stable")[:top_k]
        yield {
            "text": row.text,
            **({"pair": row.pair} if row.pair is not None else {}),
            "label": labels[best],
            "score": round(float(scores[best]), 6),
            "scores": {labels[i]: round(float(scores[i]), 6) for i in shown},
            **({"cut": True} if example.cut else {}),
        }
