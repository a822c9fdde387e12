"""README's tables, and its sentences that hold numbers: each a function from rows to Markdown.

Given all rows of a file, each takes those that count (bench/rows.py). A function of GPU rows
returns "" while there are none.
"""

import statistics
import textwrap
from collections.abc import Sequence

from bench.figures import ceilings, is_ours, timed_rows
from bench.rows import Missing, having, newest_cases, newest_groups, newest_run, on_cpu, on_gpu

WIDTH = 104
CODEGEN = ("registers", "spill_bytes", "shared_bytes", "wide_accesses")
SHOWN = (  # of bench.codegen: one launch for each path that is trained
    "attention._forward_kernel bf16, D 64",
    "attention._forward_kernel bf16, D 64, dropout",
    "attention._forward_kernel bf16, D 64, short",
    "attention_backward._dq_kernel bf16, D 64",
    "attention_backward._dkv_kernel bf16, D 64",
    "attention_backward._short_kernel bf16, D 64, short",
    "cross_entropy._loss_kernel bf16, V 50257",
    "cross_entropy._gradient_kernel bf16, V 50257",
    "cross_entropy._in_place_kernel bf16, V 50257",
    "linear_cross_entropy._gather_kernel bf16",
    "add_norm._add_norm_kernel bf16, C 768",
    "add_norm_backward._add_norm_backward_kernel bf16, C 768, no ds",
    "bias_gelu._gelu_kernel gelu_erf bf16",
    "bias_gelu._gradient_kernel gelu_erf bf16",
    "embed._forward_kernel C 768, 3 tables, norm, dropout",
    "embed_backward._rows_kernel C 768, 3 tables, norm, dropout",
    "embed_backward._pieces_kernel C 768, 3 tables",
    "adamw_step.sum_kernel all dtypes",
    "adamw_step.scalars_kernel clipped",
    "adamw_step.update_kernel all dtypes",
)
TRAINERS = {  # as README calls them -> what their rows say
    "minift, bf16": {"who": "minift", "dtype": "bf16", "order": "random"},
    "transformers at its best": {"who": "transformers", "dtype": "bf16", "order": "grouped"},
    "transformers as it comes": {"who": "transformers", "dtype": "fp32", "order": "random"},
}
CPUS = {
    "Intel(R) Xeon(R) Processor": "an Intel Xeon with AMX",
    "AMD EPYC": "an AMD EPYC with AVX512-BF16",
}
NUMERALS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def paragraph(text: str) -> str:
    """In lines of README's width."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    first, *lines = (
        "|".join(f" {cell} " if cell else " " for cell in row) for row in (head, *rows)
    )
    return "\n".join(f"|{line}|" for line in (first, "|".join(["---"] * len(head)), *lines))


def where(row: dict) -> str:
    """The machine of a row."""
    cores = f"{said(row['threads'])} core{'s' * (row['threads'] > 1)}"
    return f"{cores} of {CPUS.get(row['cpu'], row['cpu'])}"


def said(n: int) -> str:
    """A small number as a word."""
    return NUMERALS[n] if n < len(NUMERALS) else f"{n:,}"


# -------------------------------------------------------------------- kernels


def codegen(rows: Sequence[dict]) -> str:
    """What the kernels compile to for an H100 or H200."""
    found = {row["kernel"]: row for row in rows if row["arch"] == "sm_90"}
    if lost := [name for name in SHOWN if name not in found]:
        raise Missing(f"codegen-triton-3.6.0.jsonl: no launch {lost[0]!r}")
    cells = [[f"`{name}`", *(f"{found[name][key]:,}" for key in CODEGEN)] for name in SHOWN]
    head = ("kernel", "registers", "spilled", "shared bytes", "accesses of 128 bits")
    return f"For an H100 or H200, triton 3.6.0:\n\n{table(head, cells)}"


def kernels(rows: Sequence[dict]) -> str:
    """How the kernels stand on a GPU; before there was one, what is known instead."""
    cases = newest_cases(on_gpu(rows))
    timed = timed_rows(rows)
    if not timed:
        return paragraph(
            "They have not run on a GPU yet: until they have, what is known of them is that "
            "interpreted they are at most twice as far from fp64 as torch in the same dtype, and "
            "what they compile to."
        )
    ours = [case["ours"] for case in cases.values() if "ours" in case]
    compared = [row for row in timed if row["ratio_to_best_peer"]]
    lost = [row for row in compared if row["ratio_to_best_peer"] > 1]
    bad = [row for row in ours if row["status"] in ("wrong", "failed")]
    largest = {}
    for row in sorted(timed, key=lambda row: row["floor_ms"]):
        largest[row["op"], row["pass"]] = row
    chosen = [row for row in ours if row in lost or row in bad or row in largest.values()]
    copy, product = ceilings(timed)
    text = (
        f"{machine(timed[-1])}: medians, in CUDA graphs where there can be one, with nothing in "
        "the cache. The ceiling of an operation is the time that the bytes it must move take at "
        f"the rate of a copy, {copy / 1e12:.3g} TB/s in the same run"
    )
    text += f", or its flops at that of a product, {product / 1e12:.3g} TFLOP/s" if product else ""
    text += f". {len(compared) - len(lost)} of {len(compared)} cases are faster than every peer. "
    text += "Here are the largest of each operation and pass, and all others that are not:"
    head = ("operation, pass", "shape", "ms", "of the ceiling", "x fastest peer", "which is")
    return f"{paragraph(text)}\n\n{table(head, [kernel_cells(row, cases) for row in chosen])}"


def kernel_cells(row: dict, cases: dict) -> list[str]:
    """A line of the table: ours beside the fastest peer."""
    title = [f"{row['op']}, {row['pass']}", row["shape"]]
    if row["status"] != "timed":
        return [*title, row["status"].upper(), "-", "-", "-"]
    peers = cases[row["op"], row["shape"], row["pass"]].values()
    peers = [r for r in peers if r["status"] == "timed" and r["contender"] != "ours"]
    best = min(peers, key=lambda r: r["p50"], default=None)
    beside = [f"{row['ratio_to_best_peer']:.2f}", best["contender"]] if best else ["-", "none"]
    doubt = "" if row["trusted"] else " (the machine was busy)"
    return [*title, f"{row['p50']:.4f}{doubt}", f"{row['of_copy']:.0%}", *beside]


def machine(row: dict) -> str:
    """What a number was taken on."""
    return (
        f"On an {row['gpu']} ({row['utc'][:10]}, commit {row['commit']}, torch {row['torch']}, "
        f"triton {row['triton']})"
    )


# ---------------------------------------------------------------- fine-tuning


def counted(rows: Sequence[dict]) -> list[dict]:
    """The runs on 2,000 rows on a CPU that count; `who` is the trainer without its version."""
    rows = having(on_cpu(rows), data="sst2", rows=2000, epochs=1)
    rows = [{**row, "who": row["trainer"].split()[0]} for row in rows]
    return newest_run(rows, "who", "dtype", "order", "seed")


def trainers(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Those of each trainer."""
    rows = counted(rows)
    found = {name: having(rows, **facts) for name, facts in TRAINERS.items()}
    seeds = {name: sorted(row["seed"] for row in runs) for name, runs in found.items()}
    if not rows or len(set(map(tuple, seeds.values()))) > 1:
        raise Missing(f"finetune.jsonl: expected the same seeds of every trainer, got {seeds}")
    return found


