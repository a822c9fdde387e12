"""bench/report.py: README says what the results say, to the digit, and nobody can forget it."""

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import bench_package
import fake_results
import pytest

from bench import figures, report, tables, task_tables, writing_tables
from bench.rows import Missing, newest_cases, newest_run
from bench.svg import SIZE

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("methods", "adapters", "kernels", "codegen", "tasks", "evaluation", "finetune",
         "from-nothing", "lm", "finetune-gpu")  # fmt: skip
REGIONS = "\n\n".join(f"before {n}\n<!-- report: {n} -->\nold\n<!-- end -->\nafter" for n in NAMES)


def make_root(folder: Path, gpu: bool) -> Path:
    """A checkout with a README of regions, and results."""
    results = folder / "bench" / "results"
    fake_results.write(results / "finetune.jsonl", fake_results.finetune_rows())
    fake_results.write(results / "methods.jsonl", fake_results.method_rows())
    fake_results.write(results / "adapters.jsonl", fake_results.adapter_rows())
    name = "codegen-triton-3.6.0.jsonl"
    shutil.copy(bench_package.ROOT / "bench" / "results" / name, results / name)
    (folder / "README.md").write_text(f"# title\n\n{REGIONS}\n", "utf-8")
    if gpu:
        fake_results.write(results / "kernels.jsonl", fake_results.kernel_rows())
        fake_results.write(results / "finetune_gpu.jsonl", fake_results.gpu_rows())
        fake_results.write(results / "step_kernels.jsonl", fake_results.step_rows())
    return folder


@pytest.fixture
def root(tmp_path):
    made = make_root(tmp_path, gpu=False)
    report.write(made)
    return made


@pytest.fixture
def gpu_root(tmp_path):
    made = make_root(tmp_path, gpu=True)
    report.write(made)
    return made


def readme(root: Path) -> str:
    """Line breaks of paragraphs left out."""
    return re.sub(r"(?<!\|)\n(?![|\n<])", " ", (root / "README.md").read_text("utf-8"))


# ---------------------------------------------------------------------- README


def test_readme_and_the_results_agree():
    """Of this repository: every number of a region, and every plot. `python -m bench.report`
    writes them anew."""
    assert report.check(bench_package.ROOT) == []


def test_numbers_are_those_of_the_rows(root):
    text = readme(root)
    for words in (
        "in bf16 on two cores of an Intel Xeon with AMX, means of two seeds with the",
        "| full | `(none)` | 12,345 | 0.8100 ± 0.0141 (0.001) | 0.8100 ± 0.0141 (0.001) | 150 ms | "
        "1,250 MiB | 12.3 MiB |",
        "| bitfit | `--method bitfit` | 12 | 0.8100 ± 0.0141 (0.001) |",
        "| MiniLM-L6 | lora | 8 | 1,000 | 500 | 0.50 | - | - | 1,000 MiB | 2,000 MiB |",
        "| MiniLM-L6 | prefix | 8 | 1,000 | - | - | - | - | 1,000 MiB | - |",
        "| GPT-2 355M | prefix | 8 | 1,000 | 500 | 0.50 | 250 | 0.25 | 1,000 MiB | 2,000 MiB |",
        "2,000 rows of SST-2 (sentences of 30 tokens on average), batch 32, on 2 cores of an Intel "
        "Xeon with AMX, torch 2.13.0; medians of three seeds, run in turn with transformers 5.23's",
        "| minift, bf16 | 200 | 1,001 MiB |",
        "| transformers at its best | 200 | 1,001 MiB |",
        "| transformers as it comes | 50 | 1,001 MiB |",
        "pair by pair: 1.00 (0.75 to 1.25;",
        "two seeds each: minift 0.8500 (standard error 0.0500), transformers 0.7500 (0.0500)",
        "for seeds 0 and 1): minift 0.8000 and 0.9000, transformers 0.7000 and 0.8000.",
        "| `adamw_step.scalars_kernel clipped` | 40 | 0 | 128 | 0 |",
        "![tokens a second of minift and transformers](bench/results/plots/finetune.svg)",
    ):
        assert words in text, words


