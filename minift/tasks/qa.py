"""Extractive question answering: where in a context the answer to a question stands.

    tokens   [CLS] who ruled ? [SEP] in 1215 king John signed [SEP]      one window
    target                                   ^begin ^end                 or the first token: none

A context that is too long is read in windows that share tokens (Devlin et al. 2019, section 4.2
and 4.3): one that does not hold the whole answer has none. Of all spans of all windows the one with
the highest sum of its two logits is the answer; both logits of the first token are the score of
there being none.
"""

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..answer_metrics import best_threshold, score_answer
from ..answer_spans import (
    NOWHERE,
    Ends,
    chosen_spans,
    free_spans,
    tokens_at,
    window_begins,
)
from ..augment import Augmenter
from ..batch import Batch, Example, evaluation_batches
from ..config import ModelConfig, RunConfig
from ..errors import InputError, Notice
from ..glue import glue_questions
from ..ops import IGNORE_INDEX, Layout, Ops, TargetReport, ops_for
from ..readers import empty, show, shown_path
from ..squad import Question, read_questions
from ..tokenizer import BLOCK, Tokenizer
from .task import File, Parts, Said, Setup, Task, both_sides

PIECE = 256  # questions of a block
BEST = 20  # spans of a window that a probability is over
SHIFT = 16  # a target is begin << SHIFT | end
COLUMNS = "loss windows has_answer exact_match f1 empty difference".split()  # of `outputs`


@dataclass(frozen=True, slots=True)
class Window(Example):
    """A question with a part of its context. `target` is begin << 16 | end, rows of the sequence;
    0: no answer is in it; -100: nobody says."""

    row: Question | None = None
    first: int = 0  # row of the context's first token
    offsets: np.ndarray | None = None  # (n, 2) int32: characters of the context's tokens