def matmuls_alone(rows: Sequence[dict]) -> float | None:
    """Real tokens a second of a step's matmuls and nothing else, where they were timed as well."""
    rates = [row["tokens_per_second"] for row in having(counted(rows), who="matmuls")]
    return statistics.median(rates) if rates else None


def finetune(rows: Sequence[dict]) -> str:
    """Fine-tuning on a CPU beside transformers: medians, and the ratio."""
    found = trainers(rows)
    ours, best, _ = found.values()
    first = ours[0]
    tokens = statistics.mean(r["tokens_per_second"] * r["train_runtime"] / r["rows"] for r in ours)
    cpu = CPUS.get(first["cpu"], first["cpu"])
    version = best[0]["trainer"].split()[1].rpartition(".")[0]
    setting = (
        f"Fine-tuning MiniLM on {first['rows']:,} rows of SST-2 (sentences of {tokens:.0f} tokens "
        f"on average), batch 32, on {first['threads']} cores of {cpu}, torch "
        f"{first['torch'].partition('+')[0]}; medians of {said(len(ours))} seeds, run in turn with "
        f"transformers {version}'s Trainer: as it comes (fp32, padded to the longest of a batch), "
        "and at its best (bf16 autocast, rows grouped by length). Tokens are real ones; padding "
        "counts for nobody."
    )
    if floor := matmuls_alone(rows):
        setting += (
            f" The matmuls of minift's steps alone, back to back, make {floor:,.0f} tokens/s."
        )

    def median(runs, key):
        return statistics.median(row[key] for row in runs)

    cells = [
        [name, f"{median(runs, 'tokens_per_second'):,.0f}",
         f"{median(runs, 'peak_rss_mib'):,.0f} MiB"]
        for name, runs in found.items()
    ]  # fmt: skip
    return f"{paragraph(setting)}\n\n{table(('', 'real tokens/s', 'peak memory'), cells)}"


