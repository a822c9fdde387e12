"""Tagging: a label for each word, as of named entities or parts of speech.

    words    Zaman      visits     Qaim
    tokens   [CLS] za ##man        visits  qaim         [SEP]
    target         B-person  -100  O       B-place              first pieces alone

Only those rows are scored, so the last layer computes no others. A sentence that is too long is
read in windows that share tokens; each of its words is in the window that shows most around it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..augment import Augmenter
from ..balance import by_frequency, label_weights, rare
from ..batch import Batch, Example, evaluation_batches
from ..config import RunConfig
from ..errors import InputError, Notice
from ..metrics import classification_metrics
from ..ops import IGNORE_INDEX, Ops, TargetReport, ops_for
from ..readers import show
from ..span_metrics import (
    PLAIN,
    all_tags,
    entities,
    is_iob1,
    scheme_of,
    span_metrics,
    tags_of,
)
from ..splits import split_texts
from ..tagged import Reading, Sentence, of_text, read_tagged
from ..tokenizer import BLOCK, Tokenizer
from ..word_pieces import Pieces, Window
from .classification import log_softmax
from .task import SHOWN, File, Parts, Said, Setup, Task, both_sides
from .texts import columns_of, declared, uploaded

MOST_SHOWN = 12  # tags in a line


@dataclass(frozen=True)
class Tagging(Task):
    """What the tags are and how the loss counts them."""

    name: ClassVar = "tagging"
    head: ClassVar = "tokens"
    flags: ClassVar = (
        *("text_column", "label_column", "labels", "bad_tags", "doc_stride"),
        *("class_weights", "label_smoothing_factor", "augment", "id_column"),
    )
    best: ClassVar = "f1"
    scales: ClassVar = False

    labels: tuple[str, ...]
    stride: int = 128  # tokens that two windows share
    class_weights: tuple[float, ...] | None = None  # one a label; None: all 1
    label_smoothing: float = 0.0
    augmenter: Augmenter | None = None

    @property
    def scheme(self) -> str:
        """How the tags say entities: see `span_metrics.scheme_of`."""
        return scheme_of(self.labels)

    @classmethod
    def read_file(cls, file: File) -> Said:
        """Sentences; says what their tags are, and which were no good. See `Task.read_file`."""
        run, how = file.run, Reading(file.drop, True, _given(file.run))
        columns = columns_of(run)
        rows = list(read_tagged(file.path, columns, how))
        if not rows:
            yield from file.tell(0)
            raise InputError(f"{file.path}: expected words with tags, found none")
        if how.trimmed:
            yield Notice(f"{file.part}: {_counted(how.trimmed)} spans had blanks at their ends: "
                         "trimmed", loud=True)  # fmt: skip
        scheme, of = scheme_of(_tags(rows)), ""
        if scheme == "IOB2" and is_iob1(row.tags for row in rows):
            of = ", written as IOB1"
        elif scheme != PLAIN:
            bad = [row.where(i) for row in rows for i in _misspelled(row, scheme, run.bad_tags)]
            if bad:
                yield Notice(f"{file.part}: {_counted(bad)} tags do not follow {scheme}: they "
                             "are read as seqeval reads them", loud=True)  # fmt: skip
        rows = [_repaired(row, scheme) for row in rows]
        kinds = len({tag[2:] for tag in _tags(rows)} - {""})
        what = "no parts of entities" if scheme == PLAIN else f"{scheme}{of}, {kinds} types"
        yield Notice(f"{file.part}: tags are {what}")
        return rows

    @classmethod
    def blocks(cls, file: File, labelled: bool = True) -> Iterator[list[Sentence]]:
        """See `Task.blocks`."""
        run, how = file.run, Reading(file.drop, labelled, _given(file.run))
        columns = columns_of(run)
        found = read_tagged(file.path, columns, how)
        while block := list(islice(found, BLOCK)):
            scheme = scheme_of(_tags(block)) if labelled else PLAIN
            for row in block:
                if scheme != PLAIN and run.bad_tags == "error":
                    _misspelled(row, scheme, run.bad_tags)
            yield [_repaired(row, scheme) for row in block]

    @classmethod
    def row_of(cls, text: str, line: int) -> Sentence:
        """See `Task.row_of`."""
        return of_text(text, line)

    @classmethod
    def split(
        cls, rows: Sequence[Sentence], run: RunConfig, seed: int
    ) -> tuple[list[Sentence], list[Sentence], str]:
        """Sentences drawn at random."""
        if len(rows) < 2:
            raise InputError(f"{run.train_file}: one sentence is too few: give --validation_file")
        train, validation = split_texts(rows, run.validation_split, seed)
        how = f"{len(validation):,} of the training sentences, drawn with seed {seed}"
        return train, validation, f"{how}, are kept for validation"

    @classmethod
    def found(cls, rows: Parts) -> Notice:
        """Counts, the commonest tags, the first sentence as it was understood."""
        counts = ", ".join(
            f"{part} {len(rows[part]):,} of {sum(len(row.words) for row in rows[part]):,} words"
            for part in rows
        )
        often = Counter(chain.from_iterable(row.tags for row in rows["train"])).most_common()
        shown = ", ".join(f"{tag} {n:,}" for tag, n in often[:MOST_SHOWN])
        first = rows["train"][0]
        pairs = " ".join(f"{w}/{t}" for w, t in zip(first.words, first.tags, strict=True))
        return Notice(
            f"sentences: {counts}\n  tags       {shown}{', ...' * (len(often) > MOST_SHOWN)}\n"
            f"  first      {show(pairs, 90)}"
        )

    @classmethod
    def texts(cls, rows: Sequence[Sentence]) -> Iterable[str]:
        """See `Task.texts`."""
        return [row.text for row in rows]

    @classmethod
    def labels_of(cls, rows: Sequence[Sentence], run: RunConfig) -> tuple[str, ...]:
        """Those given, else all of the rows: see `all_tags`."""
        if labels := _given(run):
            return labels
        if len(tags := _tags(rows)) < 2:
            raise InputError(
                f"{run.train_file}: expected two tags or more, every word has {tags.pop()!r}"
            )
        return all_tags(tags)

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Sentence]) -> "Tagging":
        """See `Task.of`."""
        run, model, labels = setup.run, setup.model, setup.model.config.labels
        model.config = replace(model.config, task=cls.name)
        found = chain.from_iterable(row.tags for row in rows)
        balanced = partial(by_frequency, labels, found)
        weights = label_weights("class_weights", run.class_weights, labels, balanced)
        smoothing = setup.config.label_smoothing_factor
        return cls(labels, run.doc_stride, weights, smoothing, setup.augmenter(fixed=True))

    @classmethod
    def trained(cls, setup: Setup) -> "Tagging":
        """See `Task.trained`."""
        return cls(setup.model.config.labels, setup.run.doc_stride)

    def encode_file(self, file: File, rows: Sequence[Sentence], tokenizer: Tokenizer) -> Said:
        """Says how many are read in windows. See `Task.encode_file`."""
        known, kept = set(self.labels), []
        for row in rows:
            if unknown := next((tag for tag in row.tags if tag not in known), None):
                file.drop(f"{row.file}:{row.line}", f"have a tag that was not trained, {unknown!r}")
            else:
                kept.append(row)
        examples = self.encode(kept, tokenizer)
        windows = Counter(example.row for example in examples)
        if long := sum(n > 1 for n in windows.values()):
            yield Notice(
                f"{file.part}: {long:,} of {len(kept):,} sentences are longer than "
                f"{tokenizer.max_length} tokens and read in windows"
            )
        return examples

    def encode(self, rows: Sequence[Sentence], tokenizer: Tokenizer) -> list[Window]:
        """Sentences to windows, in their order; nothing is cut.

        Args:
            rows: words of sentences without tags have the target 0: they are to be predicted.
            tokenizer: of the model.
        """
        number = {label: i for i, label in enumerate(self.labels)}
        pieces, windows = Pieces(tokenizer, self.stride), []
        for n, row in enumerate(rows):
            tags = [0] * len(row.words) if row.tags is None else [number[tag] for tag in row.tags]
            windows += pieces.windows(row, tags, n)
        return windows

    def loss(
        self, logits: Tensor, batch: Batch, ops: Ops, report: TargetReport | None = None
    ) -> Tensor:
        """See `Task.loss`."""
        weight = self.class_weights and uploaded(self.class_weights, logits.device)
        smoothing = self.label_smoothing
        return ops.cross_entropy(logits, batch.targets, weight, smoothing, report=report).sum()

    def weight(self, batch: Batch) -> float:
        """See `Task.weight`."""
        targets = batch.targets.numpy()
        counts = np.bincount(targets[targets != IGNORE_INDEX], minlength=len(self.labels))
        return float(counts.sum() if self.class_weights is None else counts @ self.class_weights)

    def outputs(
        self, model: nn.Module, examples: Sequence[Window], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """(words, 4): whether it begins a sentence, its tag, what the model says, the loss in nats
        (unweighted, unsmoothed)."""
        parts = [np.empty((0, 4))] * len(examples)
        for i, logits in logits_of_words(model, examples, dtype, ops):
            target = np.array(examples[i].target)
            target = target[target != IGNORE_INDEX]
            losses = -log_softmax(logits)[np.arange(len(target)), target]
            begins = np.zeros(len(target))
            begins[0] = i == 0 or examples[i - 1].row != examples[i].row
            parts[i] = np.stack([begins, target, logits.argmax(-1), losses], -1)
        return np.concatenate(parts) if parts else np.empty((0, 4))

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """loss; accuracy, of words; of entities all of `span_metrics`; of other tags f1 over all
        words, which is the accuracy, and as means over the tags."""
        begins, target, predicted = outputs[:, :3].T.astype(np.int64)
        loss = float(outputs[:, 3].mean())
        measured: dict[str, Any] = {"loss": loss if np.isfinite(loss) else None}
        words = classification_metrics(target, predicted, len(self.labels), self.labels)
        measured |= {name: words[name] for name in ("n", "accuracy", "majority_accuracy")}
        if self.scheme == PLAIN:
            means = {name: v for name, v in words.items() if name.startswith("f1_") or "/" in name}
            return measured | {"f1": words["accuracy"]} | means
        cut = np.flatnonzero(begins)[1:]
        names = np.array(self.labels, object)
        sides = ([part.tolist() for part in np.split(names[x], cut)] for x in (target, predicted))
        return measured | span_metrics(*sides, self.labels)

    def predict(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: Sequence[Sentence],
        dtype: torch.dtype = torch.float32,
        top_k: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """For each sentence: a text and its entities, with places in it; or given words, their
        tags and their entities, with places among the words. Tags that are no parts of entities
        are told of every word. A score is a probability, of an entity the mean over its words."""
        examples = self.encode([replace(row, tags=None) for row in rows], tokenizer)
        parts: dict[int, np.ndarray] = dict(logits_of_words(model, examples, dtype))
        found: list[list[np.ndarray]] = [[] for _ in rows]
        for i, example in enumerate(examples):
            found[example.row].append(parts[i])
        for row, logits in zip(rows, found, strict=True):
            logits = np.concatenate([np.empty((0, len(self.labels))), *logits])
            numbers = logits.argmax(-1)
            scores = np.exp(log_softmax(logits)).max(-1) if len(logits) else np.empty(0)
            yield self.answer(row, [self.labels[i] for i in numbers], scores)

    def answer(self, row: Sentence, tags: list[str], scores: np.ndarray) -> dict[str, Any]:
        """What `predict` says of a sentence."""
        spans, kind = entities(tags), "label"
        if self.scheme == PLAIN:
            spans, kind = [(i, i + 1, tag) for i, tag in enumerate(tags)], "tag"
        said = []
        for begin, end, label in spans:
            place, text = (begin, end), " ".join(row.words[begin:end])
            if row.starts is not None:
                place = row.starts[begin], row.starts[end - 1] + len(row.words[end - 1])
                text = row.text[slice(*place)]
            score = round(float(scores[begin:end].mean()), 6)
            said.append({"text": text, kind: label, "start": place[0], "end": place[1],
                         "score": score})  # fmt: skip
        if row.starts is not None:
            return {"text": row.text, "words" if self.scheme == PLAIN else "entities": said}
        answer = {"tokens": list(row.words), "tags": tags}
        if self.scheme == PLAIN:
            return answer | {"scores": [round(float(score), 6) for score in scores]}
        return answer | {"entities": said}

    def headline(self, metrics: dict[str, float | None]) -> str:
        """See `Task.headline`."""
        loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        other = f"f1_macro {metrics['f1_macro']:.4f}"
        if self.scheme != PLAIN:
            other = "  ".join(f"{n} {metrics[n]:.4f}" for n in ("precision", "recall", "f1"))
        return f"loss {loss}  accuracy {metrics['accuracy']:.4f}  {other}"

    def verdict(self, metrics: dict[str, float | None]) -> str:
        """Warns of a model that finds no entity, or always gives the commonest tag."""
        accuracy, majority = metrics["accuracy"], metrics["majority_accuracy"]
        if metrics["f1"] > 0 and (self.scheme != PLAIN or accuracy > majority):
            return ""
        return (
            f"no entity is found, or no tag but the commonest (accuracy {accuracy:.4f}): the model "
            "has learned nothing of use; more --epochs or a higher --lr may help"
        )

    def strange(self, rows: Parts, examples: Parts, tokenizer: Tokenizer) -> Iterator[Notice]:
        """Sentences on both sides, rare types of entities or tags, unknown words."""
        yield from both_sides(rows)
        if self.class_weights is None:
            found, unit = [tag for row in rows["train"] for tag in row.tags], "words"
            if self.scheme != PLAIN:
                found = [kind for row in rows["train"] for *_, kind in entities(row.tags)]
                unit = "entities"
            yield from rare(found, len(found), unit)
        yield from super().strange(rows, examples, tokenizer)


def logits_of_words(
    model: nn.Module,
    examples: Sequence[Example],
    dtype: torch.dtype = torch.float32,
    ops: Ops | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each example, in any order, and (words, labels) float32 of its targets."""
    device = next(model.parameters()).device
    ops = ops or ops_for(device)
    for batch in evaluation_batches(examples):
        with torch.no_grad():
            logits = model(batch.to(device), ops, dtype).float().cpu().numpy()
        logits = logits[batch.targets.numpy() != IGNORE_INDEX]
        counts = [sum(t != IGNORE_INDEX for t in examples[i].target) for i in batch.rows]
        yield from zip(batch.rows, np.split(logits, np.cumsum(counts)[:-1]), strict=True)