@dataclass(frozen=True)
class Span:
    """An answer in the context, or none."""

    score: float  # sum of two logits
    start: int  # characters
    stop: int


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Spans, and whether there may be none."""

    name: ClassVar = "qa"
    head: ClassVar = "span"
    flags: ClassVar = ("doc_stride", "max_answer_length", "id_column", "task_name", "augment")
    best: ClassVar = "f1"
    tunes: ClassVar = True
    scales: ClassVar = False

    doc_stride: int = 128
    max_answer_length: int = 30
    null: bool = False  # whether a question may have no answer
    null_threshold: float = 0.0  # none is given where its score is more than this above the best
    augmenter: Augmenter | None = None

    @classmethod
    def read_file(cls, file: File) -> Said:
        """Questions; says how many answers stand beside where the file says."""
        rows = [row for block in cls.blocks(file) for row in block]
        if moved := [row.where for row in rows if row.repaired]:
            shown = ", ".join(moved[:3]) + (", ..." if moved[3:] else "")
            text = f"{len(moved):,} answers begin a few characters beside their answer_start"
            yield Notice(f"{file.part}: {text} ({shown}): the place of the text counts", loud=True)
        return rows

    @classmethod
    def blocks(cls, file: File, labelled: bool = True) -> Iterator[list[Question]]:
        """See `Task.blocks`; SQuAD's JSON is one document, which is read whole."""
        path, name = file.path, file.run.task_name
        if name:
            questions = glue_questions(path, name, labelled)
        else:
            questions = read_questions(path, file.run.id_column, labelled)
        block, nothing = [], True
        for found in questions:
            nothing = False
            if isinstance(found, tuple):
                file.drop(*found)
                continue
            block.append(found)
            if len(block) == PIECE:
                yield block
                block = []
        if block:
            yield block
        if nothing:
            raise empty(shown_path(path))

    @classmethod
    def row_of(cls, text: str, line: int) -> Question:
        """See `Task.row_of`: never enough."""
        raise InputError(
            f"text:{line}: expected a question and its context, got a text alone: give both in a "
            "file with --data"
        )

    @classmethod
    def split(
        cls, rows: Sequence[Question], run: RunConfig, seed: int
    ) -> tuple[list[Question], list[Question], str]:
        """By context: all questions about one stay together."""
        contexts = list(dict.fromkeys(row.context for row in rows))
        if len(contexts) < 2:
            raise InputError(f"{run.train_file}: one context alone: give --validation_file")
        share = min(max(1, round(len(contexts) * run.validation_split)), len(contexts) - 1)
        held = set(random.Random(seed).sample(contexts, share))
        parts: tuple[list[Question], list[Question]] = [], []
        for row in rows:
            parts[row.context in held].append(row)
        how = f"{len(parts[1]):,} of the questions, drawn by context with seed {seed}"
        return *parts, f"{how}, are kept for validation"

    @classmethod
    def found(cls, rows: Parts) -> Notice:
        """Counts, and the first question as it was understood."""
        counts = ", ".join(
            f"{part} {len(rows[part]):,} ({sum(not row.answers for row in rows[part]):,} without "
            "an answer)"
            for part in rows
        )
        first = rows["train"][0]
        answer = show(first.context[first.start : first.stop]) if first.answers else "none"
        return Notice(
            f"questions: {counts}\n  first question  {show(first.question)}\n"
            f"  its context     {show(first.context)}\n  its answer      {answer}"
        )

    @classmethod
    def texts(cls, rows: Sequence[Question]) -> Iterable[str]:
        """See `Task.texts`; every context once."""
        return list(dict.fromkeys(t for row in rows for t in (row.question, row.context)))

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Question]) -> "QuestionAnswering":
        """See `Task.of`."""
        run, model = setup.run, setup.model
        null = any(not row.answers for row in rows)
        augmenter = setup.augmenter(fixed=True)
        task = cls(run.doc_stride, run.max_answer_length, null, augmenter=augmenter)
        model.config = task.noted(replace(model.config, task=cls.name))
        return task

    @classmethod
    def trained(cls, setup: Setup) -> "QuestionAnswering":
        """See `Task.trained`."""
        run = setup.run  # in which the notes stand too, unless other settings are given
        task = cls.noted_in(setup.model.config)
        return replace(task, doc_stride=run.doc_stride, max_answer_length=run.max_answer_length)

    @classmethod
    def noted_in(cls, config: ModelConfig) -> "QuestionAnswering":
        """What `noted` has written; of other models' the defaults."""
        names = "doc_stride", "max_answer_length", "null", "null_threshold"
        return cls(**{name: config.settings[name] for name in names if name in config.settings})

    def noted(self, config: ModelConfig) -> ModelConfig:
        """See `Task.noted`."""
        settings = {"doc_stride": self.doc_stride, "max_answer_length": self.max_answer_length}
        settings |= {"null": self.null, "null_threshold": self.null_threshold}
        return replace(config, settings=settings)

    def encode_file(self, file: File, rows: Sequence[Question], tokenizer: Tokenizer) -> Said:
        """Says how many questions were cut. See `Task.encode_file`."""
        found = self.encode(rows, tokenizer)
        examples, cut = [], 0
        for row, windows in zip(rows, found, strict=True):
            if not windows:
                file.drop(row.where, "have an answer or a context that no token stands for")
            cut += bool(windows) and windows[0].cut
            examples += windows
        if cut:
            text = f"{cut:,} of {len(rows):,} questions are longer than half of"
            yield Notice(f"{file.part}: {text} {tokenizer.max_length} tokens and cut", loud=True)
        return examples

    def encode(self, rows: Sequence[Question], tokenizer: Tokenizer) -> list[list[Window]]:
        """The windows of each question; [] where an answer has no token.

        Raises:
            InputError: there is no room for a context.
        """
        around, windows = _special(tokenizer), []
        for i in range(0, len(rows), BLOCK):
            block = rows[i : i + BLOCK]
            contexts = list(dict.fromkeys(row.context for row in block))
            known = dict(zip(contexts, _tokens(contexts, tokenizer), strict=True))
            questions = tokenizer.ids([row.question for row in block])
            for row, question in zip(block, questions, strict=True):
                cut = question[: tokenizer.max_length // 2]
                texts = cut, *known[row.context], len(cut) < len(question)
                windows.append(self._windows(row, texts, around, tokenizer.max_length))
        return windows

    def _windows(self, row, texts, around, limit) -> list[Window]:
        question, ids, offsets, cut = texts
        (head, middle, tail), types = around
        first = len(head) + len(question) + len(middle)
        room = limit - first - len(tail)
        if room < 1:
            raise InputError(
                f"{limit} tokens leave no room for a context beside its question: raise "
                "--max_seq_length"
            )
        answer = None
        if row.answers:
            answer = tokens_at(offsets, row.start, row.stop)
            if answer[0] > answer[1]:
                return []
        windows = []
        for begin in window_begins(len(ids), room, self.doc_stride):
            part = ids[begin : begin + room]
            tokens = array("i", [*head, *question, *middle, *part, *tail])
            kinds = array("b", [types[0]] * first + [types[1]] * (len(part) + len(tail)))
            target = IGNORE_INDEX if row.answers is None else 0
            if answer and begin <= answer[0] and answer[1] < begin + len(part):
                b, e = (at - begin + first for at in answer)
                target = b << SHIFT | e
            places = offsets[begin : begin + room]
            windows.append(Window(tokens, kinds, target, cut, (), row, first, places))
        return windows

    def loss(
        self, logits: Tensor, batch: Batch, ops: Ops, report: TargetReport | None = None
    ) -> Tensor:
        """Of each window the mean of the losses of begin and end. See `Task.loss`."""
        targets = batch.targets
        parts = torch.cat([targets >> SHIFT, targets & ((1 << SHIFT) - 1)])
        targets = torch.where(targets.repeat(2) < 0, IGNORE_INDEX, parts)
        table = by_sequence(logits, batch.layout)
        return ops.cross_entropy(table, targets, report=report).sum() / 2

    def weight(self, batch: Batch) -> float:
        """The number of windows with a target."""
        return float(torch.count_nonzero(batch.targets >= 0))

    def outputs(
        self, model: nn.Module, examples: Sequence[Window], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """(questions, 7): the columns of COLUMNS. Exact match and F1 are those of the best span,
        `empty` what no answer scores, `difference` its score minus that of the best span."""
        lines = []
        for windows, logits in self._answered(model, examples, dtype, ops):
            row, loss = windows[0].row, sum(map(_loss, windows, logits))
            spans, none = self.spans(windows, logits)
            best = spans[0]
            scores = score_answer(row.context[best.start : best.stop], row.answers)
            has = bool(row.answers)
            lines.append((loss, len(windows), has, *scores, not has, none - best.score))
        return np.array(lines, np.float64).reshape(-1, len(COLUMNS))

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """loss in nats a window; exact_match and f1 in 0..1, and, if there may be no answer, those
        of questions with one, and the share of the others that got none."""
        loss, windows, has, exact, f1, empty, difference = outputs.T
        if self.null:
            none = difference > self.null_threshold
            exact, f1 = np.where(none, empty, exact), np.where(none, empty, f1)
        mean = loss.sum() / windows.sum()
        found = {"loss": float(mean) if np.isfinite(mean) else None}
        found |= {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
        if self.null:
            for name, part in (("has_answer", has == 1), ("no_answer", has == 0)):
                found[f"{name}_exact_match"] = float(exact[part].mean()) if part.any() else None
                found[f"{name}_f1"] = float(f1[part].mean()) if part.any() else None
        return found

    def tuned(self, outputs: np.ndarray) -> "QuestionAnswering":
        """With the threshold of the highest F1. See `Task.tuned`."""
        if not self.null or not np.isfinite(outputs).all():
            return self
        _, _, _, _, f1, empty, difference = outputs.T
        return replace(self, null_threshold=best_threshold(difference, f1, empty))

    def predict(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: Sequence[Question],
        dtype: torch.dtype = torch.float32,
        top_k: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """For each row, in order: id, question, answer as it stands in the context from `start` to
        `end`, and its probability among the best; without an answer "". `top_k` is not read."""
        asked = [replace(row, answers=None) for row in rows]
        found = zip(asked, self.encode(asked, tokenizer), strict=True)
        encoded = [windows if row.question.strip() else [] for row, windows in found]
        examples = [window for windows in encoded for window in windows]
        answers = self._answered(model, examples, dtype, None)
        for row, windows in zip(asked, encoded, strict=True):
            told = {"id": row.id, "question": row.question}
            if not windows:
                yield {**told, "answer": None}
                continue
            yield {**told, **self._answer(row, *next(answers))}

    def _answer(self, row: Question, windows: list[Window], logits: list[np.ndarray]) -> dict:
        spans, none = self.spans(windows, logits)
        scores = np.array([span.score for span in spans] + [none] * self.null)
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        if self.null and none - spans[0].score > self.null_threshold:
            return {"answer": "", "score": round(float(chances[-1]), 6), "start": -1, "end": -1}
        start, stop = spans[0].start, spans[0].stop
        score = round(float(chances[0]), 6)
        return {"answer": row.context[start:stop], "score": score, "start": start, "end": stop}

    def spans(self, windows: list[Window], logits: list[np.ndarray]) -> tuple[list[Span], float]:
        """The best spans of all windows of a question, the best first, and the score of none. Of a
        question with `choices` they are choices, unless no window holds any.

        Args:
            windows: of one question.
            logits: (L, 2) of each.
        """
        row = windows[0].row
        best = self._scored(windows, logits, row.choices) or self._scored(windows, logits, ())
        none = min(float(found[0].sum()) for found in logits)
        spans = [Span(score, *ends) for ends, score in best.items()]
        return sorted(spans, key=lambda span: -span.score)[:BEST], none

    def _scored(self, windows, logits, choices) -> dict[Ends, float]:
        best: dict[Ends, float] = {}
        for window, found in zip(windows, logits, strict=True):
            places = window.offsets
            inside = found[window.first : window.first + len(places)]
            if choices:
                spans = chosen_spans(inside, places, choices)
            else:
                text = window.row.context
                spans = free_spans(inside, places, text, self.max_answer_length, BEST)
            for ends, score in spans:
                best[ends] = max(score, best.get(ends, score))
        return best

    @torch.no_grad()
    def _answered(self, model, examples, dtype, ops):
        """(windows, logits (L, 2) float64 of each) of every question."""
        device = next(model.parameters()).device
        ops, logits = ops or ops_for(device), [np.empty(0)] * len(examples)
        for batch in evaluation_batches(examples):
            out = model(batch.to(device), ops, dtype).float().cpu().numpy().astype(np.float64)
            ends = batch.layout.cu_seqlens.tolist()
            for i, begin, end in zip(batch.rows, ends, ends[1:], strict=False):
                logits[i] = out[begin:end]
        both = zip(examples, logits, strict=True)
        for _, group in groupby(both, key=lambda pair: id(pair[0].row)):
            windows, found = zip(*group, strict=True)
            yield list(windows), list(found)

    def headline(self, metrics: dict[str, float | None]) -> str:
        """See `Task.headline`."""
        loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        exact, f1 = metrics["exact_match"], metrics["f1"]
        return f"loss {loss}  exact match {exact:.4f}  f1 {f1:.4f}"

    def verdict(self, metrics: dict[str, float | None]) -> str:
        """Warns when no answer shares a word with its references."""
        if metrics.get("f1"):
            return ""
        return "f1 is 0: the model has learned nothing of use; more --epochs or a higher --lr helps"

    def strange(self, rows: Parts, examples: Parts, tokenizer: Tokenizer) -> Iterator[Notice]:
        """Questions on both sides, unknown words."""
        yield from both_sides(rows)
        yield from super().strange(rows, examples, tokenizer)


def by_sequence(logits: Tensor, layout: Layout) -> Tensor:
    """Begins, then ends, a row for each sequence. No shape depends on what a tensor holds, so that
    a CUDA graph is good for other batches; backward is a gather: the same bits in every run.

    Args:
        logits: (T, 2).
        layout: of B sequences.

    Returns:
        (2B, longest) float32 or wider, NOWHERE behind the end of a sequence.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ends, longest = layout.cu_seqlens, layout.longest
    B, row = len(ends) - 1, torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    number = torch.bucketize(row, ends[1:], right=True)  # (T,) of its sequence; of slack rows B
    place = (row - ends[number]) % longest  # slack rows may be more than the longest sequence
    table = wide.new_full(((B + 1) * longest, 2), NOWHERE)
    table = table.index_copy(0, number * longest + place, wide).view(B + 1, longest, 2)
    return table[:B].permute(2, 0, 1).reshape(2 * B, longest)


def _loss(window: Window, logits: np.ndarray) -> float:
    """In nats, of (L, 2) logits."""
    ends = [window.target >> SHIFT, window.target & ((1 << SHIFT) - 1)]
    top = logits.max(0)
    lse = top + np.log(np.exp(logits - top).sum(0))
    return float((lse - logits[ends, [0, 1]]).mean())


def _special(tokenizer: Tokenizer):
    """The ids before a question, between it and its context, and behind; the types of both."""
    encoded = tokenizer.backend.encode("a", "b")
    parts, of = ([], [], []), encoded.sequence_ids
    for i, (number, whose) in enumerate(zip(encoded.ids, of, strict=True)):
        if whose is None:
            parts[(0 in of[:i]) + (1 in of[:i])].append(number)
    return parts, (encoded.type_ids[0], encoded.type_ids[of.index(1)])


def _tokens(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(L,) ids and (L, 2) characters of each text; nothing is put around it."""
    encoded = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    return [
        (np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2)) for e in encoded
    ]