def accuracy(rows: Sequence[dict]) -> str:
    """The ratio pair by pair, and what both reach.

    Args:
        rows: of bench.finetune on a CPU, those without times too.
    """
    ours, best, _ = trainers(rows).values()
    rate = {row["seed"]: row["tokens_per_second"] for row in best}
    ratios = [row["tokens_per_second"] / rate[row["seed"]] for row in ours]
    text = (
        f"The ratio to the best, pair by pair: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}; the machine is shared, and its matmuls were "
        "seen to vary by half). "
    )
    sst2 = {"data": "sst2", "epochs": 1}
    (mine, error), (theirs, their_error) = (mean_and_error(r) for r in both(rows, **sst2))
    count = said(len(both(rows, **sst2)[0]))
    text += (
        "Learning on all 6,920 rows, accuracy on the development rows after one epoch, "
        f"{count} seeds each: minift {mine:.4f} (standard error {error:.4f}), transformers "
        f"{theirs:.4f} ({their_error:.4f}), both in bf16 and random order."
    )
    mine, theirs = (sorted(r, key=lambda row: row["seed"])
                    for r in both(rows, data="banking77", epochs=5))  # fmt: skip

    def listed(runs, key, form=""):
        return " and ".join(format(row[key], form) for row in runs)

    intents = (
        "On BANKING77 (77 intents, 10,003 rows, five epochs, otherwise the same settings; accuracy "
        f"on the 3,080 test rows for seeds {listed(mine, 'seed')}): minift "
        f"{listed(mine, 'eval_accuracy', '.4f')}, transformers "
        f"{listed(theirs, 'eval_accuracy', '.4f')}."
    )
    return f"{paragraph(text)}\n\n{paragraph(intents)}"


def both(rows: Sequence[dict], **facts) -> list[list[dict]]:
    """The runs on all rows in bf16 and random order that count: minift's, and transformers'."""

    def by(name: str) -> list[dict]:
        return newest_run([row for row in rows if row["trainer"].split()[0] == name], "seed")

    rows = having(on_cpu(rows), rows=None, dtype="bf16", order="random", **facts)
    found = [by("minift"), by("transformers")]
    seeds = [sorted(row["seed"] for row in runs) for runs in found]
    if seeds[0] != seeds[1] or len(seeds[0]) < 2:
        raise Missing(f"{facts['data']}: expected accuracies of the same seeds, got {seeds}")
    return found


def mean_and_error(runs: Sequence[dict]) -> tuple[float, float]:
    """Of the accuracy: its mean, and the standard error of that."""
    found = [row["eval_accuracy"] for row in runs]
    return statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5


LANGUAGE = {  # as README calls them -> what their rows say
    "minift, bf16": {"who": "minift", "dtype": "bf16"},
    "transformers at its best": {"who": "transformers", "dtype": "bf16"},
    "transformers as it comes": {"who": "transformers", "dtype": "fp32"},
}
TASKS = {  # what is learned, and its unit
    "lm": ("tinyshakespeare, `--task lm`", "blocks"),
    "instruct": ("E2E restaurants, `--task instruct`", "records"),
}


def language(rows: Sequence[dict]) -> str:
    """Training a GPT on a CPU beside transformers: medians of turns, and the ratio."""
    rows = [{**row, "who": row["trainer"].split()[0]} for row in on_cpu(rows)]
    rows = newest_run(rows, "task", "dropout", "who", "dtype", "turn")
    if not rows:
        return ""
    cells, sizes, first, turns = [], [], rows[0], {row["turn"] for row in rows}
    for task, (title, unit) in TASKS.items():
        of_task = having(rows, task=task)
        for p in sorted({row["dropout"] for row in of_task}, reverse=True):
            runs = {name: having(of_task, dropout=p, **facts) for name, facts in LANGUAGE.items()}
            if any({row["turn"] for row in theirs} != turns for theirs in runs.values() if theirs):
                raise Missing(f"language.jsonl: expected {len(turns)} turns of every trainer")
            cells.append([title, f"{p:g}", *language_cells(*runs.values())])
        if of_task:
            tokens = statistics.mean(row["tokens_per_step"] / row["batch"] for row in of_task)
            sizes.append(f"{of_task[0]['batch']} {unit} of {tokens:.0f} tokens on average")
    (version,) = {row["trainer"].split()[1] for row in rows if row["who"] == "transformers"}
    cpu = CPUS.get(first["cpu"], first["cpu"])
    setting = (
        f"Training a GPT-2 of 6 layers, 384 wide, from random weights on {first['threads']} cores "
        f"of {cpu}, torch {first['torch'].partition('+')[0]}; batches of {' or '.join(sizes)}, and "
        f"of a record the response alone is learned. Real tokens a second, medians of "
        f"{said(len(turns))} turns of {said(first['steps'])} steps that the trainers take one "
        f"after the other. transformers {version.rpartition('.')[0]}'s Trainer has the same "
        "weights and rows: as it comes (fp32), and at its best (bf16 autocast, fused AdamW, no "
        "cache, records grouped by length)."
    )
    head = ("", "dropout", "minift, bf16", "memory", "transformers at its best", "memory",
            "as it comes", "ratio to the best")  # fmt: skip
    return f"{paragraph(setting)}\n\n{table(head, cells)}"


