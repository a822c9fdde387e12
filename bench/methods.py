"""What each fine-tuning method costs and gives: full, partial, adaptive, two-rate, bitfit.

    python -m bench.methods --data DIR --seeds 0 1 2

Each run is a process of its own, in turn (full, partial, ..., full, ...), with the settings of
`bench.trainers` and the flags below. A method with few parameters needs a higher rate; adaptive
rates fall from the head down, around the rate of full. Each run is appended to
bench/results/methods.jsonl; the last line printed is JSON: means over the seeds.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import minift
from bench.measure import ROOT
from bench.trainers import (
    append,
    find_files,
    last_json,
    machine,
    make_parser,
    minift_command,
    model_folder,
    write_data,
)

RESULTS = ROOT / "bench" / "results" / "methods.jsonl"
METHODS = {  # name -> flags
    "full": "",
    "partial": "--freeze embeddings,layers:0-3",
    # In MiniLM's six layers from 8e-5 down to 2.6e-5.
    "adaptive": "--learning_rate 1e-4 --layer_lr_decay 0.8 --head_lr 1e-3",
    "two-rate": "--lr_rules layers:0-3=1e-6,*=5e-5",
    "bitfit": "--method bitfit --learning_rate 1e-3",
}
MEANS = ("eval_accuracy", "seconds_per_step", "peak_rss_mib")


def run_method(args: argparse.Namespace, flags: str, seed: int, data: Path) -> dict:
    """`minift train` with the flags of a method: what it trained, reached and cost."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        command = minift_command(args, seed, args.dtype, data, output)
        summary = last_json([*command, *flags.split()])
        return {
            "trained_parameters": trained_parameters(output),
            "eval_accuracy": summary["eval_accuracy"],
            "eval_loss": summary["eval_loss"],
            "seconds_per_step": seconds_per_step(output),
            "tokens_per_second": summary["train_tokens_per_second"],
            "peak_rss_mib": summary["peak_rss_mib"],
            "train_loss": summary["train_loss"],
        }


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
    parser = make_parser(__doc__)
    parser.set_defaults(dtype="bf16")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    args.model = model_folder(args)
    train, validation = find_files(args)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: dict[str, list[dict]] = {name: [] for name in args.methods}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(train, validation, args.rows, data)
        for seed in args.seeds:
            for name in args.methods:
                facts = {"method": name, "flags": METHODS[name], "data": train.parent.name,
                         "rows": args.rows, "seed": seed, "epochs": args.epochs,
                         "dtype": args.dtype}  # fmt: skip
                result = run_method(args, METHODS[name], seed, data)
                rows[name].append(result)
                append(RESULTS, {**facts, **result, **machine(args.threads)})
    summary = {
        name: {
            "trained_parameters": runs[0]["trained_parameters"],
            **{fact: statistics.mean(run[fact] for run in runs) for fact in MEANS},
        }
        for name, runs in rows.items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
