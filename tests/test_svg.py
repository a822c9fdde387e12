"""bench/svg.py: numbers lie where the axes say, words do not lie on each other, all is XML."""

import itertools
import math
import xml.etree.ElementTree as ET

import bench_package  # noqa: F401
import pytest

from bench.svg import COLOURS, INK, PAGES, SIZE, Drawing, Scale, number, plain, width_of

SVG = "{http://www.w3.org/2000/svg}"


def luminance(colour: str) -> float:
    """As WCAG 2.1 defines it."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("colour", [*COLOURS, INK])
def test_words_of_every_colour_can_be_read_on_both_pages(colour, page):
    """A contrast of 4 and more; no colour can reach 4.5 on white and on this black."""
    bright, dark = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 4.2


def test_colours_differ():
    assert len({*COLOURS, INK}) == len(COLOURS) + 1


@pytest.mark.parametrize("highest", [0.003, 0.1, 1, 7.3, 99, 100, 2588.2, 9.99e6])
def test_a_linear_axis_begins_at_0_and_ends_at_a_round_number(highest):
    scale = Scale.from_zero(highest, 100, 500)
    assert scale(0) == 100
    assert scale.ticks[0] == 0
    assert scale.ticks[-1] == pytest.approx(scale.high)
    assert highest <= scale.high * (1 + 1e-9)
    assert 4 <= len(scale.ticks) - 1 <= 10
    assert scale(scale.ticks[-1]) == pytest.approx(500)
    step = scale.ticks[1] / 10 ** math.floor(math.log10(scale.ticks[1]) + 1e-9)
    assert round(step, 6) in (1, 2, 5)


@pytest.mark.parametrize("values", [[0.02, 700], [10, 100], [5], [1]])
def test_a_logarithmic_axis_has_whole_powers_of_ten(values):
    """One of them at each end, and as far between any two."""
    scale = Scale.decades(values, 400, 0)
    assert scale.low <= min(values)
    assert max(values) <= scale.high
    places = [scale(tick) for tick in scale.ticks]
    assert places[0] == 400
    assert places[-1] == pytest.approx(0)
    gaps = [a - b for a, b in itertools.pairwise(places)]
    assert gaps == pytest.approx([400 / len(gaps)] * len(gaps))


@pytest.mark.parametrize(
    ("x", "shown"), [(-1e-9, "0"), (3, "3"), (1.005, "1"), (2.5, "2.5"), (959.999, "960")]
)
def test_coordinates_are_short(x, shown):
    assert number(x) == shown


@pytest.mark.parametrize(
    ("x", "shown"), [(0, "0"), (0.01, "0.01"), (0.30000000000000004, "0.3"), (12000, "12,000")]
)
def test_numbers_of_axes_are_plain(x, shown):
    assert plain(x) == shown


def test_whatever_is_said_is_text():
    """Of an operator's name, of a title and of a hint."""
    odd = "a<b> & \"c\" 'd' </text>"
    drawing = Drawing(100, 50, odd, odd)
    drawing.words(1, 2, odd)
    drawing.point(3, 4, COLOURS[0], odd)
    root = ET.fromstring(drawing.svg())
    assert [root.findtext(f"{SVG}{tag}") for tag in ("title", "desc", "text")] == [odd] * 3
    assert root.findtext(f"{SVG}circle/{SVG}title") == odd


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_labels_do_not_lie_on_words_or_dots():
    """Of dots in one place as many are labelled as there is room for, all inside the area."""
    drawing, area = Drawing(200, 100, "", ""), (50.0, 20.0, 170.0, 80.0)
    for i in range(12):
        drawing.point(100 + i, 50, COLOURS[0])
    placed = sum(drawing.label(100 + i, 50, "100%", COLOURS[0], area) for i in range(12))
    assert 2 <= placed < 12
    boxes = drawing.boxes
    assert len(boxes) == placed
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in (*boxes[:i], *drawing.dots))
    assert all(left >= 50 and right <= 170 for left, _, right, _ in boxes)
    assert all(top >= 20 and bottom <= 80 for _, top, _, bottom in boxes)


def test_a_label_without_room_is_left_out():
    drawing = Drawing(200, 100, "", "")
    assert not drawing.label(5, 5, "much too long", COLOURS[0], (0, 0, 40, 40))
    assert "much" not in drawing.svg()
    assert width_of("much too long") > 40


def test_a_box_is_where_its_words_are():
    wide = width_of("four")
    for anchor, left in (("start", 100), ("middle", 100 - wide / 2), ("end", 100 - wide)):
        box = Drawing.box(100, 50, "four", anchor)
        assert box == (left, 50 - SIZE / 2, left + wide, 50 + SIZE / 2)
