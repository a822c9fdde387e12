"""The plots: each a function from rows to SVG text, or to None where there are no such rows.

roofline       of every kernel: what moves a second, under what can
step_time      of one optimizer step, by kernel
speed          tokens a second of fine-tuning, by trainer
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.rows import Missing, newest_cases, newest_groups, on_gpu
from bench.svg import COLOURS, INK, Drawing, Scale, plain, width_of

WIDTH = 880
ROW = 22  # pixels of a bar and the gap after it
HEIGHT, TOP, BOTTOM = 460, 60, 400  # of the roofline, and of its axes
CEILING = {"stroke_width": 1.5, "stroke_dasharray": "5 4"}
PASSES = dict(zip(("forward", "backward", "forward+gradient", "step"), COLOURS, strict=False))
LAUNCH_MS = 0.002  # of a floor below this the launch is most, whoever computes
KERNELS = 12  # of a step, by name; the rest is one bar
OTHERS = 3  # of a workload, the fastest that do the same


# ---------------------------------------------------------------------- bars


@dataclass(frozen=True)
class Bar:
    """A name, a length, and what is said after it."""

    name: str
    value: float
    note: str = ""
    colour: str = COLOURS[0]
    points: tuple[float, ...] = ()  # the runs that it is the median of


@dataclass(frozen=True)
class Group:
    """Bars under one heading."""

    name: str
    bars: Sequence[Bar]
    line: float | None = None  # as far as a bar may reach
    line_words: str = ""


def bar_chart(title: str, description: str, unit: str, groups: Sequence[Group]) -> str:
    """Horizontal bars from 0, longest names and notes inside.

    Args:
        title, description: what the picture says to those who do not see it.
        unit: of all values, under the axis.
        groups: from the top.
    """
    bars = [bar for group in groups for bar in group.bars]
    left = 16 + max(width_of(bar.name) for bar in bars)
    right = WIDTH - 16 - max(width_of(bar.note) for bar in bars)
    ends = [x for bar in bars for x in (bar.value, *bar.points)]
    ends += [group.line for group in groups if group.line]
    scale = Scale.from_zero(max(ends), left, right)
    height = 60 + sum(ROW * (len(group.bars) + 1.5) for group in groups)
    drawing = Drawing(WIDTH, height, title, description)
    bottom = height - 50
    drawing.x_axis(scale, 10, bottom, unit)
    y = 10.0 + ROW / 2
    for group in groups:
        drawing.words(left, y, group.name, font_weight="bold")
        end = y + ROW * len(group.bars) + ROW / 2
        if group.line:
            x = scale(group.line)
            drawing.line(x, y + ROW / 2, x, end, INK, **CEILING)
            drawing.words(x, y, group.line_words, "end")
        for bar in group.bars:
            y += ROW
            draw_bar(drawing, bar, scale, y, group.line)
        y += 1.5 * ROW
    return drawing.svg()


def draw_bar(drawing: Drawing, bar: Bar, scale: Scale, y: float, line: float | None) -> None:
    """One, in the middle of its row, with its runs as points; its note behind all, the line too."""
    drawing.words(scale.start - 8, y, bar.name, "end")
    drawing.bar(scale.start, y - 7, scale(bar.value) - scale.start, 14, bar.colour)
    for x in bar.points:
        drawing.point(scale(x), y, bar.colour, plain(round(x)), r=3)
    drawing.words(scale(max((bar.value, *bar.points, line or 0.0))) + 8, y, bar.note)


# ------------------------------------------------------------------ roofline


def ceilings(rows: Sequence[dict]) -> tuple[float, float | None]:
    """Bytes and flops a second that the floors of the rows were computed from, of the newest run
    that tells them.

    A floor is the longer of two times: without flops it tells what a copy moves; where it is longer
    than the bytes take, what a product makes. Flops are None where nothing tells them.

    Raises:
        Missing: every case has flops.
    """

    def newest(rates: list[tuple[str, float]]) -> float | None:
        return max(rates)[1] if rates else None

    copy = newest([(r["utc"], 1e3 * r["bytes"] / r["floor_ms"]) for r in rows if not r["flops"]])
    if not copy:
        raise Missing("kernels.jsonl: no case without flops tells what a copy moves")
    bound = [r for r in rows if r["flops"] and 1e3 * r["bytes"] / r["floor_ms"] < 0.9 * copy]
    return copy, newest([(r["utc"], 1e3 * r["flops"] / r["floor_ms"]) for r in bound])


def timed_rows(rows: Sequence[dict]) -> list[dict]:
    """Ours, on a GPU, where it was timed."""
    ours = [case.get("ours", {}) for case in newest_cases(on_gpu(rows)).values()]
    return [row for row in ours if row.get("status") == "timed"]


def roofline(rows: Sequence[dict]) -> str | None:
    """Left the operations without a product, each in its column: bytes that must move a second,
    under the rate of a copy. Right the others: flops a second over flops for each of those bytes,
    under the rates of a copy and of a product. Both were measured in the same run. A dot is a case
    of ours, with its share of the ceiling; a floor of less than a launch is left out.

    Args:
        rows: of bench.kernels.
    """
    counted = [row for row in timed_rows(rows) if row["floor_ms"] >= LAUNCH_MS]
    if not counted:
        return None
    copy, product = ceilings(counted)
    gpu = counted[-1]["gpu"]
    said = f"{len(counted)} cases; a copy moves {copy / 1e12:.3g} TB/s"
    said += f", a product makes {product / 1e12:.3g} TFLOP/s" if product else ""
    drawing = Drawing(WIDTH, HEIGHT, f"Roofline of the kernels on {gpu}", said)
    kinds = {row["pass"] for row in counted}
    drawing.legend(250, 14, {kind: c for kind, c in PASSES.items() if kind in kinds})
    counted.sort(key=lambda row: -row["floor_ms"])  # the largest are the first to have a label
    streams = [row for row in counted if not row["flops"]]
    products = [row for row in counted if row["flops"]]
    columns = len({row["op"] for row in streams})
    share = columns / (columns + 3.5) if products else 1.0
    middle = 46 + share * (WIDTH - 66)
    draw_streams(drawing, streams, copy, (46.0, middle))
    if products:
        draw_products(drawing, products, (copy, product), (middle + 60, WIDTH - 30.0))
    return drawing.svg()


def draw_streams(drawing: Drawing, rows, copy: float, span: tuple[float, float]) -> None:
    """Operations without a product: a column each, passes side by side."""
    left, right = span
    y = Scale.from_zero(max(1.1 * copy, *map(rate_of, rows)) / 1e12, BOTTOM, TOP)
    drawing.y_axis(y, left, right, "TB/s that must move")
    drawing.line(left, y(copy / 1e12), right, y(copy / 1e12), INK, **CEILING)
    drawing.words(left + 4, y(copy / 1e12) - 9, f"a copy: {copy / 1e12:.3g} TB/s")
    ops = list(dict.fromkeys(row["op"] for row in rows))
    wide = (right - left) / len(ops)
    places = []
    for i, op in enumerate(ops):
        x = left + wide * i
        drawing.words(x + wide / 2, BOTTOM + 14, op, "middle")
        mine = [row for row in rows if row["op"] == op]
        kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in mine)]
        for row in mine:
            at = x + wide * (kinds.index(row["pass"]) + 0.5) / len(kinds)
            places.append((row, at, y(rate_of(row) / 1e12), (x, y.end, x + wide, y.start)))
    draw_dots(drawing, places)
    drawing.words((left + right) / 2, BOTTOM + 34, "without a product", "middle")


def draw_products(drawing: Drawing, rows, rates, span: tuple[float, float]) -> None:
    """Operations with products, under the roof of both ceilings; one name for each operation."""
    copy, product = rates
    left, right = span
    ridge = [product / copy] if product else []
    x = Scale.decades([*(row["flops"] / row["bytes"] for row in rows), *ridge], left, right)
    top = product or copy * x.high
    flops = [1e3 * row["flops"] / row["p50"] for row in rows]
    y = Scale.decades([f / 1e12 for f in (top, *flops)], BOTTOM, TOP)
    drawing.x_axis(x, y.end, y.start, "flops for each byte that must move")
    drawing.y_axis(y, left, right, "TFLOP/s")
    ends = [max(x.low, y.low * 1e12 / copy), *ridge, x.high]
    roof = [(x(i), y(min(top, copy * i) / 1e12)) for i in ends]
    drawing.path(roof, INK, **CEILING)
    if product:
        words = f"a product: {product / 1e12:.3g} TFLOP/s"
        drawing.words(right, roof[-1][1] - 9, words, "end")
    area = left, y.end, right, y.start
    draw_dots(drawing, [
        (row, x(row["flops"] / row["bytes"]), y(f / 1e12), area)
        for row, f in zip(rows, flops, strict=True)
    ], named=True)  # fmt: skip


def rate_of(row: dict) -> float:
    """Bytes that must move, a second."""
    return 1e3 * row["bytes"] / row["p50"]


def draw_dots(drawing: Drawing, places, named: bool = False) -> None:
    """All dots, then a label for each that has room.

    Args:
        places: (row, x, y, area of the label), the most important first.
        named: whether the first label of an operation has its name.
    """
    for row, x, y, _ in places:
        hint = "{op}, {pass}: {shape}: {of_copy:.0%} of the ceiling".format(**row)
        drawing.point(x, y, PASSES[row["pass"]], hint)
    seen: set[str] = set()
    for row, x, y, area in places:
        words = f"{row['of_copy']:.0%}"
        new = named and row["op"] not in seen
        if drawing.label(x, y, f"{row['op']} {words}" if new else words, PASSES[row["pass"]], area):
            seen.add(row["op"])


# ----------------------------------------------------------------- fine-tuning


def step_time(rows: Sequence[dict]) -> str | None:
    """Milliseconds of one optimizer step, kernel by kernel.

    Args:
        rows: of bench.step_kernels; those on a GPU are drawn.
    """
    groups = []
    for (workload,), counted in newest_groups(on_gpu(rows), "workload").items():
        counted.sort(key=lambda row: (-row["ms"], row["kernel"]))
        total = sum(row["ms"] for row in counted)
        bars = [step_bar(row["kernel"], row["ms"], total) for row in counted[:KERNELS]]
        if rest := counted[KERNELS:]:
            name = f"{len(rest)} others"
            bars.append(step_bar(name, sum(row["ms"] for row in rest), total, INK))
        groups.append(Group(f"{workload}: {total:.2f} ms", bars))
    if not groups:
        return None
    title = f"Time of one optimizer step on {counted[0]['gpu']}, by kernel"
    return bar_chart(title, describe(groups), "ms", groups)


def step_bar(kernel: str, ms: float, total: float, colour: str = COLOURS[0]) -> Bar:
    kernel = kernel.removeprefix("void ")
    name = kernel if len(kernel) <= 48 else kernel[:45] + "..."
    return Bar(name, ms, f"{ms:.3f} ms, {ms / total:.0%}", colour)


def speed(title: str, trainers: dict[str, list[dict]], floor: float | None) -> str:
    """Real tokens a second of fine-tuning on a CPU: medians as bars, runs as points.

    Args:
        title: of the picture.
        trainers: name, ours first -> rows of its runs.
        floor: tokens a second of the matmuls alone; None: not known.
    """
    bars = []
    for i, (trainer, runs) in enumerate(trainers.items()):
        rates = [row["tokens_per_second"] for row in runs]
        rate = statistics.median(rates)
        bars.append(Bar(trainer, rate, f"{rate:,.0f}", COLOURS[min(i, 1)], tuple(rates)))
    words = f"matmuls alone: {floor:,.0f}" if floor else ""
    groups = [Group(title, bars, floor, words)]
    return bar_chart(f"Fine-tuning {title}", describe(groups), "real tokens a second", groups)


def speed_gpu(workloads: dict[str, list[dict]]) -> str | None:
    """The same on a GPU, minift and the fastest others, as shares of what the floor allows:
    workloads differ by ten times in tokens. One without a floor (not on an H200) is not drawn.

    Args:
        workloads: name -> rows of bench.finetune that were timed.
    """
    groups = []
    for name, timed in workloads.items():
        if not all(row["floor_ms"] for row in timed):
            continue
        counted = sorted(timed, key=lambda row: -row["tokens_per_second"])
        others = [row for row in counted if row["comparable"] and not is_ours(row)][:OTHERS]
        bars = [gpu_bar(row) for row in counted if row["peer"] == "minift" or row in others]
        floor = f"floor: {floor_rate(counted[0]):,.0f} tokens/s"
        groups.append(Group(name, bars, 100.0, floor))
    if not groups:
        return None
    title = f"Fine-tuning on {counted[0]['gpu']}"
    unit = "% of the real tokens a second at the floor"
    return bar_chart(title, describe(groups), unit, groups)


def gpu_bar(row: dict) -> Bar:
    """A trainer: how near it comes to the floor, and its rate."""
    rate = row["tokens_per_second"]
    colour = COLOURS[0] if is_ours(row) else COLOURS[1]
    return Bar(row["peer"], 100 * rate / floor_rate(row), f"{rate:,.0f} tokens/s", colour)


def is_ours(row: dict) -> bool:
    """Whether it is minift, with or without captured graphs."""
    return row["peer"].startswith("minift")


def floor_rate(row: dict) -> float:
    """Real tokens a second at the floor."""
    return 1e3 * row["tokens_per_step"] / row["floor_ms"]


def describe(groups: Sequence[Group]) -> str:
    """The numbers of bars, as words."""
    return "; ".join(f"{g.name}: {b.name} {b.note}" for g in groups for b in g.bars)
