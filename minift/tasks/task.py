"""What a task is: how files become examples, which head and loss they want, what is measured.

The batch, the training loop and a run know no more of any task than this.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch, Example
from ..config import ModelConfig, RunConfig, TrainConfig
from ..errors import InputError, Notice
from ..ops import Ops, TargetReport
from ..splits import overlap
from ..tokenizer import Tokenizer

Parts = dict[str, Any]  # train, validation and, if there is any, test
Said = Generator[Notice, None, Any]  # says what it found on the way, and returns it


class Task:
    """What is learned. A subclass may leave out what has a body here."""

    name: ClassVar[str]
    head: ClassVar[str] = "lm"  # of the model: classifier or lm
    flags: ClassVar[tuple[str, ...]] = ()  # settings that not every task reads
    best: ClassVar[str] = "loss"  # metric that the best model is chosen by
    tabled: ClassVar[bool] = False  # whether `table` shows anything
    scales: ClassVar[bool] = True  # whether `loss` multiplies by `scale` itself

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raises InputError when no model of this family can do it."""

    @classmethod
    def read(cls, run: RunConfig, seed: int) -> Said:
        """The rows of all parts of a run; splits off those to validate, if need be.

        Raises:
            InputError: a file is not as it should be.
        """
        files = {"train": run.train_file, "validation": run.validation_file, "test": run.test_file}
        rows = {}
        for part, path in files.items():
            if path:
                rows[part] = yield from cls.read_file(run, part, path)
        if not run.validation_file:
            train, validation, how = cls.split(rows["train"], run, seed)
            rows |= {"train": train, "validation": validation}
            yield Notice(f"no --validation_file: {how}")
        yield cls.found(rows)
        return rows

    @classmethod
    def read_file(cls, run: RunConfig, part: str, path: str) -> Said:
        """The rows of a file; `part` is what it is called when something is said of it.

        Raises:
            InputError: the file is not as it should be.
        """
        raise NotImplementedError

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
    def of(
        cls,
        run: RunConfig,
        config: TrainConfig,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: Sequence[Any],
    ) -> Self:
        """The task of a run, which has its settings; what prediction must know of them is noted in
        the model's configuration."""
        raise NotImplementedError

    def encode_all(self, run: RunConfig, rows: Parts, tokenizer: Tokenizer) -> Said:
        """The examples of all parts.

        Raises:
            InputError: a row cannot be used.
        """
        validation = run.validation_file or run.train_file
        files = {"train": run.train_file, "validation": validation, "test": run.test_file}
        examples = {}
        for part in rows:
            examples[part] = yield from self.encode_file(
                run, part, files[part], rows[part], tokenizer
            )
        return examples

    def encode_file(
        self, run: RunConfig, part: str, path: str, rows: Sequence[Any], tokenizer: Tokenizer
    ) -> Said:
        """The examples of the rows of a file, see `read_file`.

        Raises:
            InputError: a row cannot be used.
        """
        raise NotImplementedError

    def vary(
        self, examples: Sequence[Example], seed: int
    ) -> Callable[[int], Sequence[Example]] | None:
        """The training examples as a function of the epoch; None: they are the same in all."""
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
        """What the model makes of the examples, in their order; nothing is dropped."""
        raise NotImplementedError

    def metrics(self, outputs: np.ndarray, examples: Sequence[Example]) -> dict[str, float | None]:
        """All that is measured of `outputs`; `loss` is among them."""
        raise NotImplementedError

    def headline(self, metrics: dict[str, float | None]) -> str:
        """The metrics that a line of progress shows."""
        raise NotImplementedError

    def table(self, outputs: np.ndarray, examples: Sequence[Example]) -> str:
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


def left_out(blank: list, kept: list, path: str) -> str | None:
    """What to say of rows without a text, if there are any.

    Raises:
        InputError: there are no others.
    """
    if not blank:
        return None
    first = f"{blank[0].file or path}:{blank[0].line}"
    if not kept:
        raise InputError(f"{first}: expected a text in some row, every one is blank")
    what = "1 row is" if len(blank) == 1 else f"{len(blank):,} rows are"
    return f"{what} left out for having no text, the first at {first}"


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