def test_matmuls_alone_are_a_line_where_they_were_timed(root):
    """Those of the same run; nobody takes them for a trainer."""
    file = root / "bench/results/finetune.jsonl"
    first, *rows = fake_results.finetune_rows()
    alone = {name: first[name] for name in first if not re.match("eval|peak|train_", name)}
    alone["trainer"] = "matmuls alone"
    rates = enumerate((1000, 3000, 4000))
    alone = [{**alone, "seed": seed, "tokens_per_second": rate} for seed, rate in rates]
    old = {**alone[0], "seed": 3, "utc": "2026-02-01T00:00:00Z", "tokens_per_second": 9e9}
    everywhere = {**alone[0], "rows": None}
    fake_results.write(file, [first, *rows, old, *alone, everywhere])
    report.write(root)
    assert "steps alone, back to back, make 3,000 tokens/s." in readme(root)
    assert "| minift, bf16 | 200 | 1,001 MiB |" in readme(root)
    assert "transformers 0.7500 (0.0500)" in readme(root)
    drawing = ET.fromstring((root / "bench/results/plots/finetune.svg").read_text("utf-8"))
    (line,) = [line for line in drawing.iter(f"{SVG}line") if line.get("stroke-dasharray")]
    assert float(line.get("x1")) == pytest.approx(axis(drawing)[3000])
    assert "matmuls alone: 3,000" in [text.text for text in drawing.iter(f"{SVG}text")]


def test_a_gpt_beside_the_trainer_is_a_table_where_it_was_timed(root):
    """Medians of turns, ratios turn by turn, the most memory; turns that one lacks are told."""
    assert "<!-- report: lm -->\n<!-- end -->" in (root / "README.md").read_text("utf-8")
    file = root / "bench/results/language.jsonl"
    rows = fake_results.language_rows()
    old = {**rows[0], "utc": "2026-01-01T00:00:00Z", "turn": 7}
    fake_results.write(file, [old, *rows])
    report.write(root)
    line = "3,500 | 801 MiB | 2,000 | 1,500 MiB | {} | 1.75 (1.50 to 2.00) |"
    for words in (
        "from random weights on 2 cores of an Intel Xeon with AMX, torch 2.13.0; batches of 8 "
        "blocks of 256 tokens on average or 32 records of 56 tokens on average",
        "medians of two turns of three steps that the trainers take",
        "| tinyshakespeare, `--task lm` | 0.1 | " + line.format("500"),
        "| tinyshakespeare, `--task lm` | 0 | " + line.format("-"),
        "| E2E restaurants, `--task instruct` | 0.1 | " + line.format("500"),
    ):
        assert words in readme(root), words
    fake_results.write(file, rows[:-1])
    with pytest.raises(Missing, match=r"language.jsonl: expected 2 turns of every trainer"):
        report.write(root)


def test_a_gpt_on_a_gpu_is_said_to_drop_nothing(gpu_root):
    """Beside BERT's workloads, which drop; each with the size of its steps."""
    file = gpu_root / "bench/results/finetune_gpu.jsonl"
    lm = {"workload": "GPT-2 124M LM 1024", "task": "lm", "batch": 64, "tokens_per_step": 65536}
    rows = fake_results.gpu_rows()
    fake_results.write(file, rows + [{**row, **lm} for row in rows if row.get("floor_ms") == 4])
    report.write(gpu_root)
    text = readme(gpu_root)
    assert "BERT learns batches of 32 with dropout everywhere. GPT-2 predicts 64 blocks of" in text
    assert "of 1,024 random tokens a step, in micro-batches where memory asks for it" in text
    assert "| GPT-2 124M LM 1024 | 100,000 |" in text


def test_without_a_gpu_nothing_of_it_is_shown(root):
    """No table, no plot, no heading; the region is there for later."""
    assert "They have not run on a GPU yet" in readme(root)
    assert "<!-- report: finetune-gpu -->\n<!-- end -->" in (root / "README.md").read_text("utf-8")
    assert [p.name for p in (root / "bench/results/plots").iterdir()] == ["finetune.svg"]


