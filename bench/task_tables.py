"""README's table of tasks, from the rows of bench.tasks."""

import statistics
from collections.abc import Sequence
from typing import Any

from bench.rows import Missing, having, newest_run, on_cpu
from bench.tables import CPUS, paragraph, said, table
from bench.task_data import DATA
from bench.trainers import SHARED

TITLES = {  # data -> what it is, as README calls it
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnut17": "WNUT-17",
    "ud_english_ewt": "UD English EWT",
    "squad_subset": "SQuAD, 4,378 questions",
}
METRICS = {"pearson": "Pearson's r", "f1": "F1", "exact_match": "exact match"}
OF_ENTITIES = "entity F1"


def spread(runs: Sequence[dict], metric: str) -> tuple[float, float]:
    """Mean and standard deviation of a metric; of one run the latter is 0."""
    found = [row["metrics"][metric] for row in runs]
    return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def median_ratio(ours: Sequence[dict], theirs: Sequence[dict], key: str) -> float:
    """The median over the seeds of their time by ours: above 1 ours is faster."""
    times = {row["seed"]: row[key] for row in ours}
    return statistics.median(row[key] / times[row["seed"]] for row in theirs)


def beside(runs: dict[str, list[dict]], metrics: Sequence[str]) -> dict[str, Any]:
    """The runs of one data set in short.

    Args:
        runs: by trainer, minift's under "minift".
        metrics: to show.
    """
    summary: dict[str, Any] = {}
    for name, rows in runs.items():
        key = name.replace(" ", "_")
        for metric in metrics:
            summary[f"{key}_{metric}"], summary[f"{key}_{metric}_sd"] = spread(rows, metric)
        for time in ("train_runtime", "eval_runtime"):
            summary[f"{key}_{time}"] = statistics.median(row[time] for row in rows)
            if name != "minift" and "minift" in runs:
                summary[f"ratio_of_{time}_to_{key}"] = median_ratio(runs["minift"], rows, time)
    return summary


def tasks(rows: Sequence[dict]) -> str:
    """Each task on its data beside the Trainer at its best; "" while there are no rows."""
    rows = [{**row, "who": row["trainer"].split()[0]} for row in having(on_cpu(rows), rows=None)]
    rows = having(rows, dtype="bf16", max_steps=0, model="MiniLM")
    rows = newest_run(rows, "data", "who", "seed")
    cells, seeds = [], set()
    for name in (name for name in TITLES if having(rows, data=name)):
        ours, theirs = (having(rows, data=name, who=who) for who in ("minift", "transformers"))
        found = [tuple(sorted(row["seed"] for row in runs)) for runs in (ours, theirs)]
        if found[0] != found[1]:
            raise Missing(f"tasks.jsonl: {name}: expected runs of the same seeds, got {found}")
        seeds.add(found[0])
        cells += lines(name, ours, theirs)
    if not cells:
        return ""
    if len(seeds) > 1:
        raise Missing(f"tasks.jsonl: expected the same seeds of every data set, got {seeds}")
    head = ("", "data", "metric", "minift", "transformers", "time of minift",
            "of transformers", "ratio")  # fmt: skip
    return f"{paragraph(conditions(rows, len(seeds.pop())))}\n\n{table(head, cells)}"


def lines(name: str, ours: list[dict], theirs: list[dict]) -> list[list[str]]:
    """A line for each metric; the times stand in the first."""
    task, cells = ours[0]["task"], []
    times = [f"{statistics.median(row['train_runtime'] for row in runs) / 60:.1f} min"
             for runs in (ours, theirs)]  # fmt: skip
    times.append(f"{median_ratio(ours, theirs, 'train_runtime'):.2f}")
    for metric in DATA[name].metrics:
        values = ["{:.4f} ± {:.4f}".format(*spread(runs, metric)) for runs in (ours, theirs)]
        called = OF_ENTITIES if (task, metric) == ("tagging", "f1") else METRICS.get(metric, metric)
        title = ["", ""] if cells else [f"`--task {task}`", TITLES[name]]
        cells.append([*title, called, *values, *([""] * 3 if cells else times)])
    return cells


def conditions(rows: Sequence[dict], seeds: int) -> str:
    """The machine and the settings."""
    first, busy = rows[0], max(row.get("others_cpu") or 0.0 for row in rows) > SHARED
    (version,) = {row["trainer"].split()[1] for row in rows if row["who"] == "transformers"}
    told = []
    for name in (name for name in TITLES if having(rows, data=name)):
        row = having(rows, data=name)[0]
        epochs = f"{said(round(row['num_train_epochs']))} epoch"
        epochs += "s" * (row["num_train_epochs"] != 1)
        told.append(
            f"{TITLES[name].partition(',')[0]} {epochs} at {row['learning_rate']:g} in batches of "
            f"{row['per_device_train_batch_size']}"
        )
    return (
        f"MiniLM on {first['threads']} cores of {CPUS.get(first['cpu'], first['cpu'])}, torch "
        f"{first['torch'].partition('+')[0]}, bf16: {', '.join(told)}; AdamW, linear decay after "
        f"{first['warmup_steps']} steps. Means and standard deviations of {said(seeds)} seeds, and "
        f"median times of training{', some beside other work' * busy}, run in turn with "
        f"transformers {version.rpartition('.')[0]}'s Trainer at its best (autocast, fused AdamW, "
        "batches grouped by length): the same rows and settings, the model of the last step, one "
        "arithmetic for both answers."
    )