def _given(run: RunConfig) -> tuple[str, ...]:
    return declared(run.labels) if run.labels else ()


def _tags(rows: Iterable[Sentence]) -> set[str]:
    return set().union(*(row.tags for row in rows))


def _counted(places: list[str]) -> str:
    return f"{len(places):,} ({', '.join(places[:SHOWN])}{', ...' * (len(places) > SHOWN)})"


def _repaired(row: Sentence, scheme: str) -> Sentence:
    """The same entities, as seqeval reads them, spelled as the scheme wants it."""
    if scheme == PLAIN:
        return row
    tags = tuple(tags_of(entities(row.tags), len(row.tags), scheme))
    return row if tags == row.tags else replace(row, tags=tags)


def _misspelled(row: Sentence, scheme: str, bad_tags: str) -> list[int]:
    """The words whose tags the scheme would write otherwise.

    Raises:
        InputError: there are some, and that is how they are to be taken.
    """
    tags = _repaired(row, scheme).tags
    bad = [i for i, (a, b) in enumerate(zip(row.tags, tags, strict=True)) if a != b]
    if bad and bad_tags == "error":
        before = f"behind {row.tags[bad[0] - 1]!r}" if bad[0] else "at the begin of a sentence"
        raise InputError(
            f"{row.where(bad[0])}: expected {scheme}, got tag {row.tags[bad[0]]!r} {before}: "
            "correct it, or --bad_tags repair"
        )
    return bad
