"""The drawings of a GPU bundle's page."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from step35_trt.inspection import drawing
from step35_trt.inspection.drawing import Styles
from step35_trt.inspection.steps import graphs
from step35_trt.pages import chart
from step35_trt.pages.page import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from step35_trt.inspection.steps import Row
    from step35_trt.program import SteppedProgram
    from step35_trt.steps import StepProgram

LAYERS = 12  # of a drawing of steps: a screen's height or two


def figures(found: Sequence[Row], program: SteppedProgram) -> tuple[Figure, ...]:
    """Times by graph and by layer, and then every step; graphs of the same steps are drawn once."""
    styles = Styles.of(found)
    drawn, parts = dict[tuple[str, ...], str](), [_times(found, program, styles), _by_layer(found, styles)]
    for name, part in graphs(program):
        own = [row for row in found if row.graph == name]
        codes = tuple(row.code for row in own)
        if codes not in drawn:
            drawn[codes] = name
            same = [other for other, _ in graphs(program) if other != name and _codes(found, other) == codes]
            parts += _steps(name, own, part, styles, same)
    return tuple(parts)


def _codes(found: Sequence[Row], graph: str) -> tuple[str, ...]:
    return tuple(row.code for row in found if row.graph == graph)


def _times(found: Sequence[Row], program: SteppedProgram, styles: Styles) -> Figure:
    bars = []
    for name, _ in graphs(program):
        own = [row for row in found if row.graph == name]
        parts = tuple(
            (styles.by_code[code], seconds, f"{code}: {seconds * 1e3:.2f} ms")
            for code in dict.fromkeys(row.code for row in own)
            if (seconds := sum(row.seconds for row in own if row.code == code))
        )
        total = sum(seconds for _, seconds, _ in parts)
        bars.append(chart.Bar(f"{name}: {total * 1e3:.2f} ms", parts))
    title = "Time of a call at the roofline"
    longest = max(sum(part[1] for part in bar.parts) for bar in bars)
    return Figure(title, chart.bars(title, bars, longest), styles.keys(found))


def _by_layer(found: Sequence[Row], styles: Styles) -> Figure:
    bars = []
    for (_, layer), rows in groupby(found, key=lambda row: (row.graph, row.layer)):
        parts = tuple(
            (styles(row), row.seconds, f"{row.code} {row.name}: {row.seconds * 1e6:.1f} µs") for row in rows
        )
        bars.append(chart.Bar("head" if layer is None else str(layer), parts))
    longest = max(sum(part[1] for part in bar.parts) for bar in bars)
    title = "The same by layer"
    note = (
        f"The longest takes {longest * 1e6:,.0f} µs. Steps of one engine have one colour; what one step "
        "alone runs is grey, kernels are pale."
    )
    return Figure(title, chart.strips(title, bars, longest), (), note)


def _steps(
    name: str, own: Sequence[Row], part: StepProgram, styles: Styles, same: Sequence[str]
) -> Iterator[Figure]:
    for shown in _pieces(own):
        layers = [row.layer for number in shown if (row := own[number]).layer is not None]
        title = f"{', '.join((name, *same))}: steps"
        if layers and len(shown) < len(own):
            title += f" of layers {min(layers)} to {max(layers)}"
        yield Figure(title, drawing.steps(title, own, part, shown, styles), (), _note(part, shown, len(own)))


def _pieces(own: Sequence[Row]) -> Iterator[range]:
    """Steps of so many layers each; what lies outside the layers stays with the last."""
    starts = [0]
    layers = dict[int, None]()
    for number, row in enumerate(own):
        if row.layer is not None and row.layer not in layers:
            if layers and len(layers) % LAYERS == 0:
                starts.append(number)
            layers[row.layer] = None
    for start, stop in zip(starts, [*starts[1:], len(own)], strict=True):
        yield range(start, stop)


def _note(part: StepProgram, shown: range, count: int) -> str:
    if shown.stop < count:
        return ""
    alone = sum(buffer.row_bytes for buffer in part.buffers)
    inner = drawing.room(part)
    text = f"Buffers share {part.arena / 1e3:,.0f} kB a token instead of {alone / 1e3:,.0f} side by side."
    if inner < part.arena:
        text += f" Outputs reach beyond the {inner / 1e3:,.0f} kB that are drawn."
    return text
