"""The report's drawings."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from step35_trt.pages import chart
from step35_trt.pages.page import Figure, keys
from step35_trt.pages.table import several
from step35_trt.quantize.report.layers import KINDS, errors_by_kind, short, stage_lines
from step35_trt.quantize.report.tables import size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from step35_trt.quantize.report.data import QuantizationReport

RAMP = 9  # the first of six colours of the page that stand for a scale: the first two warn


def figures(report: QuantizationReport) -> tuple[Figure, ...]:
    """All drawings that the figures allow."""
    found = [_bytes(report), _weights(report)]
    lines = stage_lines(report)
    if any(line.output_error is not None for line in lines):
        found.append(_outputs(report))
    if any(line.flips is not None for line in lines):
        found.append(_routing(report))
    if any(stage.coverage for stage in report.stages):
        found.append(_coverage(report))
    return tuple(found)


def _bytes(report: QuantizationReport) -> Figure:
    before, after = (sum(getattr(g, side) for g in report.groups) for side in ("before", "after"))
    large = [g for g in report.groups if g.before >= 0.005 * before]
    small = [g for g in report.groups if g not in large]
    named = [(group.group, group.before, group.after) for group in large[: RAMP - 1]]
    rest = (*large[RAMP - 1 :], *small)
    if rest:
        named.append(("other", sum(g.before for g in rest), sum(g.after for g in rest)))
    bars = []
    for title, total, side in (("before", before, 1), ("after", after, 2)):
        parts = tuple((n, float(g[side]), f"{g[0]}: {size(g[side])}") for n, g in enumerate(named))  # type: ignore[arg-type]
        bars.append(chart.Bar(f"{title}: {size(total)}", parts))
    title = "Bytes on disk by part of the model"
    drawing = chart.bars(title, bars, max(before, after))
    return Figure(title, drawing, tuple((n, group[0]) for n, group in enumerate(named)))


def _weights(report: QuantizationReport) -> Figure:
    errors = [errors_by_kind(stage) for stage in report.stages]
    series = _series(report, {kind: [found.get(kind) for found in errors] for kind in KINDS})
    return _line_figure(report, "Weight error by stage", "relative error", series)


def _outputs(report: QuantizationReport) -> Figure:
    lines = stage_lines(report)
    values = {"output error of the stage": [line.output_error for line in lines]}
    if report.quality:  # the embedding's own rounding is no output of a layer
        drift = [None if line.name == "embedding" else line.drift for line in lines]
        values["drift, all stages before it quantised too"] = drift
    return _line_figure(
        report, "Output error against the original", "relative error", _series(report, values)
    )


def _routing(report: QuantizationReport) -> Figure:
    lines = stage_lines(report)
    values = {
        "other experts than before": [line.flips for line in lines],
        "beyond what rounding explains": [line.beyond for line in lines],
    }
    series = _series(report, values, zero=True)
    most = max(point.y for line in series for point in line.points)
    axis = chart.LinearAxis.from_zero("share of tokens", most, lambda v: f"{100 * v:.3g} %")
    title = "Tokens whose experts changed"
    drawing = chart.lines(title, _stage_axis(report), axis, series)
    return Figure(title, drawing, keys(series), "One layer quantised at a time.")


def _coverage(report: QuantizationReport) -> Figure:
    strips, used = [], set()
    covered = [(stage.name, stage.coverage) for stage in report.stages if stage.coverage]
    least = max(coverage.least for _, coverage in covered) if report.calibrated else 0
    names = (
        "never chosen",
        f"fewer than {least} tokens",
        "under half of an even share",
        "under an even share",
        "up to twice an even share",
        "more",
    )
    for stage, coverage in covered:
        even = sum(coverage.tokens) / len(coverage.tokens)
        counts = Counter(_class(tokens, least, even) for tokens in coverage.tokens)
        used |= set(counts)
        parts = tuple(
            (RAMP + n, float(counts[n]), f"{stage}, {several(counts[n], 'expert')}: {names[n]}")
            for n in sorted(counts)
        )
        strips.append(chart.Bar(short(stage), parts))
    experts = len(covered[0][1].tokens)
    title = f"How the text reached each layer's {experts} experts"
    named = tuple((RAMP + n, names[n]) for n in sorted(used))
    note = f"A row is a layer, its experts in the order of their load. {report.seen:,} tokens of text."
    return Figure(title, chart.strips(title, strips, experts), named, note)


def _class(tokens: int, least: int, even: float) -> int:
    """Which of the six colours an expert with so many tokens gets, `even` being the mean."""
    if tokens < max(1, least):
        return 1 if tokens else 0
    return 2 + sum(tokens >= limit for limit in (even / 2, even, 2 * even))


def _series(
    report: QuantizationReport, values: dict[str, list[float | None]], zero: bool = False
) -> list[chart.Line]:
    """Lines over the stages; without `zero` on an axis that has none, values of 0 are left out."""
    found = []
    for name, column in values.items():
        points = tuple(
            chart.Point(float(n), value, True, f"{stage.name}, {name}: {value:.3g}")
            for n, (stage, value) in enumerate(zip(report.stages, column, strict=True))
            if value is not None and (zero or value > 0)
        )
        if points:
            found.append(chart.Line(name, points))
    return found


def _line_figure(report: QuantizationReport, title: str, unit: str, series: Sequence[chart.Line]) -> Figure:
    values = [point.y for line in series for point in line.points]
    spell: Callable[[float], str] = lambda v: f"{v:g}"  # noqa: E731 - typed
    axis = chart.LogAxis.over(unit, values or [1.0], spell)
    return Figure(title, chart.lines(title, _stage_axis(report), axis, series), keys(series))


def _stage_axis(report: QuantizationReport) -> chart.LinearAxis:
    """Every stage has its place; marks are at layers, the first module and the ends."""
    names = [stage.name for stage in report.stages]
    layers = [n for n, name in enumerate(names) if name.startswith("layer-")]
    step = next(s for s in (1, 2, 5, 10, 20) if len(layers) <= 8 * s or s == 20)
    marks = [(float(n), short(names[n])) for n in layers[::step]]
    modules = [n for n, name in enumerate(names) if name.startswith("mtp-")]
    if modules:
        marks = [mark for mark in marks if mark[0] <= modules[0] - max(2, step / 2)]
        marks.append((float(modules[0]), "MTP"))
    return chart.LinearAxis("layer", tuple(marks), -0.5, len(names) - 0.5)
