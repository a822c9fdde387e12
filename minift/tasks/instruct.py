"""Responses to prompts: translation, summaries, dialogue, answers, code. One sequence a record:

    tokens     English : Hello ! \\n Chinese : 你好 !             the prompt, then the response
    targets                                 你好 !  <eos>         of the response alone

A record is two columns put into templates, or a list of chat messages, of which each answer of the
assistant is a response. Only rows with a target are multiplied with the vocabulary.
"""

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..batch import Example
from ..config import ModelConfig, RunConfig
from ..data import END_OF_TEXT
from ..errors import InputError, Notice
from ..ops import IGNORE_INDEX
from ..readers import show
from ..records import Record, read_records
from ..templates import Template
from ..tokenizer import BLOCK, Tokenizer
from .language import TokenTask
from .task import File, Parts, Said, Setup

CHAT = "user: {prompt}\nassistant:", " {response}"  # what one turn of a chat looks like
Dialogue = tuple[tuple[str, bool], ...]  # texts, and which of them are responses


@dataclass(frozen=True)
class Turns:
    """A record as a dialogue."""

    parts: Dialogue
    line: int
    file: str
    chat: bool = False  # of messages

    def prompt(self, tokenizer: Tokenizer | None = None) -> str:
        """All before the last response, with the ends of earlier ones as the tokenizer has them."""
        end = END_OF_TEXT if tokenizer is None else tokenizer.special["eos"]
        return "".join(text + end * learned for text, learned in self.parts[:-1])

    @property
    def text(self) -> str:
        """The prompt, as it tells a record from others."""
        return self.prompt()

    @property
    def pair(self) -> str:
        """The response, likewise."""
        return self.response

    @property
    def response(self) -> str:
        """The last one."""
        return self.parts[-1][0]


@dataclass(frozen=True)
class Instruct(TokenTask):
    """The response to a prompt."""

    name: ClassVar = "instruct"
    flags: ClassVar = ("prompt_template", "response_template", "overflow")

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """See `Task.check`."""
        if not config.kind.decoder:
            raise InputError("--task instruct wants a model that writes, such as gpt2")

    @classmethod
    def read_file(cls, file: File) -> Said:
        """Dialogues; says how many have no response. See `Task.read_file`."""
        run = file.run
        rows, blank = dialogues(file.path, run.prompt_template, run.response_template)
        if blank:
            what = "1 record is" if blank == 1 else f"{blank:,} records are"
            yield Notice(f"{file.part}: {what} left out for having no response", loud=True)
        return rows

    @classmethod
    def blocks(cls, file: File, labelled: bool = True) -> Iterator[list[Turns]]:
        """The whole file at once: records with the same prompt are references of one answer.
        See `Task.blocks`."""
        run = file.run
        rows, blank = dialogues(file.path, run.prompt_template, run.response_template)
        file.dropped.extend([(file.path, "have no response")] * blank)
        yield rows

    @classmethod
    def split(
        cls, rows: Sequence[Turns], run: RunConfig, seed: int
    ) -> tuple[list[Turns], list[Turns], str]:
        """By prompt: all that answer the same one stay together."""
        train, validation = split_by_prompt(rows, run.validation_split, seed)
        if not validation or not train:
            raise InputError(f"{run.train_file}: too few prompts to keep some for validation")
        how = f"{len(validation):,} of the records, drawn by prompt with seed {seed}"
        return train, validation, f"{how}, are kept for validation"

    @classmethod
    def found(cls, rows: Parts) -> Notice:
        """Counts, and the first record as it was understood."""
        counts = ", ".join(f"{part} {len(rows[part]):,}" for part in rows)
        first = rows["train"][0]
        return Notice(
            f"records: {counts}\n  first prompt    {show(first.text)}\n"
            f"  first response  {show(first.response)}"
        )

    @classmethod
    def texts(cls, rows: Sequence[Turns]) -> Iterable[str]:
        """See `Task.texts`."""
        return ["".join(text for text, _ in row.parts) for row in rows]

    @classmethod
    def of(cls, setup: Setup, rows: Sequence[Turns]) -> "Instruct":
        """See `Task.of`."""
        run, model = setup.run, setup.model
        chat = all(row.chat for row in rows)
        templates = CHAT if chat else (run.prompt_template, run.response_template)
        model.config = replace(model.config, task=cls.name, template=templates)
        return cls()

    @classmethod
    def trained(cls, setup: Setup) -> "Instruct":
        """See `Task.trained`."""
        return cls()

    def encode_file(self, file: File, rows: Sequence[Turns], tokenizer: Tokenizer) -> Said:
        """Says how many are cut, and how many have no response left. See `Task.encode_file`."""
        limit, found = tokenizer.max_length, self.encode(rows, tokenizer)
        examples = [e for e in found if any(t != IGNORE_INDEX for t in e.target)]
        empty, cut = len(found) - len(examples), sum(e.cut for e in examples)
        if not examples:
            raise InputError(
                f"{file.path}: every prompt fills {limit} tokens, so no response is left: raise "
                "--max_seq_length"
            )
        if (empty or cut) and file.run.overflow == "error":
            where = next(row for row, e in zip(rows, found, strict=True) if e.cut)
            raise InputError(
                f"{where.file}:{where.line}: longer than {limit} tokens, as {empty + cut:,} of "
                f"{len(found):,} records are: raise --max_seq_length, or --overflow cut"
            )
        for count, what in ((cut, "cut there"), (empty, "left out: no response is left")):
            if count:
                text = f"{count:,} of {len(found):,} records are longer than {limit} tokens and"
                yield Notice(f"{file.part}: {text} {what}", loud=True)
        return examples

    def encode(self, rows: Sequence[Turns], tokenizer: Tokenizer) -> list[Example]:
        """Dialogues to examples, cut at the tokenizer's `max_length`; a response ends with the
        token that ends a text."""
        examples = []
        for i in range(0, len(rows), BLOCK):
            block = rows[i : i + BLOCK]
            ids = iter(tokenizer.ids([text for row in block for text, _ in row.parts]))
            examples += [_example(row.parts, ids, tokenizer) for row in block]
        return examples


