"""Three kinds of drawing as SVG text, coloured by the page's style: dark and light need no second file.

Sizes are in the drawing's own units; a page scales it to the width it has. Text is large enough to be read on
a phone at the narrowest and not clumsy on a desk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 12, 46
BAR, GAP = 34, 18
STRIP, LABEL = 10, 16


@dataclass(frozen=True)
class Point:
    """A value of a line; `solid` is whether the line up to it is more than hypothetical."""

    x: float
    y: float
    solid: bool
    note: str


@dataclass(frozen=True)
class Line:
    """Points in the order of x."""

    name: str
    points: tuple[Point, ...]


class Axis(Protocol):
    """An axis from `low` to `high` with labelled marks."""

    @property
    def title(self) -> str:
        """What is measured, in which unit."""

    @property
    def marks(self) -> tuple[tuple[float, str], ...]:
        """Values with their labels."""

    @property
    def low(self) -> float:
        """The value at the beginning."""

    @property
    def high(self) -> float:
        """The value at the end."""

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""


@dataclass(frozen=True)
class LinearAxis:
    """Equal steps are equally long."""

    title: str
    marks: tuple[tuple[float, str], ...]
    low: float
    high: float

    def place(self, value: float) -> float:
        """See `Axis`."""
        return (value - self.low) / (self.high - self.low)

    @classmethod
    def from_zero(cls, title: str, most: float, spell: Callable[[float], str]) -> LinearAxis:
        """An axis that holds 0 and `most`, with three to six marks at 1, 2 or 5 times a power of ten."""
        most = most if most > 0 else 1.0
        power = 10.0 ** math.floor(math.log10(most / 5))
        step = next(power * n for n in (1, 2, 5, 10) if power * n * 5 >= most)
        count = math.ceil(most / step * (1 - 1e-9))
        marks = tuple((n * step, spell(n * step)) for n in range(count + 1))
        return cls(title, marks, 0.0, count * step)


@dataclass(frozen=True)
class LogAxis:
    """Equal ratios are equally long."""

    title: str
    marks: tuple[tuple[float, str], ...]
    low: float
    high: float

    def place(self, value: float) -> float:
        """See `Axis`."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    @classmethod
    def over(
        cls, title: str, values: Sequence[float], spell: Callable[[float], str], base: int = 10
    ) -> LogAxis:
        """An axis that holds the values, with marks at powers of `base` or, for a short one, between them."""
        low, high = min(values), max(values)
        exponents = range(math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9) + 1)
        marks = [float(base**e) for e in exponents]
        if len(marks) < 4 and base == 10:
            marks = [m * step for m in marks for step in (1, 2, 5)]
        # The ends are the marks around the values.
        low = max((m for m in marks if m <= low * 1.000001), default=low)
        high = min((m for m in marks if m >= high * 0.999999), default=high)
        if high <= low:
            high = low * base
        return cls(title, tuple((m, spell(m)) for m in marks if low <= m <= high), low, high)


@dataclass(frozen=True)
class Level:
    """A horizontal line: a limit."""

    name: str
    value: float


def lines(label: str, x: Axis, y: Axis, series: Sequence[Line], level: Level | None = None) -> Markup:
    """Lines over two axes; what is hypothetical is dashed."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(value: float) -> float:
        return LEFT + x.place(value) * width

    def down(value: float) -> float:
        return TOP + (1 - y.place(value)) * height

    parts = [*_frame(x, y, across, down)]
    if level and y.low <= level.value <= y.high:
        at = down(level.value)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="limit" x="{LEFT + 6}" y="{at - 5:.1f}">{escape(level.name)}</text>')
    for number, line in enumerate(series):
        for before, after in zip(line.points, line.points[1:], strict=False):
            ends = (across(before.x), down(before.y), across(after.x), down(after.y))
            style = f"s{number}" + ("" if after.solid else " thin")
            place = 'x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"'.format(*ends)
            parts.append(f'<line class="{style}" {place}/>')
        for point in line.points:
            style = f"s{number}" + ("" if point.solid else " thin")
            parts.append(
                f'<circle class="{style}" cx="{across(point.x):.1f}" cy="{down(point.y):.1f}" r="3.2">'
                f"<title>{escape(point.note)}</title></circle>"
            )
    return svg(label, HEIGHT, parts)


def _frame(x: Axis, y: Axis, across: Callable[[float], float], down: Callable[[float], float]) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value, text in y.marks:
        at = down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{at + 4:.1f}">{escape(text)}</text>')
    for value, text in x.marks:
        at = across(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="middle" x="{at:.1f}" y="{bottom + 17}">{escape(text)}</text>')
    middle = TOP + (bottom - TOP) / 2
    parts.append(
        f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">{escape(x.title)}</text>'
    )
    parts.append(
        f'<text class="middle" transform="translate(14 {middle}) rotate(-90)">{escape(y.title)}</text>'
    )
    return parts


@dataclass(frozen=True)
class Bar:
    """A bar of parts laid end to end; each part is a style's number, a length and a remark."""

    name: str
    parts: tuple[tuple[int, float, str], ...]


def bars(label: str, series: Sequence[Bar], length: float, limit: Level | None = None) -> Markup:
    """Stacked bars, one under the other; `length` is the value at full width."""
    room = WIDTH - RIGHT - 8
    parts = []
    for row, bar in enumerate(series):
        top, at = TOP + 8 + row * (BAR + GAP + 14), 8.0
        parts.append(f'<text x="8" y="{top + 6}">{escape(bar.name)}</text>')
        for style, value, note in bar.parts:
            wide = value / length * room
            parts.append(
                f'<rect class="f{style}" x="{at:.1f}" y="{top + 13}" width="{max(0.0, wide):.1f}" '
                f'height="{BAR}"><title>{escape(note)}</title></rect>'
            )
            at += wide
    height = TOP + 8 + len(series) * (BAR + GAP + 14)
    if limit:
        at = 8 + limit.value / length * room
        parts.append(
            f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP + 14}" y2="{height - GAP + 4}"/>'
            f'<text class="limit end" x="{WIDTH - RIGHT}" y="{height - 2}">{escape(limit.name)}</text>'
        )
    return svg(label, height + 4, parts)


def strips(label: str, series: Sequence[Bar], length: float) -> Markup:
    """Thin stacked bars with their names at the left, for many of them; every few are named."""
    room, parts = WIDTH - LEFT - RIGHT, []
    every = math.ceil(LABEL / STRIP)
    for row, bar in enumerate(series):
        top, at = TOP + row * STRIP, float(LEFT)
        if row % every == 0:
            parts.append(f'<text class="end" x="{LEFT - 6}" y="{top + STRIP - 2}">{escape(bar.name)}</text>')
        for style, value, note in bar.parts:
            wide = value / length * room
            parts.append(
                f'<rect class="f{style}" x="{at:.1f}" y="{top}" width="{wide:.1f}" height="{STRIP}">'
                f"<title>{escape(note)}</title></rect>"
            )
            at += wide
    return svg(label, TOP + len(series) * STRIP + 4, parts)


def svg(label: str, height: float, parts: Sequence[str]) -> Markup:
    """A drawing of the common width from its elements; `label` says what it shows."""
    name = escape(label)
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{name}">'
    return Markup(head + "".join(parts) + "</svg>")
