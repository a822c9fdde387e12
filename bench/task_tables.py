"""README's tables of tasks and of evaluation, from the rows of bench.tasks and bench.evaluation."""

import statistics
from collections.abc import Sequence
from typing import Any

from bench.evaluation import DEFAULT, MINIFT, SORTED, ratios_of
from bench.rows import Missing, having, newest_groups, newest_run, on_cpu
from bench.tables import CPUS, paragraph, said, table, where
from bench.task_data import DATA
from bench.trainers import SHARED

TITLES = {  # data -> what it is, as README calls it
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnut17": "WNUT-17",
    "ud_english_ewt": "UD English EWT",
    "squad_subset": "SQuAD, 4,378 questions",
}
EVALUATED = {"sst2": "SST-2", "squad": "SQuAD"}  # of bench.evaluation
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
    # Each set by itself: they need not have run on one machine.
    sets = (newest_run(having(rows, data=name), "who", "seed") for name in TITLES)
    rows = [row for runs in sets for row in runs]
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
    versions = {row["trainer"].split()[1] for row in rows if row["who"] == "transformers"}
    versions = sorted(version.rpartition(".")[0] for version in versions)
    told, places = [], {}
    for name in (name for name in TITLES if having(rows, data=name)):
        row = having(rows, data=name)[0]
        places.setdefault(where(row), []).append(TITLES[name].partition(",")[0])
        epochs = f"{said(round(row['num_train_epochs']))} epoch"
        epochs += "s" * (row["num_train_epochs"] != 1)
        told.append(
            f"{TITLES[name].partition(',')[0]} {epochs} at {row['learning_rate']:g} in batches of "
            f"{row['per_device_train_batch_size']}"
        )
    machines = list(places)
    if len(machines) > 1:
        machines = [f"{place} ({', '.join(names)})" for place, names in places.items()]
    return (
        f"MiniLM on {' and '.join(machines)}, torch {first['torch'].partition('+')[0]}, bf16: "
        f"{', '.join(told)}; AdamW, linear decay after "
        f"{first['warmup_steps']} steps. Means and standard deviations of {said(seeds)} seeds, and "
        f"median times of training{', some beside other work' * busy}, run in turn with "
        f"transformers {' and '.join(versions)}'s Trainer at its best (autocast, fused AdamW, "
        "batches grouped by length): the same rows and settings, the model of the last step, one "
        "arithmetic for both answers."
    )


def evaluation(rows: Sequence[dict]) -> str:
    """Prediction beside the Trainer as it comes and at its best, in processor time; "" while there
    are no rows."""
    groups = newest_groups(having(on_cpu(rows), model="MiniLM"), "data", "dtype", "encoded")
    cells, told, shares, mixed = [], {}, [], {}
    for (name, dtype, encoded), group in groups.items():
        times = {row["who"]: row for row in group}
        if not {MINIFT, DEFAULT} < times.keys():
            raise Missing(f"evaluation.jsonl: {name} {dtype}: expected {MINIFT} and {DEFAULT}")
        shares.append(group[0]["others_cpu"] or 0.0)
        best = min((row for who, row in times.items() if who.startswith(SORTED)),
                   key=lambda row: row["cpu_s"])  # fmt: skip
        title = EVALUATED[name]
        if encoded:  # minift's time in bf16, the Trainer's in fp32
            who = {"bf16": MINIFT, "fp32": DEFAULT}[dtype]
            mixed.setdefault(title, {})[dtype] = times[who]["cpu_s"]
        told[title] = group[0]
        seconds = [f"{row['cpu_s']:.2f} s" for row in (times[MINIFT], times[DEFAULT], best)]
        ratios = [f"{ratio:.2f}" for ratio in ratios_of(times, "cpu_s")]
        cells.append([title, dtype, "texts" if encoded else "token ids", *seconds, *ratios])
    if not cells:
        return ""
    head = ("data", "dtype", "from", "minift", "Trainer as it comes", "at its best", "ratio",
            "at its best")  # fmt: skip
    text = paragraph(evaluation_conditions(told, max(shares) > SHARED))
    apart = [
        f"{pair['fp32'] / pair['bf16']:.1f} times on {title}"
        for title, pair in mixed.items()
        if len(pair) > 1
    ]
    last = "minift in bf16 beside the Trainer as it comes, in fp32, from texts: "
    last = f"\n\n{last}{', '.join(apart)}." if apart else ""
    return f"{text}\n\n{table(head, cells)}{last}"


def evaluation_conditions(told: dict[str, dict], busy: bool) -> str:
    """The machine, the rows, and what the Trainer was given."""
    row = next(iter(told.values()))
    sets = " and ".join(
        f"{found['rows']:,} rows of {title} ({found['tokens']:,} tokens)"
        for title, found in told.items()
    )
    cores = "one core" if row["threads"] == 1 else f"{row['threads']} cores"
    return (
        f"MiniLM on {cores} of {CPUS.get(row['cpu'], row['cpu'])}, torch "
        f"{row['torch'].partition('+')[0]}: {sets}, beside `Trainer.predict` of transformers "
        f"{row['transformers'].rpartition('.')[0]} with the same weights and dtype, in one "
        f"process. Processor time, medians of {said(row['turns'])} turns"
        f"{', beside other work' * busy}. As it comes the Trainer takes rows in the order of the "
        "file in batches of 8; at its best they are sorted by length beforehand, in the fastest of "
        "several batch sizes."
    )