def _example(parts: Dialogue, ids: Iterable[Sequence[int]], tokenizer: Tokenizer) -> Example:
    tokens, target = array("i"), array("i")
    for (_, learned), part in zip(parts, ids, strict=False):
        part = array("i", [*part, tokenizer.eos] if learned else part)
        tokens += part
        target += part if learned else array("i", [IGNORE_INDEX]) * len(part)
    limit = tokenizer.max_length
    return Example(tokens[:-1][:limit], (), target[1:][:limit], len(tokens) > limit + 1)


def dialogues(path: str, prompt: str, response: str) -> tuple[list[Turns], int]:
    """The records of a file with a response, and how many have none.

    Args:
        path: see `read_records`.
        prompt, response: templates.

    Raises:
        InputError: a record has not what the templates name, or no record has a response.
    """
    templates = Template(prompt, "prompt_template"), Template(response, "response_template")
    found, blank = [], 0
    for record in read_records(path, [name for t in templates for name in t.names]):
        talk = isinstance(record.fields.get("messages"), list)
        if talk:
            parts = chat(record)
        else:
            parts = (templates[0].fill(record), False), (templates[1].fill(record), True)
        if not parts[-1][0].strip():
            blank += 1
        elif not "".join(text for text, learned in parts if not learned).strip():
            raise InputError(f"{record.file}:{record.line}: expected a prompt, got an empty one")
        else:
            found.append(Turns(parts, record.line, record.file, talk))
    if not found:
        raise InputError(f"{path}: expected a response in some record, every one is blank")
    return found, blank


def prompts(path: str, template: str) -> list[Turns]:
    """The records of a file as dialogues whose last response is to be written.

    Args:
        path: see `read_records`.
        template: of the prompt.

    Raises:
        InputError: a record has not what the template names.
    """
    filled, found = Template(template, "prompt_template"), []
    for record in read_records(path, filled.names):
        messages = record.fields.get("messages")
        if isinstance(messages, list):
            asked = list(messages)
            while asked and isinstance(asked[-1], dict) and asked[-1].get("role") == "assistant":
                asked.pop()  # what is to be written
            asked = {"messages": [*asked, {"role": "assistant", "content": ""}]}
            parts = chat(Record(asked, record.line, record.file))
        else:
            parts = (filled.fill(record), False), ("", True)
        found.append(Turns(parts, record.line, record.file))
    return found


def prompt_of(text: str, template: str) -> str:
    """The prompt of a text that stands for the one field of a template.

    Raises:
        InputError: the template has several.
    """
    filled = Template(template, "prompt_template")
    if len(set(filled.names)) != 1:
        names = " and ".join(dict.fromkeys(filled.names)) or "no field"
        raise InputError(
            f"the model's prompts are {template!r}, with {names}: give a file with --data, or "
            "--raw texts"
        )
    return filled.fill(Record({filled.names[0]: text}, 1, "text"))


def chat(record: Record) -> Dialogue:
    """Messages as `role: content`, a line each; the assistant's are learned.

    Raises:
        InputError: a message has no role or content, or none is the assistant's.
    """
    where, parts, before = f"{record.file}:{record.line}", [], ""
    for message in record.fields["messages"]:
        role, content = (message.get(k) if isinstance(message, dict) else None
                         for k in ("role", "content"))  # fmt: skip
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: expected messages with role and content, got {message!r}")
        if role == "assistant":
            parts += [(f"{before}{role}:", False), (f" {content}", True)]
            before = ""
        else:
            before += f"{role}: {content}\n"
    if not parts:
        raise InputError(f"{where}: expected a message of the assistant, found none")
    return tuple(parts)


def split_by_prompt(
    rows: list[Turns], fraction: float, seed: int
) -> tuple[list[Turns], list[Turns]]:
    """(train, validation): of the different prompts a share is held out, a function of `seed`."""
    prompts = list(dict.fromkeys(row.text for row in rows))
    share = max(1, round(len(prompts) * fraction))
    held = set(random.Random(seed).sample(prompts, min(share, len(prompts) - 1)))
    parts: tuple[list[Turns], list[Turns]] = [], []
    for row in rows:
        parts[row.text in held].append(row)
    return parts