def test_with_a_gpu_all_tables_and_plots_are_there(gpu_root):
    """Wins and losses: the largest case of each operation and pass, each that a peer wins, each
    that is wrong."""
    text = readme(gpu_root)
    for words in (
        "On an NVIDIA H200 (2026-03-02, commit bbb1111, torch 2.11.0+cu128, triton 3.6.0): medians",
        "rate of a copy, 4 TB/s in the same run, or its flops at that of a product, 800 TFLOP/s",
        "37 of 39 cases are faster than every peer.",
        "| cross_entropy, forward | 4 x 10 | 0.2500 | 80% | 0.50 | torch |",
        "| attention, backward | 2 x 10 | 0.7812 | 40% | 2.00 | torch |",
        "| linear_cross_entropy, forward+gradient | 7 x 7 | WRONG | - | - | - |",
        "| BERT-base SST-2 | 100,000 | 8.00 | 50% | 2,000 MiB | unpadded <torch> & co | 50,000 | "
        "4,000 MiB | 2.00 | 10.00 |",
        "not doing the same: half moments (moments in bf16): BERT-base SST-2, BERT-large SQuAD. "
        "Doubtful: BERT-large SQuAD: the clocks differ.",
    ):
        assert words in text, words
    kernels = text.split("<!-- report: kernels -->")[1].split("<!-- end -->")[0]
    assert kernels.count("| 4 x 10 |") == 13
    assert kernels.count("\n|") == 2 + 13 + 2 + 1
    assert "They have not run" not in text
    assert "half dropout" not in text  # behind, and not doing the same
    plots = {p.name for p in (gpu_root / "bench/results/plots").iterdir()}
    assert plots == {"finetune.svg", "finetune-gpu.svg", "roofline.svg", "step-kernels.svg"}
    assert all(f"(bench/results/plots/{name})" in text for name in plots)


def test_only_regions_are_written(gpu_root):
    """What stands around them is there to the byte; writing twice changes nothing."""
    text = (gpu_root / "README.md").read_text("utf-8")
    assert re.sub(r"(report: \S+ -->\n).*?(<!-- end)", r"\1old\n\2", text, flags=re.DOTALL) == (
        f"# title\n\n{REGIONS}\n"
    )
    files = {p: p.read_bytes() for p in gpu_root.rglob("*") if p.is_file()}
    report.write(gpu_root)
    assert {p: p.read_bytes() for p in gpu_root.rglob("*") if p.is_file()} == files


def test_a_word_is_never_broken():
    """Neither at a hyphen nor because it is long: it may be a number or a path."""
    text = f"{'word ' * 20}{'long-' * 30}end and {'word ' * 20}1e-5 more"
    lines = tables.paragraph(text).split("\n")
    assert " ".join(lines) == text
    assert [len(line) for line in lines if len(line) > tables.WIDTH] == [153]


# ----------------------------------------------------------------------- check


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def test_each_difference_is_a_line(root):
    assert report.check(root) == []
    file = root / "README.md"
    number = file.read_text("utf-8").split("\n").index("| minift, bf16 | 200 | 1,001 MiB |") + 1
    change(file, "| minift, bf16 | 200 |", "| minift, bf16 | 201 |")
    change(file, "| transformers as it comes | 50 | 1,001 MiB |\n", "")
    change(file, "\nThey have not", "\nbetter\nThey have not")
    change(root / "bench/results/plots/finetune.svg", "200", "300")
    (root / "bench/results/plots/roofline.svg").write_text("<svg/>")
    found = report.check(root)
    assert found[1:] == [
        f"README.md:{number + 1}: expected '| minift, bf16 | 200 | 1,001 MiB |', "
        "got '| minift, bf16 | 201 | 1,001 MiB |'",
        f"README.md:{number + 3}: expected '| transformers as it comes | 50 | 1,001 MiB |', "
        "got nothing",
        "bench/results/plots/finetune.svg: not what the results give",
        "bench/results/plots/roofline.svg: there are no rows for it",
    ]
    assert re.fullmatch(r"README.md:\d+: the results do not give 'better'", found[0])
    report.write(root)
    assert report.check(root) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("report: methods", "report: ways", "README.md: region 'ways' is none of methods, adapt"),
        ("<!-- report: codegen -->\n", "", "<!-- report: codegen --> ... <!-- end --> once"),
        ("<!-- end -->", "", "expected <!-- report: adapters --> ... <!-- end --> once"),
        ("before codegen", "<!-- report: codegen -->\n<!-- end -->", "report: codegen --> ..."),
    ],
)  # fmt: skip
def test_a_region_is_there_once(root, old, new, message):
    """Nothing is written over what may not be a region."""
    change(root / "README.md", old, new)
    (found,) = report.check(root)
    assert message in found
    text = (root / "README.md").read_text("utf-8")
    with pytest.raises(Missing):
        report.write(root)
    assert (root / "README.md").read_text("utf-8") == text