def language_cells(ours: list[dict], best: list[dict], default: list[dict]) -> list[str]:
    """Rates and memory of minift, of the best and of the default Trainer; the ratio."""

    def rate(runs):
        found = statistics.median(row["tokens_per_second"] for row in runs) if runs else 0
        return f"{found:,.0f}" if found else "-"

    def memory(runs):
        return f"{max(row['peak_rss_mib'] for row in runs):,.0f} MiB" if runs else "-"

    rates = {row["turn"]: row["tokens_per_second"] for row in best}
    ratios = [row["tokens_per_second"] / rates[row["turn"]] for row in ours if rates]
    ratio = "-"
    if ratios:
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [rate(ours), memory(ours), rate(best), memory(best), rate(default), ratio]


def workloads(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Of bench.finetune on a GPU: the rows that count of each workload, those that were timed."""
    groups = newest_groups(having(on_gpu(rows), bench="finetune"), "workload")
    found = {name: having(group, status="timed") for (name,), group in groups.items()}
    return {name: timed for name, timed in found.items() if having(timed, peer="minift")}


def finetune_gpu(rows: Sequence[dict]) -> str:
    """Fine-tuning on a GPU: minift beside the fastest peer of each workload."""
    found = workloads(rows)
    if not found:
        return ""
    cells, doubts = [], []
    faster: dict[str, list[str]] = {}  # trainer, and what it does not share -> workloads
    for name, timed in found.items():
        (mine,) = having(timed, peer="minift")
        best = having(timed, peer=mine["best_peer"])
        cells.append(speed_cells(name, mine, best[0] if best else None))
        doubts += [f"{name}: {doubt}" for doubt in mine["doubts"]]
        for row in having(timed, comparable=False):
            if row["tokens_per_second"] > mine["tokens_per_second"] and not is_ours(row):
                faster.setdefault(f"{row['peer']} ({row['note']})", []).append(name)
    shown = [having(timed, peer="minift")[0] for timed in found.values()]
    text = (
        f"{machine(mine)}, all trainers in one process, the same random weights and rows, in "
        f"blocks of steps in turn; {mine['dtype']}, moments and masters in fp32; transformers "
        f"{mine['transformers']}. {conditions(shown)}The floor is the time of a step in which no "
        "kernel loses anything, of the same texts without padding."
    )
    if faster:
        others = "; ".join(f"{who}: {', '.join(where)}" for who, where in faster.items())
        text += f" Faster, but not doing the same: {others}."
    if doubts:
        text += f" Doubtful: {'; '.join(doubts)}."
    head = ("", "real tokens/s", "ms a step", "of the floor's rate", "peak memory", "fastest peer",
            "its tokens/s", "its memory", "ratio to it", "to transformers")  # fmt: skip
    return f"{paragraph(text)}\n\n{table(head, cells)}"


def conditions(rows: Sequence[dict]) -> str:
    """How large a step is, and what is dropped, of classifiers and of a GPT."""
    predicting = having(rows, task="lm")
    classifying = [row for row in rows if row not in predicting]
    text = ""
    if classifying:
        text += f"BERT learns batches of {classifying[0]['batch']} with dropout everywhere. "
    if predicting:
        first = predicting[0]
        length = round(first["tokens_per_step"] / first["batch"])
        text += (
            f"GPT-2 predicts {first['batch']} blocks of {length:,} random tokens a step, in "
            "micro-batches where memory asks for it, without dropout, as in pretraining. "
        )
    return text


def speed_cells(name: str, mine: dict, best: dict | None) -> list[str]:
    """A line of the table: minift, the fastest peer, the ratios."""

    def memory(row):
        return f"{row['peak_allocated_mib']:,.0f} MiB"

    def ratio(key):
        return f"{mine[key]:.2f}" if mine[key] else "-"

    rate = f"{mine['tokens_per_second']:,.0f}"
    beside = ["none", "-", "-"]
    if best:
        beside = [best["peer"], f"{best['tokens_per_second']:,.0f}", memory(best)]
    share = f"{mine['of_floor']:.0%}" if mine["of_floor"] else "-"
    return [name, rate, f"{mine['p50']:.2f}", share, memory(mine), *beside,
            ratio("ratio_to_best_peer"), ratio("ratio_to_default_peer")]  # fmt: skip
