"""A benchmark as tables, as JSON and as one page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from step35_trt.pages import chart
from step35_trt.pages import page as pages
from step35_trt.pages.page import Figure, keys
from step35_trt.pages.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.bench.figures import Measured, Spread
    from step35_trt.engine import EngineSpec

MS = 1000.0


def tables(runs: Sequence[Measured], spec: EngineSpec) -> tuple[Table, ...]:
    """Throughput and drafting, then latencies."""
    known = spec.hardware is not None
    where = f"{spec.devices} x {spec.hardware.name}" if spec.hardware else ""
    rates = tuple(
        (
            str(run.concurrency),
            str(run.requests),
            f"{run.seconds:.2f}",
            f"{run.input_tokens / run.seconds:,.0f}",
            f"{run.output_rate:,.1f}",
            f"{run.decode_rate:,.1f}",
            *((f"{run.of_roofline:.1%}" if run.of_roofline else "-",) if known else ()),
            f"{run.accepted_length:.2f}",
            " ".join(f"{share:.2f}" for share in run.acceptance) or "-",
        )
        for run in runs
    )
    columns = ("in flight", "requests", "s", "prompt tok/s", "output tok/s", "decoding tok/s")
    drafting = ("accepted length", "accepted by head")
    note = f"Roofline: what plan projects for {where} with the best number of drafts." if known else ""
    return (
        Table("Throughput", (*columns, *(("of roofline",) if known else ()), *drafting), rates, note),
        Table(
            "Latency, ms",
            ("in flight", "what", "mean", "p50", "p90", "p99"),
            tuple(_latency(run, name, spread) for run in runs for name, spread in _spreads(run)),
            "Inter-token: between two deliveries, each of which may hold several tokens.",
        ),
    )


def as_json(runs: Sequence[Measured], spec: EngineSpec) -> dict[str, object]:
    """Plain data: seconds, and tokens per second."""
    return {
        "engine": spec.model_dump(mode="json"),
        "runs": [
            asdict(run) | {"output_rate": run.output_rate, "of_roofline": run.of_roofline} for run in runs
        ],
    }


def render(runs: Sequence[Measured], spec: EngineSpec, load: str) -> str:
    """The page; `load` says what was asked for."""
    context = {"spec": spec, "load": load, "figures": _figures(runs), "tables": tables(runs, spec)}
    return pages.render(Path(__file__).with_name("page.html.jinja"), context)


def _spreads(run: Measured) -> tuple[tuple[str, Spread], ...]:
    return (
        ("time to first token", run.first_token),
        ("per output token", run.per_token),
        ("inter-token", run.between),
        ("whole answer", run.whole),
    )


def _latency(run: Measured, name: str, spread: Spread) -> tuple[str, ...]:
    values = (spread.mean, spread.p50, spread.p90, spread.p99)
    return (str(run.concurrency), name, *(f"{MS * value:,.2f}" for value in values))


def _figures(runs: Sequence[Measured]) -> tuple[Figure, ...]:
    flights = [float(run.concurrency) for run in runs]
    axis = chart.LogAxis.over("requests in flight", flights, lambda v: f"{v:g}", base=2)
    rates = [_line("output", runs, [run.output_rate for run in runs], "tok/s")]
    latencies = [
        _line(name, runs, [MS * getattr(run.first_token, name) for run in runs], "ms")
        for name in ("p50", "p90", "p99")
    ]
    gaps = [
        _line(name, runs, [MS * getattr(run.per_token, name) for run in runs], "ms")
        for name in ("p50", "p90", "p99")
    ]
    return (
        _figure("Output tokens per second", "tok/s", axis, rates),
        _figure("Time to first token, ms", "ms", axis, latencies),
        _figure("Time per output token, ms", "ms", axis, gaps),
    )


def _line(name: str, runs: Sequence[Measured], values: Sequence[float], unit: str) -> chart.Line:
    points = (
        chart.Point(float(run.concurrency), value, True, f"{run.concurrency} in flight: {value:,.1f} {unit}")
        for run, value in zip(runs, values, strict=True)
    )
    return chart.Line(name, tuple(points))


def _figure(title: str, unit: str, axis: chart.Axis, series: list[chart.Line]) -> Figure:
    most = max(point.y for line in series for point in line.points)
    upright = chart.LinearAxis.from_zero(unit, most, lambda v: f"{v:g}")
    return Figure(title, chart.lines(title, axis, upright, series), keys(series))
