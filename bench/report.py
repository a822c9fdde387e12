"""README's tables, numbers and plots, from the rows of bench/results/*.jsonl.

    python -m bench.report              writes them all anew
    python -m bench.report --check      exit status 1 and a line for each difference
    python -m bench.report --take DIR   first appends the rows that bench.gpu left in DIR

README has a region for each: all between `<!-- report: NAME -->` and `<!-- end -->` is written
here, and nothing else is touched. A plot is bench/results/plots/NAME.svg, there and shown only
while there are rows for it. bench/rows.py says which rows count; the same rows give the same bytes.
"""

import argparse
import difflib
import json
import re
from itertools import zip_longest
from pathlib import Path

from bench import figures, method_tables, tables, task_tables, writing_tables
from bench.rows import Missing, on_gpu, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("bench") / "results"
REGION = re.compile(r"(<!-- report: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
TAKEN = {  # file of bench.gpu -> of the results
    "finetune": "finetune_gpu",
    "kernels": "kernels",
    "step_kernels": "step_kernels",
}

Results = dict[str, list[dict]]  # name of a file, without its ending -> its rows


def read_results(root: Path) -> Results:
    """All rows."""
    return {path.stem: read(path) for path in sorted((root / RESULTS).glob("*.jsonl"))}


def draw(results: Results) -> dict[str, str]:
    """The SVG text of every plot that has rows, by the name of its file."""
    runs = results.get("finetune", [])
    trainers, floor = tables.trainers(runs), tables.matmuls_alone(runs)
    drawn = {
        "finetune": figures.speed("MiniLM, SST-2, 2 CPU cores", trainers, floor),
        "finetune-gpu": figures.speed_gpu(tables.workloads(results.get("finetune_gpu", []))),
        "roofline": figures.roofline(results.get("kernels", [])),
        "step-kernels": figures.step_time(results.get("step_kernels", [])),
    }
    return {f"{name}.svg": svg for name, svg in drawn.items() if svg}


def write_regions(results: Results, plots: dict[str, str]) -> dict[str, str]:
    """What README says in each region."""

    def rows(name: str) -> list[dict]:
        return results.get(name, [])

    def image(name: str, words: str) -> str:
        return f"![{words}]({RESULTS / 'plots' / name})" if name in plots else ""

    parts = {
        "methods": [method_tables.methods(rows("methods"))],
        "adapters": [method_tables.adapters(rows("adapters"))],
        "kernels": [
            tables.kernels(rows("kernels")),
            image("roofline.svg", "roofline of the kernels"),
        ],
        "codegen": [tables.codegen(rows("codegen-triton-3.6.0"))],
        "tasks": [task_tables.tasks(rows("tasks"))],
        "evaluation": [task_tables.evaluation(rows("evaluation"))],
        "finetune": [
            tables.finetune(rows("finetune")),
            image("finetune.svg", "tokens a second of minift and transformers"),
            tables.accuracy(rows("finetune") + rows("accuracy")),
        ],
        "from-nothing": [writing_tables.from_nothing(rows("from_nothing"))],
        "lm": [
            tables.language(rows("language")),
            writing_tables.writing(rows("generate")),
            writing_tables.answers(rows("responses")),
        ],
        "finetune-gpu": [
            tables.finetune_gpu(rows("finetune_gpu")),
            image("finetune-gpu.svg", "tokens a second on a GPU, by trainer"),
            image("step-kernels.svg", "time of an optimizer step, by kernel"),
        ],
    }
    return {name: "\n\n".join(filter(None, found)) for name, found in parts.items()}


def splice(readme: str, regions: dict[str, str]) -> str:
    """README with its regions written anew.

    Raises:
        Missing: a region is not there just once, or has no end, or nobody writes it.
    """
    starts = re.findall(r"<!-- report: (\S+) -->", readme)
    closed = [match[2] for match in REGION.finditer(readme)]
    for name in starts:
        if name not in regions:
            raise Missing(f"README.md: region {name!r} is none of {', '.join(regions)}")
    for name in regions:
        if not starts.count(name) == closed.count(name) == 1:
            raise Missing(f"README.md: expected <!-- report: {name} --> ... <!-- end --> once")

    def written(match: re.Match) -> str:
        text = regions[match[2]]
        return match[1] + (text + "\n" if text else "") + match[4]

    return REGION.sub(written, readme)


def build(root: Path) -> tuple[str, dict[str, str]]:
    """README and the plots as the results have them.

    Raises:
        Missing: the results lack something, or README a region.
    """
    results = read_results(root)
    plots = draw(results)
    readme = (root / "README.md").read_text("utf-8")
    return splice(readme, write_regions(results, plots)), plots


def check(root: Path) -> list[str]:
    """A line for each difference between README, the plots and the results."""
    try:
        readme, plots = build(root)
    except Missing as missing:
        return [str(missing)]
    old = (root / "README.md").read_text("utf-8").split("\n")
    new = readme.split("\n")
    found = []
    for kind, i, end, j, stop in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        pairs = zip_longest(old[i:end], new[j:stop]) if kind != "equal" else ()
        for k, (shown, wanted) in enumerate(pairs):
            found.append(f"README.md:{min(i + k, end) + 1}: {difference(wanted, shown)}")
    there = {path.name: path for path in (root / RESULTS / "plots").glob("*.svg")}
    for name in sorted(there.keys() | plots.keys()):
        file = f"{RESULTS}/plots/{name}"
        if name not in plots:
            found.append(f"{file}: there are no rows for it")
        elif name not in there:
            found.append(f"{file}: missing")
        elif there[name].read_text("utf-8") != plots[name]:
            found.append(f"{file}: not what the results give")
    return found


def difference(wanted: str | None, shown: str | None) -> str:
    """Of one line; None: there is none."""
    if wanted is None:
        return f"the results do not give {shown!r}"
    return f"expected {wanted!r}, " + ("got nothing" if shown is None else f"got {shown!r}")


def write(root: Path) -> None:
    """Writes README's regions and the plots; a plot without rows is removed."""
    readme, plots = build(root)
    (root / "README.md").write_text(readme, "utf-8")
    folder = root / RESULTS / "plots"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.name not in plots:
            path.unlink()
    for name, svg in plots.items():
        (folder / name).write_text(svg, "utf-8")


def take(folder: Path, root: Path) -> dict[str, int]:
    """Appends to the results what a run on a GPU left in a folder, and no row twice.

    Returns:
        How many rows are new, by file of the results.
    """
    taken = {}
    for source, name in TAKEN.items():
        file = root / RESULTS / f"{name}.jsonl"
        known = set(map(json.dumps, read(file)))
        lines = [json.dumps(row) for row in on_gpu(read(folder / f"{source}.jsonl"))]
        new = [line for line in dict.fromkeys(lines) if line not in known]
        if new:
            with open(file, "a", encoding="utf-8") as results:
                results.writelines(f"{line}\n" for line in new)
        taken[file.name] = len(new)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--take", type=Path, metavar="DIR", help="of a run on a GPU")
    args = parser.parse_args()
    if args.check:
        found = check(ROOT)
        for line in found:
            print(line)
        raise SystemExit(1 if found else 0)
    try:
        if args.take:
            for name, new in take(args.take, ROOT).items():
                print(f"{name}: {new} new rows")
        write(ROOT)
    except Missing as missing:
        raise SystemExit(str(missing)) from None


if __name__ == "__main__":
    main()