def lose(rows: list[dict], /, **facts) -> list[dict]:
    """Without those that say this."""
    return [row for row in rows if any(row[name] != fact for name, fact in facts.items())]


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("methods", lose(fake_results.method_rows(), method="full", seed=1), "the same seeds of"),
        ("methods", [], "methods.jsonl: expected"),
        ("finetune", lose(fake_results.finetune_rows(), order="grouped", seed=1), "of every train"),
        ("finetune", lose(fake_results.finetune_rows(), rows=None, data="sst2", seed=1), "sst2: e"),
        ("codegen-triton-3.6.0", [], "no launch 'attention._forward_kernel bf16, D 64'"),
    ],
)
def test_results_that_lack_something_are_a_line(root, file, rows, message):
    fake_results.write(root / f"bench/results/{file}.jsonl", rows)
    (found,) = report.check(root)
    assert message in found


def test_a_line_that_is_no_json_is_named(root):
    with open(root / "bench/results/methods.jsonl", "a") as file:
        file.write('{"method": "fu')
    assert report.check(root) == ["methods.jsonl:9: expected a line of JSON"]


def run_main(monkeypatch, root: Path, *flags) -> int | str | None:
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["report", *flags])
    try:
        report.main()
    except SystemExit as end:
        return end.code


def test_the_exit_status_says_whether_they_agree(root, monkeypatch, capsys):
    assert run_main(monkeypatch, root, "--check") == 0
    assert capsys.readouterr().out == ""
    change(root / "README.md", "0.8100", "0.9100")
    text = (root / "README.md").read_text("utf-8")
    assert run_main(monkeypatch, root, "--check") == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "0.8100" in line
    assert "0.9100" in line
    assert (root / "README.md").read_text("utf-8") == text
    assert run_main(monkeypatch, root) is None
    assert run_main(monkeypatch, root, "--check") == 0
    change(root / "README.md", "<!-- end -->", "")
    assert "<!-- end --> once" in run_main(monkeypatch, root)


def test_rows_of_a_run_on_a_gpu_are_taken_once(root, tmp_path, monkeypatch, capsys):
    """Those that a table is made from, as bench.gpu names its files; then README has them. Rows of
    a rehearsal on a CPU are left."""
    folder, results = tmp_path / "gpu", root / "bench/results"
    before = (results / "finetune.jsonl").read_bytes()
    kernels, steps = fake_results.kernel_rows(), fake_results.gpu_rows()
    fake_results.write(folder / "kernels.jsonl", kernels)
    fake_results.write(folder / "finetune.jsonl", [*steps, {**steps[0], "gpu": None}])
    fake_results.write(folder / "tune.jsonl", [{"tile": 1}])
    for new in (True, False):
        assert run_main(monkeypatch, root, "--take", str(folder)) is None
        assert capsys.readouterr().out == (
            f"finetune_gpu.jsonl: {new * len(steps)} new rows\n"
            f"kernels.jsonl: {new * len(kernels)} new rows\nstep_kernels.jsonl: 0 new rows\n"
        )
    for name, rows in (("kernels", kernels), ("finetune_gpu", steps)):
        lines = (results / f"{name}.jsonl").read_text("utf-8").splitlines()
        assert list(map(json.loads, lines)) == rows
    assert (results / "finetune.jsonl").read_bytes() == before
    assert {path.name for path in results.glob("*.jsonl")} == {
        "codegen-triton-3.6.0.jsonl", "finetune.jsonl", "finetune_gpu.jsonl", "kernels.jsonl",
        "methods.jsonl", "adapters.jsonl",
    }  # fmt: skip
    assert "37 of 39 cases" in readme(root)


# -------------------------------------------------------------- which rows count


def row(seed: int, utc: str | None, value: int, **facts) -> dict:
    return {"seed": seed, "utc": utc, "value": value, "cpu": "A", **facts}


