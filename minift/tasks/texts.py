"""What tasks of whole texts, or of pairs of them, share: their rows, their examples, their logits.

A row has an answer; a head on the first or last token of each text comes near it.
"""

import functools
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..augment import Augmenter
from ..batch import Batch, Example, evaluation_batches
from ..config import RunConfig
from ..data import Columns, Row, one_label, read_rows, stream_rows, stream_texts
from ..errors import InputError, Notice
from ..glue import glue_rows
from ..ops import Ops, ops_for
from ..readers import opened_lines, show
from ..splits import split_texts, with_texts
from ..tokenizer import BLOCK, Tokenizer
from .task import ROWS, File, Parts, Said, Setup, Task, both_sides, overflow

MOST_NAMED = 8  # unknown labels that are named


@dataclass(frozen=True)
class TextTask(Task):
    """A number, a label or several of each text."""

    head: ClassVar = "classifier"
    flags: ClassVar = (
        *("text_column", "pair_column", "label_column", "id_column"),
        *("overflow", "task_name", "augment"),
    )
    scales: ClassVar = False
    # A row's answer from what stands in the file; raises ValueError, which says what is expected.
    parse: ClassVar[Callable[[object], Hashable]] = staticmethod(one_label)

    answered: ClassVar[str] = "label"  # what an answer's first key is

    labels: tuple[str, ...]  # names of the head's outputs
    augmenter: Augmenter | None = field(default=None, kw_only=True)

    @staticmethod
    def names(answer: Any) -> tuple[str, ...]:
        """The labels in an answer."""
        return ()

    @classmethod
    def spread(cls, rows: Sequence[Row]) -> tuple[str, str]:
        """Of the training rows: how many labels there are or the like, in two or three words, and
        which, on a line."""
        raise NotImplementedError

    def targets(self, rows: Sequence[Row]) -> Iterable[Any]:
        """What the head is to come near, for each row; of an answer that is None anything."""
        raise NotImplementedError

    def answer(self, logits: np.ndarray, top_k: int) -> dict[str, Any]:
        """What is predicted from (K,) logits; see `Task.predict`."""
        raise NotImplementedError

    @classmethod
    def read_file(cls, file: File) -> Said:
        """Rows with a text and an answer. See `Task.read_file`."""
        yield from ()
        run = file.run
        if run.task_name:
            rows = list(glue_rows(file.path, run.task_name, True, file.drop, cls.parse))
        else:
            rows = read_rows(file.path, columns_of(run), True, cls.parse, file.drop)
        return cls._usable(file, rows)

    @classmethod
    def blocks(cls, file: File, labelled: bool = True) -> Iterator[list[Row]]:
        """See `Task.blocks`."""
        rows = cls._stream(file, labelled)
        while block := list(islice(rows, ROWS)):
            if usable := cls._usable(file, block) if labelled else block:
                yield usable

    @classmethod
    def _stream(cls, file: File, labelled: bool) -> Iterator[Row]:
        path, name, columns = file.path, file.run.task_name, columns_of(file.run)
        if name:
            return glue_rows(path, name, labelled, file.drop if labelled else None, cls.parse)
        if labelled:
            return stream_rows(path, columns, True, cls.parse, file.drop)
        return stream_texts(path, columns, cls.parse)

    @classmethod
    def _usable(cls, file: File, rows: list[Row]) -> list[Row]:
        """Those with a text, and with labels that are among the declared ones."""
        kept, blank = with_texts(rows)
        for row in blank:
            file.drop(place(row, file.path), "no text")
        return cls._known(file, kept, declared(file.run.labels)) if file.run.labels else kept

    @classmethod
    def _known(cls, file: File, rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
        """Drops rows with other labels."""
        why = {id(row): text for row in rows if (text := cls.unknown(row, set(labels)))}
        if len(set(why.values())) > MOST_NAMED:  # an enormous line would say no more
            why = dict.fromkeys(why, "a label that is not among the known ones")
        for row in rows:
            if id(row) in why:
                file.drop(place(row, file.path), why[id(row)])
        return [row for row in rows if id(row) not in why]

    @classmethod
    def unknown(cls, row: Row, labels: set[str]) -> str:
        """Which label of a row is not among `labels`; "" if all are."""
        other = [] if row.label is None else [n for n in cls.names(row.label) if n not in labels]
        return f"label {show(other[0])} is not among the known ones" if other else ""

    @classmethod
    def split(
        cls, rows: Sequence[Row], run: RunConfig, seed: int
    ) -> tuple[list[Row], list[Row], str]:
        """Some of the rows, drawn with the seed."""
        if len(rows) < 2:
            raise InputError(f"{run.train_file}: expected two rows or more: give --validation_file")
        train, validation = split_texts(rows, run.validation_split, seed)
        how = f"{len(validation):,} of the training rows, drawn with seed {seed}"
        return train, validation, f"{how}, are kept for validation"

    @classmethod
    def found(cls, rows: Parts) -> Notice:
        """Counts, answers, the first row as it was understood."""
        counts = ", ".join(f"{part} {len(rows[part]):,}" for part in rows)
        first = rows["train"][0]
        count, line = cls.spread(rows["train"])
        kind, texts = "texts", show(first.text)
        if first.pair is not None:
            kind, texts = "pairs of texts", f"{texts} and {show(first.pair)}"
        said = first.label if isinstance(first.label, str) else show(first.label)
        return Notice(f"rows: {counts}; {kind}; {count}\n  {line}\n  first row  {texts}: {said}")

    @classmethod
    def texts(cls, rows: Sequence[Row]) -> Iterable[str]:
        """See `Task.texts`."""
        return [text for row in rows for text in (row.text, row.pair) if text]

    @classmethod
    def note(cls, setup: Setup, rows: Sequence[Row]) -> tuple[str, ...]:
        """Notes in the model's configuration what was learned of it; its labels."""
        model, pairs = setup.model, rows[0].pair is not None
        model.config = replace(model.config, pairs=pairs, task=cls.name, settings={})
        return model.config.labels

    def encode_file(self, file: File, rows: Sequence[Row], tokenizer: Tokenizer) -> Said:
        """Drops rows with labels that the head does not have; says how many texts were cut. See
        `Task.encode_file`."""
        rows = self._known(file, rows, self.labels)
        examples = self.encode(rows, tokenizer, file.path)
        if text := overflow(file.run.overflow, rows, examples, tokenizer, file.path):
            yield Notice(f"{file.part}: {text}", loud=True)
        return examples

    def encode(
        self, rows: Sequence[Row], tokenizer: Tokenizer, path: str | Path = "rows"
    ) -> list[Example]:
        """Rows to examples; too long texts are cut at the tokenizer's `max_length`.

        Args:
            rows: their answers may be None.
            tokenizer: of the model.
            path: named in errors.

        Raises:
            InputError: a label is not among `labels`, or a row with one text stands among pairs.
        """
        paired, known = bool(rows) and rows[0].pair is not None, set(self.labels)
        for row in rows:
            if why := self.unknown(row, known):
                raise InputError(f"{place(row, path)}: {why}: correct it or leave the row out")
            if (row.pair is not None) != paired:
                raise InputError(
                    f"{place(row, path)}: expected {1 + paired} texts as in other rows"
                )
        examples = []
        for i in range(0, len(rows), BLOCK):
            block = rows[i : i + BLOCK]
            pairs = [row.pair for row in block] if paired else None
            encoded = tokenizer.encode([row.text for row in block], pairs)
            for (ids, types, cut), target in zip(encoded, self.targets(block), strict=True):
                # Arrays: a list of ints takes ten times the memory, and rows may be millions.
                examples.append(Example(array("i", ids), array("b", types), target, cut))
        return examples

    def predict(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: Sequence[Row],
        dtype: torch.dtype = torch.float32,
        top_k: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """For each row: text, (pair), the answer; and `cut`, if the text was too long. The answer
        to a row without a text is null."""
        written, _ = with_texts([replace(row, label=None) for row in rows])
        examples = self.encode(written, tokenizer)
        found = zip(examples, logits_of(model, examples, dtype), strict=True)
        for row in rows:
            texts = {"text": row.text} | ({} if row.pair is None else {"pair": row.pair})
            if not all(text.strip() for text in texts.values()):
                yield texts | {self.answered: None}
                continue
            example, scores = next(found)
            yield texts | self.answer(scores, top_k) | ({"cut": True} if example.cut else {})

    def strange(self, rows: Parts, examples: Parts, tokenizer: Tokenizer) -> Iterator[Notice]:
        """Labels that look alike, rows on both sides, unknown words."""
        alike = Counter(label.casefold() for label in self.labels)
        if twice := [label for label in self.labels if alike[label.casefold()] > 1]:
            yield Notice(f"labels that differ only in case: {', '.join(twice[:8])}", loud=True)
        yield from both_sides(rows)
        yield from super().strange(rows, examples, tokenizer)


def columns_of(run: RunConfig) -> Columns:
    """The columns that the flags name."""
    names = run.text_column, run.pair_column, run.label_column, run.id_column
    return Columns(*(name or None for name in names))


def place(row: Row, path: str | Path) -> str:
    """file:line of a row, which may be of a folder."""
    return f"{row.file or path}:{row.line}"


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in the order of numbers if all are whole numbers, else of names."""
    labels = set(labels)
    if all(re.fullmatch("-?[0-9]{1,18}", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def declared(text: str) -> tuple[str, ...]:
    """The labels of a flag: 'a,b,c', or a file with one a line.

    Raises:
        InputError: there is none, or one stands there twice; or the file cannot be read.
    """
    if text.endswith(".txt") and not os.path.isfile(text):  # else it would be a label
        raise InputError(f"--labels {text}: expected a file of one label a line, found none")
    if os.path.isfile(text):
        with opened_lines(text) as lines:
            labels = [line.strip() for line in lines if line.strip()]
    else:
        labels = [part.strip() for part in text.split(",") if part.strip()]
    twice = [label for label, n in Counter(labels).items() if n > 1]
    if twice or not labels:
        got = f"{show(twice[0])} twice" if twice else "none"
        raise InputError(f"expected different labels in --labels {show(text)}, got {got}")
    return tuple(labels)


def commonest(names: Iterable[str]) -> str:
    """How often the commonest labels are there, on a line."""
    often = Counter(names).most_common(9)
    shown = ", ".join(f"{name} {n:,}" for name, n in often[:8])
    return f"labels     {shown}{', ...' if often[8:] else ''}"


@functools.cache
@torch.inference_mode(False)
def uploaded(class_weights: tuple[float, ...], device: torch.device) -> Tensor:
    """(labels,) fp32, the same tensor in every step, captured ones too: each upload would wait for
    the device."""
    return torch.tensor(class_weights, device=device)


def without_target(batch: Batch) -> Tensor:
    """(B,) bool: sequences whose targets are no numbers, as of empty ones."""
    targets = batch.targets
    return torch.isnan(targets if targets.dim() == 1 else targets[:, 0])


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
