"""Plots as SVG text, by hand: axes, bars, points, labels. The same calls give the same bytes.

The background is the page's, which may be light or dark: every colour lies between the two, and is
told from either (tests/test_svg.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PAGES = ("#ffffff", "#0d1117")  # GitHub's, light and dark
INK = "#747a81"  # of words and lines
# Of like lightness: words in any of them can be read on both pages.
COLOURS = ("#2078dd", "#c15d10", "#22894d", "#d34558", "#8c60d7", "#158591", "#9c7211")
SIZE = 12  # of letters, in pixels
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


Box = tuple[float, float, float, float]  # left, top, right, bottom


def width_of(words: str, size: float = SIZE) -> float:
    """Pixels that words take, nearly, and rather too many: fonts differ from page to page."""
    return 0.62 * size * len(words)


def number(x: float) -> str:
    """A coordinate: two digits after the point, and no "-0"."""
    return f"{round(x, 2) + 0.0:g}"


def plain(x: float) -> str:
    """A number of an axis: 0.01, 2.5, 1,000."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.6g}"


@dataclass(frozen=True)
class Scale:
    """Where numbers from `low` to `high` lie between two pixels."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # of `high`
    log: bool = False

    def __call__(self, x: float) -> float:
        if self.log:
            share = math.log(x / self.low) / math.log(self.high / self.low)
        else:
            share = (x - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @staticmethod
    def decades(values: Sequence[float], start: float, end: float) -> "Scale":
        """Logarithmic, in whole powers of ten around all values."""
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return Scale(10.0**low, 10.0 ** max(high, low + 1), start, end, log=True)

    @staticmethod
    def from_zero(highest: float, start: float, end: float) -> "Scale":
        """Linear, to the next round number."""
        step = round_step(highest)
        return Scale(0.0, step * math.ceil(highest / step - 1e-9), start, end)

    @property
    def ticks(self) -> list[float]:
        """Powers of ten; or 0 and 4 to 10 round numbers."""
        if self.log:
            first, last = (round(math.log10(x)) for x in (self.low, self.high))
            return [10.0**n for n in range(first, last + 1)]
        step = round_step(self.high)
        return [step * i for i in range(round(self.high / step) + 1)]


def round_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, 4 to 10 of which reach the highest."""
    power = 10.0 ** math.floor(math.log10(highest / 4))
    return max(step * power for step in (1, 2, 5) if step * power <= highest / 4 * (1 + 1e-9))


class Drawing:
    """What was drawn so far, and the boxes of its words."""

    def __init__(self, width: float, height: float, title: str, description: str):
        self.width, self.height = width, height
        self.boxes: list[Box] = []  # of words
        self.dots: list[Box] = []
        size = f"{number(width)} {number(height)}"
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{number(width)}" '
            f'height="{number(height)}" role="img" font-family="{FONT}" font-size="{SIZE}">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
        ]

    def svg(self) -> str:
        """The text of the file."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"

    def add(self, name: str, inside: str = "", **attributes: object) -> None:
        """An element; of attributes "_" is "-"."""
        said = {
            key.rstrip("_").replace("_", "-"): number(x) if isinstance(x, (int, float)) else str(x)
            for key, x in attributes.items()
        }
        words = "".join(f' {key}="{escape(x)}"' for key, x in said.items())
        self.parts.append(f"<{name}{words}>{inside}</{name}>" if inside else f"<{name}{words}/>")

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, **look) -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, **look)

    def path(self, points: Sequence[tuple[float, float]], colour: str, **look) -> None:
        """A line through all points."""
        at = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.add("polyline", points=at, fill="none", stroke=colour, **look)

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Half transparent, so that points on it are seen."""
        self.add("rect", x=x, y=y, width=width, height=height, fill=colour, opacity=0.5)

    def point(self, x: float, y: float, colour: str, hint: str = "", r: float = 4) -> None:
        """A dot; `hint` is shown where the pointer rests on it."""
        self.dots.append((x - r, y - r, x + r, y + r))
        inside = f"<title>{escape(hint)}</title>" if hint else ""
        self.add("circle", inside, cx=x, cy=y, r=r, fill=colour)

    def words(self, x: float, y: float, words: str, anchor: str = "start", **look) -> None:
        """A text beside (x, y), which is the middle of its height."""
        self.boxes.append(self.box(x, y, words, anchor))
        look = {"fill": INK, **look}
        anchored = {} if anchor == "start" else {"text_anchor": anchor}
        self.add("text", escape(words), x=x, y=y + 0.35 * SIZE, **anchored, **look)

    @staticmethod
    def box(x: float, y: float, words: str, anchor: str = "start") -> Box:
        """Of a text."""
        wide = width_of(words)
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        return left, y - SIZE / 2, left + wide, y + SIZE / 2

    def free(self, box: Box) -> bool:
        """Whether no words and no dots are there."""
        left, top, right, bottom = box
        return not any(
            left < r and li < right and top < b and ti < bottom
            for li, ti, r, b in (*self.boxes, *self.dots)
        )

    def label(self, x: float, y: float, words: str, colour: str, area: Box) -> bool:
        """Words near a dot where neither words nor dots are, inside an area; or none, if all is
        taken."""
        left, top, right, bottom = area
        for away in (0, -13, 13, -26, 26):
            for anchor, beside in (("start", 8), ("end", -8)):
                box = self.box(x + beside, y + away, words, anchor)
                inside = left <= box[0] and box[2] <= right and top <= box[1] and box[3] <= bottom
                if inside and self.free(box):
                    if abs(away) > 13:
                        self.line(x, y, x + beside, y + away, colour, stroke_width=0.7)
                    self.words(x + beside, y + away, words, anchor, fill=colour)
                    return True
        return False

    def x_axis(self, scale: Scale, top: float, bottom: float, title: str) -> None:
        """Numbers below `bottom`, a thin line up from each, the title under all."""
        for x in scale.ticks:
            self.line(scale(x), top, scale(x), bottom, INK, stroke_width=0.5, opacity=0.5)
            self.words(scale(x), bottom + 14, plain(x), "middle")
        self.words((scale.start + scale.end) / 2, bottom + 34, title, "middle")

    def y_axis(self, scale: Scale, left: float, right: float, title: str) -> None:
        """Numbers left of `left`, a thin line from each to the right, the title above all."""
        self.words(left - 6, scale.end - 16, title)
        for y in scale.ticks:
            self.line(left, scale(y), right, scale(y), INK, stroke_width=0.5, opacity=0.5)
            self.words(left - 6, scale(y), plain(y), "end")

    def legend(self, x: float, y: float, names: dict[str, str]) -> None:
        """Names and their colours, in a row."""
        for name, colour in names.items():
            self.point(x, y, colour)
            self.words(x + 9, y, name)
            x += 26 + width_of(name)