@pytest.mark.parametrize(
    ("rows", "values"),
    [
        ([], []),
        ([row(0, None, 1), row(1, None, 2)], [1, 2]),
        # A run again, of one seed: the other seed of the same day still counts.
        ([row(0, "2026-03-02T00:10:00Z", 3), row(0, "2026-03-01T20:00:00Z", 1),
          row(1, "2026-03-01T21:00:00Z", 2)], [2, 3]),
        # Of two days before it does not, and a row without a time is older still.
        ([row(1, None, 0), row(0, "2026-03-01T20:00:00Z", 1), row(1, "2026-03-03T20:00:00Z", 2)],
         [2]),
        ([row(0, "2026-03-02T20:00:00Z", 1), row(1, "2026-03-03T20:00:00Z", 2)], [1, 2]),
        # Another device is another run.
        ([row(0, "2026-03-01T20:00:00Z", 1), row(1, "2026-03-01T21:00:00Z", 2, cpu="B")], [2]),
        ([row(0, "2026-03-01T20:00:00Z", 1), row(0, "2026-03-01T20:00:00Z", 2)], [2]),
    ],
)  # fmt: skip
def test_the_newest_run_counts(rows, values):
    assert sorted(row["value"] for row in newest_run(rows, "seed")) == values


def test_a_case_is_of_one_run_and_others_stay():
    """Timed again with fewer contenders: nobody is compared with a time of another run. Cases that
    were not timed again, as they were; not those of another GPU, nor small shapes."""
    facts = {"op": "f", "pass": "forward", "quick": False, "gpu": "H200"}
    old, new = "2026-03-01T00:00:00Z", "2026-03-01T09:00:00Z"
    rows = [
        {**facts, "shape": "big", "contender": "ours", "utc": new, "p50": 2},
        {**facts, "shape": "big", "contender": "ours", "utc": old, "p50": 1},
        {**facts, "shape": "big", "contender": "torch", "utc": old, "p50": 1},
        {**facts, "shape": "small", "contender": "ours", "utc": old, "p50": 3},
        {**facts, "shape": "third", "contender": "ours", "utc": old, "p50": 4, "gpu": "H100"},
        {**facts, "shape": "big", "contender": "ours", "utc": new, "p50": 5, "quick": True},
    ]
    found = newest_cases(rows)
    assert {case: {c: r["p50"] for c, r in there.items()} for case, there in found.items()} == {
        ("f", "big", "forward"): {"ours": 2},
        ("f", "small", "forward"): {"ours": 3},
    }


def test_older_runs_on_a_gpu_are_history():
    """A kernel or a peer that the newest run of a workload does not have is not shown."""
    old = {"utc": "2026-03-01T00:00:00Z"}
    steps, peers = fake_results.step_rows(), fake_results.gpu_rows()
    gone = [{**steps[0], **old, "kernel": "gone"}, {**steps[0], **old, "ms": 9e9}]
    assert figures.step_time(gone + steps) == figures.step_time(steps)
    gone = [{**peers[0], **old, "peer": "gone"}, {**peers[0], **old}]
    assert tables.finetune_gpu(gone + peers) == tables.finetune_gpu(peers)


# ----------------------------------------------------------------------- plots


def plots() -> dict[str, str]:
    found = tables.trainers(fake_results.finetune_rows())
    return {
        "speed": figures.speed("SST-2 on 2 cores", found, None),
        "speed_gpu": figures.speed_gpu(tables.workloads(fake_results.gpu_rows())),
        "roofline": figures.roofline(fake_results.kernel_rows()),
        "step_time": figures.step_time(fake_results.step_rows()),
    }


PLOTS = plots()


def attributes(element, *names: str) -> list[float]:
    return [float(element.get(name)) for name in names]


def text_box(element) -> tuple[float, float, float, float]:
    """Where words are, of a narrow font: 0.5 of its size for each letter."""
    x, y = attributes(element, "x", "y")
    wide = 0.5 * SIZE * len(element.text)
    left = x - wide * {None: 0, "middle": 0.5, "end": 1}[element.get("text-anchor")]
    return left, y - 0.8 * SIZE, left + wide, y + 0.2 * SIZE


@pytest.mark.parametrize("name", PLOTS)
def test_all_lies_inside_the_picture_and_no_words_on_others(name):
    root = ET.fromstring(PLOTS[name])
    width, height = attributes(root, "width", "height")
    texts = root.findall(f"{SVG}text")
    assert len(texts) > 10
    boxes = [text_box(text) for text in texts]
    for i, (left, top, right, bottom) in enumerate(boxes):
        words = texts[i].text
        assert left >= 0, words
        assert right <= width, words
        assert 0 <= top < bottom <= height, words
        for k, (le, to, ri, bo) in enumerate(boxes[:i]):
            apart = ri <= left or right <= le or bo <= top or bottom <= to
            assert apart, f"{words} on {texts[k].text}"
    for dot in root.iter(f"{SVG}circle"):
        x, y, r = attributes(dot, "cx", "cy", "r")
        assert r <= x <= width - r
        assert r <= y <= height - r
    for line in root.iter(f"{SVG}line"):
        x1, y1, x2, y2 = attributes(line, "x1", "y1", "x2", "y2")
        assert 0 <= min(x1, x2) <= max(x1, x2) <= width
        assert 0 <= min(y1, y2) <= max(y1, y2) <= height


