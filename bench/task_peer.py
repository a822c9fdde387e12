"""One run of a task of bench.tasks by transformers' Trainer, as a process of its own.

    python -m bench.task_peer --data FOLDER --settings '{...}' --answers FILE

bench.tasks writes FOLDER and gives the settings. Prints one JSON object: seconds of training and of
answering, memory; the answers to the dev rows are in FILE, as JSON.

Words are tagged by their first piece, all others of a word are not learned. A question with a long
context is several windows that share 128 tokens; a window without the answer has it at [CLS]. An
answer is the best pair of the 20 likeliest first and last tokens, of 30 tokens at most. These are
the choices of transformers' own examples.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers import import_transformers
from bench.task_data import file_of, written
from bench.turns import peak_rss_mib

STRIDE = 128  # tokens that two windows share
LIKELIEST = 20  # first and last tokens that are tried
LONGEST = 30  # tokens of an answer
EVAL_BATCH = 64
GIVEN = (  # settings with one name for both trainers
    "seed", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "warmup_steps",
    "weight_decay", "lr_scheduler_type",
)  # fmt: skip


def encode_texts(rows: Sequence[dict], tokenizer, numbers: dict[str, int], length: int) -> list:
    """Texts and pairs; the labels are numbers already, or have one in `numbers`."""
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    found = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=length)
    return [
        {**{key: found[key][i] for key in found if key != "attention_mask"},
         "labels": numbers.get(row["label"], row["label"])}
        for i, row in enumerate(rows)
    ]  # fmt: skip


def encode_words(rows: Sequence[dict], tokenizer, numbers: dict[str, int], length: int) -> list:
    """Sentences; `begins` is for each token the word that it begins, or None. There stands the
    word's tag, and -100 elsewhere."""
    found = tokenizer([row["words"] for row in rows], is_split_into_words=True, truncation=True,
                      max_length=length)  # fmt: skip
    examples = []
    for i, row in enumerate(rows):
        words = found.word_ids(i)
        begins = [w if w != before else None for before, w in pairwise([None, *words])]
        labels = [-100 if w is None else numbers.get(row["tags"][w], -100) for w in begins]
        ids = found["input_ids"][i]
        examples.append({"input_ids": ids, "labels": labels, "begins": begins})
    return examples


