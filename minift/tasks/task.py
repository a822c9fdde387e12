"""What a task is: how files become examples, which head and loss they want, what is measured.

The batch, the training loop and a run know no more of any task than this.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..augment import Augment, Augmenter, augmented
from ..batch import Batch, Example
from ..config import ModelConfig, RunConfig, TrainConfig
from ..data import Row
from ..errors import InputError, Notice
from ..ops import Ops, TargetReport
from ..splits import overlap
from ..tokenizer import Tokenizer

Parts = dict[str, Any]  # train, validation and, if there is any, test
Said = Generator[Notice, None, Any]  # says what it found on the way, and returns it
ROWS = 4096  # of a block, where rows come in blocks
SHOWN = 3  # places that are named of rows left out for one reason


@dataclass(frozen=True)
class File:
    """A file of a run, and the rows of it that cannot be used."""

    run: RunConfig
    part: str  # train, validation or test; or how else it is called
    path: str
    dropped: list[tuple[str, str]] = field(default_factory=list)  # file:line, why
    told: list[int] = field(default_factory=lambda: [0])  # how many of them have been told of

    def drop(self, where: str, why: str) -> None:
        """Notes that a row is left out.

        Args:
            where: file:line.
            why: the same words for all rows of the same mistake.
        """
        self.dropped.append((where, why))

    def tell(self, kept: int) -> Iterator[Notice]:
        """Says what was left out since it was last told.

        Raises:
            InputError: more rows than `max_dropped` are, or all.
        """
        new = self.dropped[self.told[0] :]
        if not new:
            return
        self.told[0] = total = len(self.dropped)
        places: dict[str, list[str]] = {}
        for where, why in new:
            places.setdefault(why, []).append(where)
        parts = [
            f"{len(found):,} {why} ({', '.join(found[:SHOWN])}{', ...' if found[SHOWN:] else ''})"
            for why, found in sorted(places.items(), key=lambda item: -len(item[1]))
        ]
        rows = kept + total
        text = f"{len(new):,} of {rows:,} rows cannot be used: {'; '.join(parts)}"
        if not kept or total > self.run.max_dropped * rows:
            limit = f"more than --max_dropped {self.run.max_dropped:g}" if kept else "none is left"
            raise InputError(f"{self.path}: {text}: {limit}")
        yield Notice(f"{self.part}: {text}; they are left out", loud=True)


@dataclass(frozen=True)
class Setup:
    """What a task is made from."""

    run: RunConfig
    config: TrainConfig
    model: nn.Module
    tokenizer: Tokenizer

    def augmenter(self, fixed: bool = False) -> Augmenter | None:
        """What --augment asks for; see `Augmenter`."""
        augment = Augment.parse(self.run.augment)
        return augment and Augmenter(augment, self.tokenizer, fixed)


class Task:
    """What is learned. A subclass may leave out what has a body here."""

    name: ClassVar[str]
    head: ClassVar[str] = "lm"  # of the model: classifier, tokens, span or lm
    flags: ClassVar[tuple[str, ...]] = ()  # settings that not every task reads
    best: ClassVar[str] = "loss"  # metric that the best model is chosen by
    tabled: ClassVar[bool] = False  # whether `table` shows anything
    tunes: ClassVar[bool] = False  # whether `tuned` does anything
    scales: ClassVar[bool] = True  # whether `loss` multiplies by `scale` itself
    augmenter: Augmenter | None = None  # what is done to training examples, other in each epoch

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raises InputError when no model of this family can do it."""

    @classmethod
    def read(cls, files: dict[str, File], seed: int) -> Said:
        """The rows of all files of a run, by part; splits off those to validate, if need be.

        Raises:
            InputError: a file is not as it should be.
        """
        rows, run = {}, files["train"].run
        for part, file in files.items():
            rows[part] = yield from cls.read_file(file)
            yield from file.tell(len(rows[part]))
        if "validation" not in rows:
            train, validation, how = cls.split(rows["train"], run, seed)
            rows |= {"train": train, "validation": validation}
            yield Notice(f"no --validation_file: {how}")
        yield cls.found(rows)
        return rows

    @classmethod
    def read_file(cls, file: File) -> Said:
        """The rows of a file; those that cannot be used are dropped there.

        Raises:
            InputError: the file is not as it should be.
        """
        raise NotImplementedError

    @classmethod
    def blocks(cls, file: File, labelled: bool = True) -> Iterator[list[Any]]:
        """The rows of a file, some at a time, so that files of any size fit into memory.

        Args:
            file: see `read_file`.
            labelled: to measure. Else to predict: answers are not needed, and no row is dropped.

        Raises:
            InputError: the file is not as it should be.
        """
        raise NotImplementedError

    @classmethod
    def row_of(cls, text: str, line: int) -> Any:
        """A row to predict that is a text from the command line, or a line of stdin.

        Raises:
            InputError: a text alone is not enough.
        """
        return Row(text, None, None, line)

    @classmethod
    def split(cls, rows: Sequence[Any], run: RunConfig, seed: int) -> tuple[list, list, str]:
        """Rows to train, rows to validate, and what was done, in words.

        Raises:
            InputError: there are too few.
        """
        raise NotImplementedError

    @classmethod
    def found(cls, rows: Parts) -> Notice:
        """What the files hold, in a few lines."""
        raise NotImplementedError

    @classmethod
    def texts(cls, rows: Sequence[Any]) -> Iterable[str]:
        """All texts, for a vocabulary to be made of."""
        raise NotImplementedError

    @classmethod
    def labels_of(cls, rows: Sequence[Any], run: RunConfig) -> tuple[str, ...]:
        """The names that a head of classes needs."""
        return ()

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Any]) -> Self:
        """The task of a run, which has its settings; what prediction must know of them is noted in
        the model's configuration.

        Args:
            setup: with the model to train.
            rows: to train on.
        """
        raise NotImplementedError

    @classmethod
    def trained(cls, setup: Setup) -> Self:
        """The task of a trained model, from what its configuration notes."""
        raise NotImplementedError

    def encode_all(self, files: dict[str, File], rows: Parts, tokenizer: Tokenizer) -> Said:
        """The examples of all parts.

        Raises:
            InputError: too many rows cannot be used.
        """
        examples = {}
        for part in rows:
            file = files.get(part) or File(files["train"].run, part, files["train"].path)
            examples[part] = yield from self.encode_file(file, rows[part], tokenizer)
            yield from file.tell(len(examples[part]))
        return examples

    def encode_file(self, file: File, rows: Sequence[Any], tokenizer: Tokenizer) -> Said:
        """The examples of the rows of a file, see `read_file`; those that cannot be used are
        dropped there.

        Raises:
            InputError: too many rows cannot be used.
        """
        raise NotImplementedError

    def vary(
        self, examples: Sequence[Example], seed: int
    ) -> Callable[[int], Sequence[Example]] | None:
        """The training examples as a function of the epoch; None: they are the same in all."""
        return self.augmenter and augmented(examples, self.augmenter, seed)

    def sampling(self, examples: Sequence[Example]) -> np.ndarray | None:
        """(N,) how often each training example is drawn, next to others; None: once an epoch."""
        return None

    def loss(
        self,
        out: Any,
        batch: Batch,
        ops: Ops,
        report: TargetReport | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """() fp32: the sum of the weighted losses of a batch, times `scale` if it `scales`.

        Args:
            out: what the model returned.
            batch: on the model's device.
            ops: table of operations.
            report: sees the targets.
            scale: () fp32, given to those that scale; None: 1.
        """
        raise NotImplementedError

    def weight(self, batch: Batch) -> float:
        """The sum of the weights of a batch's valid targets: what its loss is divided by."""
        raise NotImplementedError

    def outputs(
        self, model: nn.Module, examples: Sequence[Example], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """What is measured of the examples: lines of few numbers, so that those of any number of
        blocks of examples can be laid end to end."""
        raise NotImplementedError

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """All that is measured of `outputs`; `loss` is among them."""
        raise NotImplementedError

    def tuned(self, outputs: np.ndarray) -> Self:
        """The same task with what is chosen on validation rows, such as a threshold."""
        return self

    def noted(self, config: ModelConfig) -> ModelConfig:
        """A model's configuration, with what prediction must know of `tuned`."""
        return config

    def predict(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        top_k: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """An answer to each row, in their order; `top_k` labels at most have scores, 0: all."""
        raise NotImplementedError

    def headline(self, metrics: dict[str, float | None]) -> str:
        """The metrics that a line of progress shows."""
        raise NotImplementedError

    def table(self, outputs: np.ndarray) -> str:
        """What is shown of the best model at the end; "" for nothing."""
        return ""

    def verdict(self, metrics: dict[str, float | None]) -> str:
        """A warning, if the metrics are those of a model that has learned nothing."""
        return ""

    def strange(self, rows: Parts, examples: Parts, tokenizer: Tokenizer) -> Iterator[Notice]:
        """What is strange about the data, and no mistake."""
        yield from unknown_tokens(examples["train"], tokenizer)


def both_sides(rows: Parts) -> Iterator[Notice]:
    """Warns of rows that are judged and stand in the training rows too."""
    for part in ("validation", "test"):
        if n := overlap(rows["train"], rows.get(part, [])):
            text = f"{n:,} of {len(rows[part]):,} {part} rows stand in the training rows too"
            yield Notice(f"{text}: results on them look better than they are", loud=True)


def unknown_tokens(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[Notice]:
    """Warns of texts that the vocabulary does not know."""
    unknown = tokenizer.backend.token_to_id(tokenizer.special["unk"])
    if tokenizer.decoder or unknown is None:  # of bytes none is unknown
        return
    total = found = 0
    for example in getattr(examples, "whole", examples):  # of masked ones, what they were
        total += len(example.tokens)
        found += int(np.count_nonzero(np.asarray(example.tokens) == unknown))
    if found > 0.05 * total:
        text = f"{found / total:.0%} of the tokens of the training rows are unknown to the "
        yield Notice(
            f"{text}vocabulary: is it of another language, or of small letters only?", True
        )


def overflow(
    how: str, rows: Sequence, examples: Sequence[Example], tokenizer: Tokenizer, path: str
) -> str | None:
    """What to say of texts that are longer than the limit, if there are any.

    Raises:
        InputError: there are some, and `how` is "error".
    """
    long = [row for row, example in zip(rows, examples, strict=True) if example.cut]
    if not long:
        return None
    limit = tokenizer.max_length
    if how == "error":
        raise InputError(
            f"{long[0].file or path}:{long[0].line}: longer than {limit} tokens, as {len(long):,} "
            f"of {len(rows):,} texts are: raise --max_seq_length, or --overflow cut"
        )
    return f"{len(long):,} of {len(rows):,} texts are longer than {limit} tokens and cut there"
