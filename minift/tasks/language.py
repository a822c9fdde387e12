"""Language modelling: texts, each token predicted from those before it.

    stream     <eos> to be or <eos> not to <eos>         documents end to end
    tokens     <eos> to be | or <eos> not | to           blocks of --max_seq_length
    targets     to be or   |<eos> not to  |<eos>

A block may hold the ends of some documents and the begins of others: those are sequences of their
own, and no token sees another document. In every epoch the stream is cut at other places.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from tokenizers import decoders
from torch import Tensor, nn

from ..batch import Batch, Example, evaluation_batches
from ..config import ModelConfig, RunConfig
from ..data import Row, read_documents
from ..errors import InputError, Notice
from ..layers import Projected
from ..ops import IGNORE_INDEX, Ops, TargetReport, ops_for
from ..readers import show
from ..splits import split_texts
from ..tokenizer import BLOCK, Tokenizer
from .task import File, Parts, Said, Setup, Task, both_sides


class TokenTask(Task):
    """Tokens are predicted; the logits are multiplied out by the loss. The rows are documents."""

    @classmethod
    def read_file(cls, file: File) -> Said:
        """Running text, see `read_documents`."""
        yield from ()
        return read_documents(file.path, file.run.text_column or None)

    @classmethod
    def blocks(cls, file: File, labelled: bool = True) -> Iterator[list[Row]]:
        """The whole file at once: what is predicted runs over the ends of documents, and which
        words are masked is a function of their place in all of it. See `Task.blocks`."""
        yield read_documents(file.path, file.run.text_column or None)

    @classmethod
    def split(
        cls, rows: Sequence[Row], run: RunConfig, seed: int
    ) -> tuple[list[Row], list[Row], str]:
        """Of several documents some, of a single one the end: see `split_texts`."""
        train, validation = split_texts(rows, run.validation_split, seed)
        if not validation:
            raise InputError(f"{run.train_file}: too short to keep a part for validation")
        how = f"the last {run.validation_split:.0%} of the text is"
        if len(rows) > 1:
            how = f"{len(validation):,} of the documents, drawn with seed {seed}, are"
        return train, validation, f"{how} kept for validation"

    @classmethod
    def found(cls, rows: Parts) -> Notice:
        """How many documents and characters."""
        counts = ", ".join(
            f"{part} {len(rows[part]):,} of {sum(len(r.text) for r in rows[part]):,} characters"
            for part in rows
        )
        return Notice(f"texts: {counts}\n  first      {show(rows['train'][0].text)}")

    @classmethod
    def texts(cls, rows: Sequence[Row]) -> Iterable[str]:
        """See `Task.texts`."""
        return [row.text for row in rows]

    def loss(
        self,
        out: Projected,
        batch: Batch,
        ops: Ops,
        report: TargetReport | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """See `Task.loss`."""
        return ops.linear_cross_entropy(
            out.x, out.weight, batch.targets, None, scale, out.bias, vocab=out.vocab, report=report
        )

    def weight(self, batch: Batch) -> float:
        """The number of tokens that are predicted."""
        return float(torch.count_nonzero(batch.targets != IGNORE_INDEX))

    @torch.no_grad()
    def outputs(
        self, model: nn.Module, examples: Sequence[Example], dtype: torch.dtype, ops: Ops | None
    ) -> np.ndarray:
        """(batches, 4): the sum of the losses in nats, and how many there are; of the tokens that
        are predicted the bytes and characters, where that is known."""
        device = next(model.parameters()).device
        ops, sums = ops or ops_for(device), []
        for batch in evaluation_batches(examples):
            moved = batch.to(device)
            total = self.loss(model(moved, ops, dtype), moved, ops)
            sums.append((float(total), self.weight(batch), *self.size_of(batch)))
        return np.array(sums, np.float64).reshape(-1, 4)

    def size_of(self, batch: Batch) -> tuple[float, float]:
        """Bytes and characters of the predicted tokens; 0: not known."""
        return 0, 0

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """loss, in nats a token, and perplexity."""
        nats, count, *_ = outputs.sum(0)
        loss = nats / count if count else math.nan
        if not math.isfinite(loss):
            return {"loss": None, "perplexity": None}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def strange(self, rows: Parts, examples: Parts, tokenizer: Tokenizer) -> Iterator[Notice]:
        """Texts on both sides, and unknown words."""
        yield from both_sides(rows)
        yield from super().strange(rows, examples, tokenizer)

    def headline(self, metrics: dict[str, float | None]) -> str:
        """See `Task.headline`."""
        if metrics["loss"] is None:
            return "loss not finite"
        return f"loss {metrics['loss']:.4f}  perplexity {metrics['perplexity']:.5g}"


@dataclass(frozen=True, eq=False)
class LanguageModel(TokenTask):
    """The next token of running text."""

    name: ClassVar = "lm"
    flags: ClassVar = ("text_column",)

    sizes: np.ndarray | None = None  # (V, 2) bytes and characters of each token; None: not known
    size: int = 0  # tokens of a block

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """See `Task.check`."""
        if not config.kind.decoder:
            raise InputError("--task lm wants a model that reads forwards, as gpt2: try --task mlm")

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Row]) -> "LanguageModel":
        """See `Task.of`."""
        setup.model.config = replace(setup.model.config, task=cls.name, template=None)
        return cls.trained(setup)

    @classmethod
    def trained(cls, setup: Setup) -> "LanguageModel":
        """See `Task.trained`."""
        return cls(sizes_of_tokens(setup.tokenizer), setup.tokenizer.max_length)

    def encode_file(self, file: File, rows: Sequence[Row], tokenizer: Tokenizer) -> Said:
        """Blocks; says how many tokens there are. See `Task.encode_file`."""
        blocks = self.encode(rows, tokenizer)
        tokens = sum(len(block.tokens) for block in blocks)
        yield Notice(f"{file.part}: {tokens:,} tokens in blocks of {self.size}")
        return blocks

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer) -> "Blocks":
        """The documents as blocks; all of their tokens are predicted, and the end of each."""
        eos, parts = tokenizer.eos, []
        for i in range(0, len(rows), BLOCK):
            parts += tokenizer.ids([row.text for row in rows[i : i + BLOCK]])
        ends = np.cumsum([0] + [1 + len(ids) for ids in parts])
        stream = np.empty(ends[-1] + 1, np.int32)
        stream[ends] = eos
        for begin, ids in zip(ends, parts, strict=False):
            stream[begin + 1 : begin + 1 + len(ids)] = ids
        return Blocks.cut(stream, ends[:-1], self.size)

    def vary(self, examples: "Blocks", seed: int) -> Callable[[int], Sequence[Example]]:
        """Blocks that begin elsewhere in each epoch: a function of (seed, epoch)."""

        def of(epoch: int) -> Blocks:
            shift = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch]))
            return examples.shifted(int(shift.integers(self.size)))

        return of

    def size_of(self, batch: Batch) -> tuple[float, float]:
        """See `TokenTask.size_of`."""
        if self.sizes is None:
            return 0, 0
        targets = batch.targets.numpy()
        return tuple(self.sizes[targets[targets != IGNORE_INDEX]].sum(0))

    def metrics(self, outputs: np.ndarray) -> dict[str, float | None]:
        """Besides loss and perplexity, of tokens made of bytes: bits_per_byte and
        loss_per_character (nats), of the text; the ends of documents count as loss alone."""
        measured = super().metrics(outputs)
        if self.sizes is None:
            return measured
        size = outputs[:, 2:].sum(0)
        nats = outputs[:, 0].sum() if measured["loss"] is not None else math.nan
        bits, each = nats / math.log(2) / max(size[0], 1), nats / max(size[1], 1)
        found = {"bits_per_byte": bits, "loss_per_character": each}
        return measured | {k: v if math.isfinite(v) else None for k, v in found.items()}


class Blocks(list[Example]):
    """Examples cut from a stream of documents."""

    def __init__(self, examples: Iterable[Example], stream: np.ndarray, begins: np.ndarray):
        super().__init__(examples)
        self.stream, self.begins = stream, begins  # begins: where documents begin, (n,)

    @staticmethod
    def cut(stream: np.ndarray, begins: np.ndarray, size: int, shift: int = 0) -> "Blocks":
        """Blocks of `size` tokens, from `shift` on and round the end; the last may be shorter."""
        total, blocks = len(stream) - 1, []
        for k in range(0, total, size):
            begin, count = (shift + k) % total, min(size, total - k)
            spans = [(begin, min(begin + count, total)), (0, begin + count - total)]
            spans = [(a, b) for a, b in spans if a < b]
            lengths: list[int] = []
            for a, b in spans:
                inside = begins[np.searchsorted(begins, a + 1) : np.searchsorted(begins, b)]
                lengths += np.diff([a, *inside, b]).tolist()
            tokens, target = (
                np.concatenate([stream[a + i : b + i] for a, b in spans]) for i in (0, 1)
            )
            blocks.append(Example(tokens, (), target, False, tuple(lengths)))
        return Blocks(blocks, stream, begins)

    def shifted(self, shift: int) -> "Blocks":
        """As many blocks of the same sizes, that begin `shift` tokens later."""
        return Blocks.cut(self.stream, self.begins, len(self[0].tokens), shift)


def sizes_of_tokens(tokenizer: Tokenizer) -> np.ndarray | None:
    """(V, 2) int64: bytes, and characters of UTF-8 that begin, of each token of a vocabulary over
    bytes; special tokens have none. None: the vocabulary is of another kind."""
    if not isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return None
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    sizes = np.zeros((tokenizer.vocab_size, 2), np.int64)
    added = set(tokenizer.backend.get_added_tokens_decoder())
    for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if i not in added:
            sizes[i] = len(token), sum(byte_of.get(c, 0) & 0xC0 != 0x80 for c in token)
    return sizes
