"""Classification: rows of text, or pairs, to one label each."""

import functools
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch, Example, evaluation_batches
from ..config import RunConfig, TrainConfig
from ..data import Columns, Row, read_rows
from ..errors import InputError, Notice
from ..metrics import classification_metrics, format_confusion
from ..ops import Ops, TargetReport, ops_for
from ..readers import show
from ..splits import stratified_split, with_texts
from ..tokenizer import BLOCK, Tokenizer
from .task import Parts, Said, Task, both_sides, left_out, overflow


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
class Classification(Task):
    """What the labels are and how the loss counts them."""

    name: ClassVar = "classification"
    head: ClassVar = "classifier"
    flags: ClassVar = (
        *("text_column", "pair_column", "label_column"),
        *("class_weights", "label_smoothing_factor", "overflow"),
    )
    best: ClassVar = "accuracy"
    tabled: ClassVar = True
    scales: ClassVar = False

    labels: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None  # one a label; None: all 1
    label_smoothing: float = 0.0

    @classmethod
    def read_file(cls, run: RunConfig, part: str, path: str) -> Said:
        """Rows with a text; says how many have none. See `Task.read_file`."""
        columns = run.text_column or None, run.pair_column or None, run.label_column or None
        rows, blank = with_texts(read_rows(path, Columns(*columns)))
        if text := left_out(blank, rows, path):
            yield Notice(f"{part}: {text}", loud=True)
        return rows

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
    def found(cls, rows: Parts) -> Notice:
        """Counts, labels, the first row as it was understood."""
        counts = ", ".join(f"{part} {len(rows[part]):,}" for part in rows)
        first = rows["train"][0]
        often = Counter(row.label for row in rows["train"]).most_common()
        shown = ", ".join(f"{name} {n:,}" for name, n in often[:8]) + (", ..." if often[8:] else "")
        kind, texts = "texts", show(first.text)
        if first.pair is not None:
            kind, texts = "pairs of texts", f"{texts} and {show(first.pair)}"
        return Notice(
            f"rows: {counts}; {kind}; {len(often)} labels\n"
            f"  labels     {shown}\n  first row  {texts}: {first.label}"
        )

    @classmethod
    def texts(cls, rows: Sequence[Row]) -> Iterable[str]:
        """See `Task.texts`."""
        return [text for row in rows for text in (row.text, row.pair) if text]

    @classmethod
    def labels_of(cls, rows: Sequence[Row], run: RunConfig) -> tuple[str, ...]:
        """See `label_names`."""
        return label_names(rows, run.train_file)

    @classmethod
    def of(
        cls,
        run: RunConfig,
        config: TrainConfig,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: Sequence[Row],
    ) -> "Classification":
        """See `Task.of`."""
        labels = model.config.labels
        model.config = replace(model.config, pairs=rows[0].pair is not None)
        weights = cls.weights(run.class_weights, labels, rows)
        return cls(labels, weights, config.label_smoothing_factor)

    def encode_file(
        self, run: RunConfig, part: str, path: str, rows: Sequence[Row], tokenizer: Tokenizer
    ) -> Said:
        """Says how many texts were cut. See `Task.encode_file`."""
        examples = self.encode(rows, tokenizer, path)
        if text := overflow(run.overflow, rows, examples, tokenizer, path):
            yield Notice(f"{part}: {text}", loud=True)
        return examples

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
        self,
        logits: Tensor,
        batch: Batch,
        ops: Ops,
        report: TargetReport | None = None,
    ) -> Tensor:
        """See `Task.loss`."""
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

    def outputs(
        self, model: nn.Module, examples: Sequence[Example], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """See `logits_of`."""
        return logits_of(model, examples, dtype, ops)

    def headline(self, metrics: dict[str, float | None]) -> str:
        """See `Task.headline`."""
        loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        return f"loss {loss}  accuracy {metrics['accuracy']:.4f}  f1 {metrics['f1']:.4f}"

    def table(self, outputs: np.ndarray, examples: Sequence[Example]) -> str:
        """The confusion table."""
        target = np.array([e.target for e in examples])
        return format_confusion(target, outputs.argmax(-1), self.labels)

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
        """Labels that look alike, rows on both sides, unknown words."""
        alike = Counter(label.casefold() for label in self.labels)
        if twice := [label for label in self.labels if alike[label.casefold()] > 1]:
            yield Notice(f"labels that differ only in case: {', '.join(twice[:8])}", loud=True)
        yield from both_sides(rows)
        yield from super().strange(rows, examples, tokenizer)


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
