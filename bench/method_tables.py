"""README's tables of fine-tuning methods, from the rows of bench.methods and bench.adapters."""

import statistics
from collections.abc import Sequence

from bench.rows import Missing, having, newest_run, on_cpu
from bench.tables import paragraph, said, table, where
from bench.trainers import SHARED


def busy(rows: Sequence[dict]) -> str:
    """Said where others computed too."""
    shared = max(row.get("others_cpu") or 0.0 for row in rows) > SHARED
    return ", some beside other work" * shared


def methods(rows: Sequence[dict]) -> str:
    """The means of every fine-tuning method on two sets."""
    rows = having(on_cpu(rows), rows=None)
    rows = newest_run([row for row in rows if "score" in row], "method", "data", "seed")
    if not rows:
        raise Missing("methods.jsonl: expected runs of whole sets")
    groups = {(row["method"], row["data"]): [] for row in rows}
    for row in rows:
        groups[row["method"], row["data"]].append(row)
    seeds = {tuple(sorted(row["seed"] for row in runs)) for runs in groups.values()}
    if len(seeds) != 1:
        raise Missing(f"methods.jsonl: expected the same seeds of every method, got {seeds}")
    cells = []
    for name in dict.fromkeys(method for method, _ in groups):
        sst2, wnut = (groups.get((name, data), []) for data in ("sst2", "wnut17"))
        first = sst2[0]
        cells.append([
            name, f"`{first['flags'] or '(none)'}`", f"{first['trained_parameters']:,}",
            _score(sst2), _score(wnut), f"{_mean(sst2, 'seconds_per_step') * 1000:.0f} ms",
            f"{_mean(sst2, 'peak_rss_mib'):,.0f} MiB", f"{first['saved_mib']:.1f} MiB",
        ])  # fmt: skip
    head = ("method", "flags", "trained parameters", "SST-2 accuracy", "WNUT-17 entity F1", "step",
            "peak memory", "saved")  # fmt: skip
    words = (
        f"MiniLM, one epoch of SST-2 and two of WNUT-17 in bf16 on {where(rows[0])}, means of "
        f"{said(len(seeds.pop()))} seeds "
        f"with the learning rate in brackets; steps, memory and what is saved are those of "
        f"SST-2{busy(rows)}:"
    )
    return f"{paragraph(words)}\n\n{table(head, cells)}"


def _mean(runs: Sequence[dict], key: str) -> float:
    return statistics.mean(row[key] for row in runs)


def _score(runs: Sequence[dict]) -> str:
    if not runs:
        return "-"
    spread = statistics.stdev(row["score"] for row in runs) if len(runs) > 1 else 0.0
    rate = f"{runs[0]['learning_rate']:g}"
    if head := runs[0].get("head_lr"):
        rate += f", head {head:g}"
    return f"{_mean(runs, 'score'):.4f} ± {spread:.4f} ({rate})"


def adapters(rows: Sequence[dict]) -> str:
    """minift's adapters beside PEFT's; "" while there are no rows."""
    rows = newest_run(on_cpu(rows), "trainer", "model", "method", "turn")
    cells = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            ours, best, usual = (
                having(rows, trainer=who, model=model, method=method)
                for who in ("minift", "peft", "peft as it comes")
            )
            if ours:
                line = [model, method, str(ours[0]["batch"]), _rate(ours), _rate(best)]
                line += [_ratio(ours, best), _rate(usual), _ratio(ours, usual)]
                cells.append([*line, _memory(ours), _memory(best)])
    if not cells:
        return ""
    head = ("", "method", "batch", "minift", "PEFT at its best", "our time of its", "as it comes",
            "of its", "memory of minift", "of PEFT at its best")  # fmt: skip
    words = (
        "Training an adapter on random weights of the published sizes, beside PEFT's model in a "
        "plain loop: at its best (bf16 autocast, fused AdamW, batches grouped by length), and in "
        f"fp32 and random order; turn by turn on {where(rows[0])}{busy(rows)}. Real tokens a "
        "second, medians. PEFT has no prefix for encoders."
    )
    return f"{paragraph(words)}\n\n{table(head, cells)}"


def _rate(runs: Sequence[dict]) -> str:
    if not runs:
        return "-"
    return f"{statistics.median(row['tokens_per_second'] for row in runs):,.0f}"


def _memory(runs: Sequence[dict]) -> str:
    return f"{max(row['peak_rss_mib'] for row in runs):,.0f} MiB" if runs else "-"


def _ratio(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    """Of the times of the turns that both have, the median."""
    times = {row["turn"]: row["step_seconds"] for row in theirs}
    found = [row["step_seconds"] / times[row["turn"]] for row in ours if row["turn"] in times]
    return f"{statistics.median(found):.2f}" if found else "-"
