"""README's numbers of writing: tokens a second, and answers beside transformers'."""

from collections.abc import Sequence

from bench.rows import having, newest_groups, on_cpu, time_of
from bench.tables import CPUS, paragraph, table


def writing(rows: Sequence[dict]) -> str:
    """Tokens a second of bench.generate on a CPU."""
    cells, last = [], None
    groups = newest_groups(having(on_cpu(rows), size="small"), "dtype", "batch")
    for (dtype, batch), group in sorted(groups.items(), reverse=True):
        (ours,), (theirs,) = (having(group, contender=c) for c in ("minift", "transformers"))
        rates = [f"{row['tokens_per_s']:,.1f}" for row in (ours, theirs)]
        cells.append([dtype, str(batch), *rates, f"{ours['ratio']:.2f}"])
        last = ours
    if last is None:
        return ""
    text = (
        f"Writing, greedily, {last['new']} tokens after prompts of {last['prompt']}: GPT-2 of 124M "
        f"with random weights on {last['threads']} cores of {CPUS.get(last['cpu'], last['cpu'])}, "
        f"torch {last['torch'].partition('+')[0]}; tokens a second, medians in turn with "
        "transformers' `generate`."
    )
    head = "", "prompts at once", "minift", "transformers", "ratio"
    return f"{paragraph(text)}\n\n{table(head, cells)}"


def from_nothing(rows: Sequence[dict]) -> str:
    """What a model made from nothing has come to."""
    rows = sorted(on_cpu(rows), key=time_of)
    if not rows:
        return ""
    r = rows[-1]
    return paragraph(
        f"On {r['data']} (`input.txt`; its last tenth validates) that is a model of "
        f"{r['parameters'] / 1e6:.1f} million parameters; `{r['command'].split('input.txt ')[1]}` "
        f"takes it to {r['loss_per_character']:.2f} nats a character ({r['bits_per_byte']:.2f} "
        f"bits a byte) in {r['train_runtime'] / 60:.1f} minutes on {r['threads']} cores of "
        f"{CPUS.get(r['cpu'], r['cpu'])}, beside other work."
    )


def answers(rows: Sequence[dict]) -> str:
    """Metrics of bench.responses."""
    groups = newest_groups(on_cpu(rows), "data", "num_beams")
    if not groups:
        return ""
    cells = []
    for (_, beams), group in sorted(groups.items()):
        for row in group:
            values = [f"{row[name]:.2f}" for name in ("bleu", "chrf", "rougeL")]
            cells.append([row["contender"], str(beams), *values])
    first = group[0]
    same = having(group, contender="minift")[0]["same"]
    text = (
        f"Answers to the {first['prompts']:,} different prompts of `{first['data']}` from the same "
        f"weights, a GPT-2 of {first['parameters'] / 1e6:.1f} million parameters trained from "
        f"nothing on the development set, fp32: {same:.1%} of them are the same to the letter."
    )
    head = "", "beams", "BLEU", "chrF", "ROUGE-L"
    return f"{paragraph(text)}\n\n{table(head, cells)}"
