"""The data sets of bench.tasks: read once, cut to so many rows, and written for every trainer.

A folder holds train.* and dev.* in the form of the task: JSON lines of texts, pairs and labels
(classification, regression), CoNLL columns of words and tags (tagging), SQuAD's JSON (qa). Nothing
is chosen on the dev rows, so they may be a test set. Only "\\n" ends a line: texts hold U+2028.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDS = {"classification": "jsonl", "regression": "jsonl", "tagging": "conll", "qa": "json"}


@dataclass(frozen=True)
class DataSet:
    """What is learned of which files, and how."""

    task: str  # minift's --task
    train: str  # files below the folder of all data
    dev: str
    metrics: tuple[str, ...]  # of task_scores; the first is the one to compare by
    epochs: float
    batch: int = 32
    learning_rate: float = 5e-5
    max_seq_length: int = 128


DATA = {
    "sst2": DataSet("classification", "sst2/train.tsv", "sst2/dev.tsv", ("accuracy",), 1),
    "stsb": DataSet("regression", "stsb/train.tsv", "stsb/dev.tsv", ("pearson",), 1),
    # No sentence is cut at 256 tokens.
    "wnut17": DataSet(
        "tagging", "wnut17/wnut17train.conll", "wnut17/emerging.test.annotated", ("f1",), 1,
        learning_rate=5e-4, max_seq_length=256,
    ),
    "ud_english_ewt": DataSet(
        "tagging", "ud_english_ewt/pos.train.tsv", "ud_english_ewt/pos.dev.tsv", ("accuracy",), 1,
        learning_rate=5e-4, max_seq_length=256,
    ),
    "squad_subset": DataSet(
        "qa", "squad_subset/train.json", "squad_subset/dev.json", ("f1", "exact_match"), 1,
        batch=16, learning_rate=3e-4, max_seq_length=384,
    ),
}  # fmt: skip


def read_table(name: str, path: Path) -> list[dict]:
    """SST-2 (text, label) or STS-B (score, two sentences; with a header)."""
    lines = [line.split("\t") for line in path.read_text("utf-8").split("\n") if line]
    if name == "stsb":
        return [{"text": a, "text_pair": b, "label": float(score)} for score, a, b in lines[1:]]
    return [{"text": text, "label": label} for text, label in lines]


def read_columns(path: Path) -> list[dict]:
    """Sentences of words and tags: a word and its tag on a line, a blank line between sentences."""
    rows, words, tags = [], [], []
    for line in [*path.read_text("utf-8").split("\n"), ""]:
        if line.strip():
            word, tag = line.split("\t")
            words.append(word)
            tags.append(tag.strip())
        elif words:
            rows.append({"words": words, "tags": tags})
            words, tags = [], []
    return rows


def questions(squad: dict) -> Iterator[tuple[str, dict]]:
    """The context and the entry of every question."""
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                yield paragraph["context"], entry


def read_squad(path: Path) -> list[dict]:
    """Questions with their context and all answers to them."""
    return [
        {
            "id": entry["id"],
            "question": entry["question"],
            "context": context,
            "answers": [answer["text"] for answer in entry["answers"]],
            "starts": [answer["answer_start"] for answer in entry["answers"]],
        }
        for context, entry in questions(json.loads(path.read_text("utf-8")))
    ]


def read_rows(name: str, path: Path) -> list[dict]:
    """The rows of a file of a data set."""
    task = DATA[name].task
    if task == "tagging":
        return read_columns(path)
    return read_squad(path) if task == "qa" else read_table(name, path)


def write_rows(task: str, rows: Sequence[dict], path: Path) -> None:
    """Writes rows in the form of a task."""
    if task == "tagging":
        sentences = (zip(row["words"], row["tags"], strict=True) for row in rows)
        text = "\n".join("".join(f"{w}\t{t}\n" for w, t in sentence) for sentence in sentences)
    elif task == "qa":
        text = json.dumps({"version": "1.1", "data": [as_article(row) for row in rows]})
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def as_article(row: dict) -> dict:
    """A question in SQuAD's form."""
    found = zip(row["answers"], row["starts"], strict=True)
    answers = [{"text": text, "answer_start": start} for text, start in found]
    entry = {"id": row["id"], "question": row["question"], "answers": answers}
    return {"title": "", "paragraphs": [{"context": row["context"], "qas": [entry]}]}


def written(task: str, path: Path) -> list[dict]:
    """What `write_rows` wrote."""
    if task == "tagging":
        return read_columns(path)
    if task == "qa":
        return read_squad(path)
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def file_of(folder: Path, task: str, part: str) -> Path:
    """Of train or dev."""
    return folder / f"{part}.{ENDS[task]}"


def write_data(name: str, source: Path, limit: int | None, folder: Path) -> list[Any]:
    """Writes train.* and dev.*, the same rows for every trainer.

    Args:
        name: a key of DATA.
        source: folder of all data.
        limit: so many rows of each, the first; None: all.
        folder: where to.

    Returns:
        What is right for each dev row, see `task_scores.score`.
    """
    data, right = DATA[name], {"tagging": "tags", "qa": "answers"}
    for part, file in (("train", data.train), ("dev", data.dev)):
        if not (source / file).is_file():
            raise SystemExit(f"{source / file}: expected a file: give its folder as --data")
        rows = read_rows(name, source / file)[:limit]
        write_rows(data.task, rows, file_of(folder, data.task, part))
    return [row[right.get(data.task, "label")] for row in rows]
