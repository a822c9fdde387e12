"""Which rows of bench/results/*.jsonl count: those of the newest run, on its device.

Every run appends, and nothing is taken away: old rows stay as history. What is timed side by side
in one process (a case of bench.kernels, a workload of bench.finetune on a GPU) has one time in all
its rows: `newest_groups` takes the rows with the newest time of each group. Where every trainer and
seed is a process of its own, a run has many times: `newest_run` takes the newest row, those at most
a day older, and of two with the same trainer and seed the later.
A row without a time is older than all others.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

DAY = timedelta(days=1)
NEVER = datetime(1, 1, 1, tzinfo=UTC)


class Missing(Exception):
    """The results lack what a table shows, or cannot be read."""


def read(file: Path) -> list[dict]:
    """The rows of a file, in its order; none, if there is no such file."""
    rows = []
    lines = file.read_text("utf-8").split("\n") if file.exists() else []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise Missing(f"{file.name}:{number}: expected a line of JSON") from None
    return rows


def time_of(row: dict) -> datetime:
    """When it was written."""
    return datetime.fromisoformat(row["utc"]) if row.get("utc") else NEVER


def device_of(row: dict) -> str:
    """The GPU, or without one the CPU."""
    return row.get("gpu") or row.get("cpu") or ""


def having(rows: Sequence[dict], /, **facts) -> list[dict]:
    """The rows that say just this; what a row does not say is None in it."""
    return [row for row in rows if all(row.get(name) == fact for name, fact in facts.items())]


def on_gpu(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row.get("gpu")]


def on_cpu(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if not row.get("gpu")]


def newest_run(rows: Sequence[dict], *names: str) -> list[dict]:
    """The rows that count.

    Args:
        rows: of one table.
        names: what tells the rows of one run apart.
    """
    if not rows:
        return []
    rows = sorted(rows, key=time_of)  # stable: of two at the same time the later line is the last
    last = rows[-1]
    counted = {}
    for row in rows:
        if device_of(row) == device_of(last) and time_of(last) - time_of(row) <= DAY:
            counted[tuple(row.get(name) for name in names)] = row
    return list(counted.values())


def newest_groups(rows: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    """What the rows say of `names` -> those that say it and count, in the order of their runs; of
    the device of the newest row alone."""
    device = device_of(max(rows, key=time_of)) if rows else ""
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=time_of):
        if device_of(row) == device:
            group = groups.setdefault(tuple(row[name] for name in names), [])
            if group and group[0]["utc"] != row["utc"]:
                group.clear()  # of an earlier run
            group.append(row)
    return groups


def newest_cases(rows: Sequence[dict]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Of bench.kernels: (op, shape, pass) -> contender -> row; a run of small shapes is none."""
    groups = newest_groups([row for row in rows if not row["quick"]], "op", "shape", "pass")
    return {case: {row["contender"]: row for row in group} for case, group in groups.items()}
