"""A program as a drawing: a line a step, and what it fills in the arena for as long as that is needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from step35_trt.inspection.steps import place
from step35_trt.pages import chart

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.inspection.steps import Row
    from step35_trt.steps import Buffer, StepProgram

# Colours of the page: engines that steps share have one each, in turn where there are more; what one step
# alone runs is grey; kernels are pale.
SHARED = (0, 1, 2, 3, 4, 6, 7, 8, 9)
ALONE = 5
PALE = {"gated_attention": 12, "sparse_moe": 10}
OTHER = 11

ROW = 17
HEAD = 22
BOX, BOX_WIDE = 54, 34
ARENA, ARENA_WIDE = 96, 210
MEGABYTES, MICROSECONDS = 366, chart.WIDTH - 4


@dataclass(frozen=True)
class Styles:
    """The colour of each code, as a number of the page's."""

    by_code: Mapping[str, int]

    @classmethod
    def of(cls, found: Sequence[Row]) -> Styles:
        """Those of a program's steps."""
        uses = Counter(row.code for row in found)
        kinds = {row.code: row.kind for row in found}
        shared = [code for code, kind in kinds.items() if kind == "segment" and uses[code] > 1]
        styles = {code: SHARED[n % len(SHARED)] for n, code in enumerate(shared)}
        for code, kind in kinds.items():
            if code not in styles:
                styles[code] = ALONE if kind == "segment" else PALE.get(kind, OTHER)
        return cls(styles)

    def __call__(self, row: Row) -> int:
        """The colour of a step."""
        return self.by_code[row.code]

    def keys(self, found: Sequence[Row]) -> tuple[tuple[int, str], ...]:
        """Each code once with its colour, where it first runs, and how often."""
        uses, first = Counter(row.code for row in found), {row.code: row for row in reversed(found)}
        return tuple(
            (self.by_code[code], f"{code} {place(first[code])}" + (f", {count} times" if count > 1 else ""))
            for code, count in uses.items()
        )


def room(part: StepProgram) -> int:
    """Bytes a token of the arena that a drawing shows: those in use until outputs, as logits, are made."""
    given = set(part.outputs.values())
    made = min((buffer.first for buffer in part.buffers if buffer.name in given), default=len(part.steps))
    before = (buffer.offset + buffer.row_bytes for buffer in part.buffers if buffer.last < made)
    return max(before, default=part.arena)


def steps(label: str, found: Sequence[Row], part: StepProgram, shown: range, styles: Styles) -> Markup:
    """Some of a program's steps, one under the other.

    Args:
        label: What this shows.
        found: Rows of all steps.
        part: The program.
        shown: Which of them are drawn.
        styles: Of all steps.
    """
    width = room(part)
    elements = [*_head(width)]
    layer: int | None = -1
    for number in shown:
        row, top = found[number], _top(number, shown)
        if row.layer != layer:
            layer = row.layer
            name = "head" if layer is None else str(layer)
            elements.append(f'<line class="grid" x1="0" x2="{chart.WIDTH}" y1="{top}" y2="{top}"/>')
            elements.append(f'<text x="0" y="{top + 13}">{name}</text>')
        elements += _step(row, top, styles)
    for buffer in part.buffers:
        needed = range(max(buffer.first, shown.start), min(buffer.last + 1, shown.stop))
        if needed:
            style = styles(found[buffer.first]) if buffer.first >= 0 else OTHER
            lines = _top(needed.start, shown) + 1, len(needed) * ROW - 2
            elements.append(_buffer(buffer, width, lines, style))
    return chart.svg(label, HEAD + len(shown) * ROW + 4, elements)


def _top(number: int, shown: range) -> int:
    return HEAD + (number - shown.start) * ROW


def _head(shown: int) -> list[str]:
    end = "end"
    titles = [
        (0, "", "layer"),
        (BOX, "", "step"),
        (ARENA, "", f"arena, {shown / 1e3:,.0f} kB a token"),
        (MEGABYTES, end, "MB"),
        (MICROSECONDS, end, "µs"),
    ]
    return [f'<text class="{kind}" x="{x}" y="14">{title}</text>' for x, kind, title in titles]


def _step(row: Row, top: int, styles: Styles) -> list[str]:
    style = styles(row)
    note = f"{row.code} {row.name}: {row.shape}"
    ink = "middle" if row.kind != "segment" else "middle on"
    return [
        f'<rect class="f{style}" x="{BOX}" y="{top + 1}" width="{BOX_WIDE}" height="{ROW - 2}">'
        f"<title>{escape(note)}</title></rect>",
        f'<text class="{ink}" x="{BOX + BOX_WIDE // 2}" y="{top + 13}">{row.code}</text>',
        f'<text class="end" x="{MEGABYTES}" y="{top + 13}">{row.bytes / 1e6:,.2f}</text>',
        f'<text class="end" x="{MICROSECONDS}" y="{top + 13}">{row.seconds * 1e6:,.1f}</text>',
    ]


def _buffer(buffer: Buffer, shown: int, lines: tuple[int, int], style: int) -> str:
    left = ARENA + min(1.0, buffer.offset / shown) * ARENA_WIDE
    right = ARENA + min(1.0, (buffer.offset + buffer.row_bytes) / shown) * ARENA_WIDE
    note = f"{buffer.name}: {buffer.width or 1} {buffer.dtype}, {buffer.row_bytes:,} bytes a row"
    return (
        f'<rect class="f{style}" x="{left:.1f}" y="{lines[0]}" width="{max(1.0, right - left):.1f}" '
        f'height="{lines[1]}"><title>{escape(note)}</title></rect>'
    )
