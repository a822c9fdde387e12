"""Which rows of bench/results/*.jsonl count.

Every run appends, and nothing is taken away: old rows stay as history. Of the rows that a table or
a plot is about, those of the newest run count: those of the same device as the newest row, at most
a day older than it; and of rows that say the same of `names` (trainer and seed, say) the last. A
row without a time is older than all others.
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


def newest_cases(rows: Sequence[dict]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Of bench.kernels: (op, shape, pass) -> contender -> row, each case from the newest run that
    timed it on the device of the newest; a run of small shapes is none."""
    rows = [row for row in rows if not row["quick"]]
    device = device_of(max(rows, key=time_of)) if rows else ""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in sorted(rows, key=time_of):
        if device_of(row) == device:
            case = cases.setdefault((row["op"], row["shape"], row["pass"]), {})
            if any(other["utc"] != row["utc"] for other in case.values()):
                case.clear()  # of an earlier run
            case[row["contender"]] = row
    return cases