def axis(root) -> dict[float, float]:
    """Number -> pixel, of the axis below."""
    texts = [t for t in root.findall(f"{SVG}text") if t.get("text-anchor") == "middle"]
    numbers = [t for t in texts if re.fullmatch(r"[\d.,]+", t.text)]
    return {float(t.text.replace(",", "")): float(t.get("x")) for t in numbers}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("speed", [200, 200, 50]),
        ("speed_gpu", [50, 25, 20, 5] * 2),
        ("step_time", [*range(20, 8, -1), sum(range(1, 9))]),
    ],
)
def test_bars_are_as_long_as_their_numbers(name, values):
    """By the numbers of the axis itself."""
    root = ET.fromstring(PLOTS[name])
    places = axis(root)
    first, last = min(places), max(places)
    scale = (places[last] - places[first]) / (last - first)
    bars = root.findall(f"{SVG}rect")
    assert [float(bar.get("width")) / scale for bar in bars] == pytest.approx(values, rel=1e-3)
    assert {float(bar.get("x")) for bar in bars} == {places[0.0]}
    assert all(float(b.get("x")) + float(b.get("width")) <= places[last] for b in bars)


def test_the_floor_is_a_line_at_100_percent():
    root = ET.fromstring(PLOTS["speed_gpu"])
    dashed = [line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray")]
    assert [float(line.get("x1")) for line in dashed] == pytest.approx([axis(root)[100]] * 2)
    texts = root.findall(f"{SVG}text")
    for text in texts:  # none crosses it
        left, _, right, _ = text_box(text)
        assert not left < axis(root)[100] < right or text.text == "100"
    words = [text.text for text in texts]
    assert "floor: 200,000 tokens/s" in words
    assert "unpadded <torch> & co" in words
    assert "half moments" not in words  # it does not do the same
    assert "minift, no graph" not in words
    assert "slow" not in words  # only the three fastest


def test_the_points_of_a_bar_are_its_runs():
    root = ET.fromstring(PLOTS["speed"])
    places = axis(root)
    scale = (places[400] - places[0]) / 400
    at = [(float(dot.get("cx")) - places[0]) / scale for dot in root.iter(f"{SVG}circle")]
    assert at == pytest.approx([100, 200, 300, 80, 200, 400, 50, 50, 50], rel=1e-3)


def test_ceilings_are_what_the_floors_were_computed_from():
    """Also of one run among several, and where no product binds."""
    rows = [r for r in fake_results.kernel_rows() if r["contender"] == "ours"]
    assert figures.ceilings(rows) == pytest.approx((4e12, 800e12))
    older = [{**r, "utc": "2026-01-01T00:00:00Z", "floor_ms": r["floor_ms"] / 2} for r in rows]
    assert figures.ceilings(older + rows) == pytest.approx((4e12, 800e12))
    streams = [r for r in rows if not r["flops"]]
    assert figures.ceilings(streams) == (pytest.approx(4e12), None)
    assert figures.ceilings(older + streams) == pytest.approx((4e12, 1600e12))


def test_dots_of_the_roofline_lie_under_their_ceiling():
    """80 % of a copy's rate is 0.8 of the way up to its line, and each hint says so."""
    root = ET.fromstring(PLOTS["roofline"])
    (ceiling,) = [line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray")]
    bottom, line = figures.BOTTOM, float(ceiling.get("y1"))
    dots = [d for d in root.iter(f"{SVG}circle") if d.find(f"{SVG}title") is not None]
    assert len(dots) == 39
    for dot in dots:
        hint = dot.findtext(f"{SVG}title")
        if not re.match("attention|linear", hint):
            share = (bottom - float(dot.get("cy"))) / (bottom - line)
            assert f"{share:.0%} of the ceiling" in hint
    (roof,) = root.findall(f"{SVG}polyline")
    assert len(roof.get("points").split()) == 3
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a copy: 4 TB/s", "a product: 800 TFLOP/s"} <= set(words)
    assert {"adamw", "cross_entropy", "add_norm", "bias_gelu", "embed"} <= set(words)
    assert sum(bool(re.search(r"\d%$", w)) for w in words) > 25


def test_dots_of_products_lie_where_both_axes_say():
    """Of attention: flops a byte, and shares of the product's rate. The roof's corners are at the
    ceilings of both; they meet at 200 flops a byte."""
    rows = [row for row in fake_results.kernel_rows() if row["op"] in ("attention", "embed")]
    root = ET.fromstring(figures.roofline(rows))
    below = axis(root)
    (low, left), (high, right) = min(below.items()), max(below.items())
    texts = [t for t in root.findall(f"{SVG}text") if re.fullmatch(r"[\d,]+", t.text)]
    beside = [t for t in texts if t.get("text-anchor") == "end" and float(t.get("x")) > left - 9]
    up = {float(t.text.replace(",", "")): float(t.get("y")) - 0.35 * SIZE for t in beside}
    (least, bottom), (most, top) = min(up.items()), max(up.items())

    def numbers(x: float, y: float) -> tuple[float, float]:
        across, above = (x - left) / (right - left), (bottom - y) / (bottom - top)
        return low * (high / low) ** across, least * (most / least) ** above

    (roof,) = root.findall(f"{SVG}polyline")
    corners = [numbers(*map(float, c.split(","))) for c in roof.get("points").split()]
    assert corners[0] == pytest.approx((corners[0][0], 4 * corners[0][0]), rel=0.02)
    assert corners[1:] == [pytest.approx(c, rel=0.02) for c in ((200, 800), (high, 800))]
    dots = [d for d in root.iter(f"{SVG}circle") if d.findtext(f"{SVG}title", "").startswith("att")]
    assert len(dots) == 6
    for dot in dots:
        kind, percent = re.search(r", (\w+): .* (\d+)%", dot.findtext(f"{SVG}title")).groups()
        flops, rate = numbers(*attributes(dot, "cx", "cy"))
        assert flops == pytest.approx({"forward": 4000, "backward": 5000}[kind], rel=0.02)
        assert rate == pytest.approx(8 * int(percent), rel=0.02)
    words = {t.text: t for t in root.iter(f"{SVG}text")}
    box = text_box(words["a product: 800 TFLOP/s"])
    assert box[3] < float(roof.get("points").split(",")[-1])  # above its line


def test_passes_and_trainers_are_told_by_their_colour():
    """Dots as in the legend, side by side in a column; minift's bar, and those of all others."""
    root = ET.fromstring(PLOTS["roofline"])
    seen: dict[tuple, set] = {}
    for dot in root.iter(f"{SVG}circle"):
        if hint := dot.findtext(f"{SVG}title"):
            op, kind = re.match(r"(\w+), ([\w+]+):", hint).groups()
            assert dot.get("fill") == figures.PASSES[kind]
            seen.setdefault((op, kind), set()).add(dot.get("cx"))
    places = [seen["cross_entropy", kind] for kind in ("forward", "backward", "forward+gradient")]
    assert [len(place) for place in places] == [1, 1, 1]
    assert len(set.union(*places)) == 3
    bars = ET.fromstring(PLOTS["speed_gpu"]).findall(f"{SVG}rect")
    ours, others, *_ = figures.COLOURS
    assert [bar.get("fill") for bar in bars] == [ours, others, others, others] * 2


@pytest.mark.parametrize("ops", [("adamw",), ("embed", "linear_cross_entropy")])
def test_a_roofline_of_some_operations_is_drawn_too(ops):
    rows = [row for row in fake_results.kernel_rows() if row["op"] in ops]
    ET.fromstring(figures.roofline(rows))


def test_a_ceiling_that_nothing_tells_is_not_guessed():
    """Products alone, each bound by its flops."""
    rows = [row for row in fake_results.kernel_rows() if row["op"] == "attention"]
    with pytest.raises(Missing, match=r"kernels.jsonl: no case without flops"):
        figures.roofline(rows)


def test_without_rows_there_is_no_plot():
    """Nor of a launch that is longer than its floor, nor of what a CPU did."""
    on_cpu = [{**row, "gpu": None} for row in fake_results.kernel_rows()]
    small = [{**row, "floor_ms": 0.001} for row in fake_results.kernel_rows()]
    assert [figures.roofline(rows) for rows in ([], on_cpu, small)] == [None] * 3
    assert figures.step_time([{**row, "gpu": None} for row in fake_results.step_rows()]) is None
    elsewhere = [{**row, "floor_ms": None} for row in fake_results.gpu_rows()]
    assert figures.speed_gpu(tables.workloads(elsewhere)) is None
    assert figures.speed_gpu({}) is None


def test_the_same_rows_give_the_same_bytes():
    assert plots() == PLOTS


def test_writing_is_shown_as_it_was_measured():
    """A line for each case of the newest run; answers with their metrics."""
    facts = dict(utc="2026-01-02T00:00:00+00:00", cpu="a CPU", threads=2, torch="2.13.0+cpu")
    facts |= dict(size="small", new=64, prompt=32)
    rows = [
        {**facts, "dtype": "fp32", "batch": batch, "contender": name, "tokens_per_s": rate,
         "ratio": rate / 10}
        for batch in (1, 16) for name, rate in (("transformers", 10.0), ("minift", 12.5))
    ]  # fmt: skip
    old = [row | {"utc": "2026-01-01T00:00:00+00:00", "tokens_per_s": 99.0} for row in rows]
    shown = writing_tables.writing(old + rows)
    assert "| fp32 | 1 | 12.5 | 10.0 | 1.25 |" in shown
    assert shown.count("| fp32 |") == 2
    assert "99.0" not in shown
    assert writing_tables.writing([]) == writing_tables.answers([]) == ""
    found = dict(prompts=630, data="t.csv", num_beams=4, parameters=2.5e6, bleu=60.0, chrf=61.0)
    found |= dict(rougeL=62.0, seconds=9.6, same=0.995, utc=facts["utc"], cpu="a CPU")
    shown = writing_tables.answers([found | {"contender": n} for n in ("transformers", "minift")])
    assert "| minift | 4 | 60.00 | 61.00 | 62.00 |" in shown
    assert "99.5%" in shown
    assert "2.5 million" in shown


def test_a_model_from_nothing_is_told_with_its_command():
    """The newest one."""
    facts = dict(utc="2026-01-02T00:00:00+00:00", cpu="a CPU", threads=2, parameters=3.5e6)
    row = facts | dict(
        data="text", command="minift train --train input.txt --lr 1", bits_per_byte=2.5
    )
    row |= dict(loss_per_character=1.771, train_runtime=90.0)
    shown = writing_tables.from_nothing([row, row | {"utc": "2025-01-02T00:00:00+00:00"}])
    assert "`--lr 1`" in shown
    assert "1.77 nats" in shown
    assert "1.5 minutes" in shown
    assert writing_tables.from_nothing([]) == ""


def test_evaluation_is_shown_beside_the_trainer_both_ways():
    """Of the newest run; at its best is the fastest of the sorted ones. Who is lacking is named."""
    facts = dict(utc="2026-01-02T00:00:00Z", cpu="a CPU", threads=1, torch="2.13.0+cpu", turns=3)
    facts |= dict(model="MiniLM", data="sst2", rows=9, tokens=99, dtype="fp32", encoded=True)
    facts |= dict(transformers="5.23.0", others_cpu=0.5)
    times = {"minift": 2.0, "Trainer as it comes": 7.0, "Trainer, sorted, batches of 8": 5.0,
             "Trainer, sorted, batches of 32": 6.0}  # fmt: skip
    rows = [{**facts, "who": who, "cpu_s": s, "wall_s": 9.0} for who, s in times.items()]
    old = [{**row, "utc": "2026-01-01T00:00:00Z", "cpu_s": 1.0} for row in rows]
    shown = task_tables.evaluation(old + rows)
    line = "| SST-2 | fp32 | texts | 2.00 s | 7.00 s | 5.00 s | 3.50 | 2.50 |"
    assert shown.split("\n")[-1] == line
    assert shown.count("| SST-2 |") == 1
    assert "on one core of a CPU" in shown
    assert "beside other work" in shown
    with pytest.raises(Missing, match=r"sst2 fp32: expected minift and Trainer as it comes"):
        task_tables.evaluation(rows[:1])
    assert task_tables.evaluation([]) == ""
    half = [{**row, "dtype": "bf16", "cpu_s": row["cpu_s"] / 2} for row in rows]
    assert "in fp32, from texts: 7.0 times on SST-2." in task_tables.evaluation(rows + half)