def encode_questions(rows: Sequence[dict], tokenizer, length: int) -> list[dict]:
    """Windows of questions and contexts; `row` is the number of the question, `spans` where each
    token stands in the context, None if it is none of it."""
    found = tokenizer(
        [row["question"].strip() for row in rows], [row["context"] for row in rows],
        truncation="only_second", max_length=length, stride=STRIDE,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    examples = []
    for i, number in enumerate(found["overflow_to_sample_mapping"]):
        row = rows[number]
        parts = zip(found["offset_mapping"][i], found.sequence_ids(i), strict=True)
        spans = [tuple(span) if part == 1 else None for span, part in parts]
        first, last = place(spans, row["starts"][0], row["starts"][0] + len(row["answers"][0]))
        read = {key: found[key][i] for key in ("input_ids", "token_type_ids") if key in found}
        answer = {"start_positions": first, "end_positions": last}
        examples.append({**read, **answer, "row": number, "spans": spans})
    return examples


def place(spans: Sequence[tuple | None], begin: int, end: int) -> tuple[int, int]:
    """The first and last token of the characters from `begin` up to `end`; 0, which is [CLS],
    where the window does not hold all of them."""
    inside = [i for i, span in enumerate(spans) if span and span[0] < end and span[1] > begin]
    if not inside or spans[inside[0]][0] > begin or spans[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def best_texts(
    rows: Sequence[dict], examples: Sequence[dict], starts: Sequence, ends: Sequence
) -> list[str]:
    """The answer to each question: the pair of tokens with the highest sum of scores.

    Args:
        rows: the questions.
        examples: their windows.
        starts, ends: scores (L,) or more of each window's tokens to be the first and the last.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(rows)
    for example, start, end in zip(examples, starts, ends, strict=True):
        spans, context = example["spans"], rows[example["row"]]["context"]
        for i in likeliest(start, len(spans)):
            for j in likeliest(end, len(spans)):
                if not (spans[i] and spans[j] and i <= j < i + LONGEST):
                    continue
                total = float(start[i]) + float(end[j])
                if total > best[example["row"]][0]:
                    best[example["row"]] = total, context[spans[i][0] : spans[j][1]]
    return [text for _, text in best]


def likeliest(scores: Sequence[float], n: int) -> np.ndarray:
    """The places of the highest of the first `n` scores, the highest first."""
    return np.argsort(-np.asarray(scores[:n], np.float32), kind="stable")[:LIKELIEST]


def tags_of(row: dict, begins: Sequence[int | None], ids: Sequence[int], names: list) -> list:
    """The tag of each word; None where it has no piece, or was cut."""
    given: list[str | None] = [None] * len(row["words"])
    for word, number in zip(begins, ids, strict=False):  # ids are padded
        if word is not None:
            given[word] = names[number]
    return given


def names_of(task: str, rows: Sequence[dict]) -> list[str]:
    """What there is to tell apart."""
    if task == "tagging":
        return sorted({tag for row in rows for tag in row["tags"]})
    return sorted({row["label"] for row in rows}) if task == "classification" else []


def load(transformers, args: dict, names: list[str]) -> tuple[Any, Any]:
    """The model with a new head, and its tokenizer."""
    kinds = {"tagging": transformers.AutoModelForTokenClassification,
             "qa": transformers.AutoModelForQuestionAnswering}  # fmt: skip
    head: dict[str, Any] = {"num_labels": len(names)} if names else {}
    if args["task"] == "regression":
        head = {"num_labels": 1, "problem_type": "regression"}
    kind = kinds.get(args["task"], transformers.AutoModelForSequenceClassification)
    model = kind.from_pretrained(args["model"], dtype=torch.float32, **head)
    return model, transformers.AutoTokenizer.from_pretrained(args["model"])


def encode(args: dict, rows: Sequence[dict], tokenizer, names: list[str]) -> list[dict]:
    """The examples of a task."""
    numbers, length = {name: i for i, name in enumerate(names)}, args["max_seq_length"]
    if args["task"] == "qa":
        return encode_questions(rows, tokenizer, length)
    encode_rows = encode_words if args["task"] == "tagging" else encode_texts
    return encode_rows(rows, tokenizer, numbers, length)


def make_trainer(transformers, args: dict, model, tokenizer, train: list[dict], folder: str):
    """The Trainer: in bf16 at its best on a CPU, in fp32 as it comes."""
    best, tagging = args["dtype"] == "bf16", args["task"] == "tagging"
    settings = transformers.TrainingArguments(
        output_dir=folder,
        **{name: args[name] for name in GIVEN},
        max_steps=args["max_steps"] or -1,
        per_device_eval_batch_size=EVAL_BATCH,
        bf16=best,
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        train_sampling_strategy="group_by_length" if best else "random",
    )
    kind = "DataCollatorForTokenClassification" if tagging else "DataCollatorWithPadding"
    return transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=train,
        data_collator=getattr(transformers, kind)(tokenizer),
        preprocess_logits_for_metrics=(lambda logits, _: logits.argmax(-1)) if tagging else None,
    )


def answer(trainer, args: dict, rows: Sequence[dict], dev: list[dict], names: list[str]) -> list:
    """The answers to the dev rows, the longest first: least is padded."""
    order = sorted(range(len(dev)), key=lambda i: -len(dev[i]["input_ids"]))
    trainer.args.train_sampling_strategy = "sequential"  # it orders what is predicted as well
    found = trainer.predict([dev[i] for i in order]).predictions
    back = np.argsort(order)
    if args["task"] == "qa":
        return best_texts(rows, dev, *(scores[back] for scores in found[:2]))
    found = found[back]
    if args["task"] == "tagging":
        return [tags_of(row, example["begins"], ids, names)
                for row, example, ids in zip(rows, dev, found, strict=True)]  # fmt: skip
    if args["task"] == "regression":
        return found.reshape(-1).tolist()
    return [names[i] for i in found.argmax(-1)]


def run(data: Path, args: dict) -> tuple[dict, list]:
    """Trains and answers: what it took, and the answers."""
    transformers = import_transformers()
    transformers.set_seed(args["seed"])
    if args["threads"]:
        torch.set_num_threads(args["threads"])
    train, rows = (written(args["task"], file_of(data, args["task"], p)) for p in ("train", "dev"))
    names = names_of(args["task"], train)
    model, tokenizer = load(transformers, args, names)
    examples, dev = (encode(args, part, tokenizer, names) for part in (train, rows))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(transformers, args, model, tokenizer, examples, folder)
        start = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        answers = answer(trainer, args, rows, dev, names)
    facts = {
        "trainer": f"transformers {transformers.__version__}",
        "train_runtime": trained - start,
        "eval_runtime": time.perf_counter() - trained,
        "steps": trainer.state.global_step,
        "peak_rss_mib": peak_rss_mib(),
    }
    return facts, answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="has train.* and dev.*")
    parser.add_argument("--settings", required=True, help="JSON: task, model, seed, dtype, ...")
    parser.add_argument("--answers", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts, answers = run(args.data, json.loads(args.settings))
    args.answers.write_text(json.dumps(answers), "utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
