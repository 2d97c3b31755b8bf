"""A plan as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from step35_trt.pages import chart
from step35_trt.pages import page as pages
from step35_trt.pages.page import Figure, keys
from step35_trt.pages.table import several
from step35_trt.plan import report
from step35_trt.plan.report import GB, figure, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.plan.plan import Plan

SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
LEAST_CONTEXT = 1024


def render(plan: Plan, source: str) -> str:
    """The page; `source` is what the plan was made from, as the reader knows it."""
    context = {
        "plan": plan,
        "source": source,
        "heading": report.heading(plan),
        "verdict": report.verdict(plan),
        "building": report.building(plan),
        "figures": figures(plan),
        "tables": report.tables(plan),
        "refusals": report.refusals(plan),
    }
    return pages.render(Path(__file__).with_name("page.html.jinja"), context)


def figures(plan: Plan) -> tuple[Figure, ...]:
    """The drawings of a plan."""
    return (_memory(plan), _caches(plan), _by_sequences(plan), _by_context(plan), _traffic(plan))


def _memory(plan: Plan) -> Figure:
    memory = plan.memory
    items = [item for item in memory.items if item.nbytes]
    parts = tuple((n, item.nbytes, f"{item.what}: {item.nbytes / GB:.2f} GB") for n, item in enumerate(items))
    drawing = chart.bars(
        report.verdict(plan),
        [chart.Bar(f"{memory.needed / GB:.1f} GB needed", parts)],
        max(memory.needed, memory.capacity) * 1.02,
        chart.Level(f"{memory.capacity / GB:.1f} GB there", memory.capacity),
    )
    named = tuple((n, f"{item.what} {item.nbytes / GB:.2f}") for n, item in enumerate(items))
    return Figure("Memory of one device, GB", drawing, named)


def _caches(plan: Plan) -> Figure:
    limits, footprint, config = plan.limits, plan.footprint, plan.config
    contexts = _contexts(plan)
    counts = (1, 8, 64)

    def size(context: int, sequences: int) -> float:
        return footprint.caches(config.layers, context, sequences) / GB

    # What is not cache does not depend on the context.
    least = footprint.at(1, 1, limits.drafts)
    room = (least.free + footprint.caches(config.layers, 1, 1)) / GB
    series = [
        chart.Line(
            several(count, "sequence"),
            tuple(
                chart.Point(
                    context,
                    size(context, count),
                    footprint.at(context, count, limits.drafts).free >= 0,
                    f"{count} x {tokens(context)}: {figure(size(context, count))} GB",
                )
                for context in contexts
            ),
        )
        for count in counts
    ]
    values = [p.y for line in series for p in line.points]
    drawing = chart.lines(
        "Keys and values by context and sequences",
        _context_axis(contexts),
        chart.LogAxis.over("GB a device", values, lambda v: f"{v:g}"),
        series,
        chart.Level(f"room beside the weights: {room:.1f} GB", room) if room > 0 else None,
    )
    return Figure("Keys and values, by context", drawing, keys(series), "Dashed: does not fit.")


def _by_sequences(plan: Plan) -> Figure:
    context = min(8192, plan.config.max_position_embeddings)
    series = [
        chart.Line(f"K = {drafts}", tuple(_speed(plan, n, context, drafts, n) for n in SEQUENCES))
        for drafts in range(plan.config.num_nextn_predict_layers + 1)
    ]
    axis = chart.LogAxis.over("sequences at once", [float(n) for n in SEQUENCES], lambda v: f"{v:g}", base=2)
    return _speed_figure(f"Tokens per second by batch, context {tokens(context)}", axis, series)


def _by_context(plan: Plan) -> Figure:
    contexts = _contexts(plan)
    series = [
        chart.Line(f"K = {drafts}", tuple(_speed(plan, 1, context, drafts, context) for context in contexts))
        for drafts in range(plan.config.num_nextn_predict_layers + 1)
    ]
    return _speed_figure("Tokens per second by context, one sequence", _context_axis(contexts), series)


def _speed(plan: Plan, sequences: int, context: int, drafts: int, x: float) -> chart.Point:
    speed = plan.roofline.step(sequences, context, drafts, plan.acceptance).tokens_per_second
    fits = plan.footprint.at(context, sequences, drafts).free >= 0
    note = f"K = {drafts}, {sequences} x {tokens(context)}: {figure(speed)} tokens/s"
    return chart.Point(x, speed, fits, note)


def _speed_figure(title: str, axis: chart.LogAxis, series: Sequence[chart.Line]) -> Figure:
    values = [p.y for line in series for p in line.points]
    rates = chart.LogAxis.over("tokens/s, all sequences", values, lambda v: f"{v:g}")
    note = "Projected at the roofline, not measured. Dashed: does not fit."
    return Figure(title, chart.lines(title, axis, rates, series), keys(series), note)


def _traffic(plan: Plan) -> Figure:
    names = ("dense weights", "experts", "keys and values", "drafting")
    context = min(8192, plan.config.max_position_embeddings)
    drawn, most = [], 0.0
    for sequences in (1, 8, 64):
        step = plan.roofline.step(sequences, context, plan.limits.drafts, plan.acceptance)
        t = step.traffic
        most = max(most, t.total)
        parts = tuple(
            (n, part / t.total, f"{names[n]}: {part / GB:.2f} GB, {part / t.total:.0%}")
            for n, part in enumerate((t.dense, t.experts, t.kv, t.drafting))
        )
        drawn.append(
            chart.Bar(
                f"{several(sequences, 'sequence')}: {t.total / GB:.1f} GB, {step.seconds * 1e3:.3g} ms", parts
            )
        )
    title = f"What a device reads in a step, K = {plan.limits.drafts}, context {tokens(context)}"
    return Figure(
        title, chart.bars(title, drawn, 1.0), tuple(enumerate(names)), "Shares of each step's bytes."
    )


def _contexts(plan: Plan) -> tuple[int, ...]:
    longest = plan.config.max_position_embeddings
    doubling = [LEAST_CONTEXT << n for n in range(32) if LEAST_CONTEXT << n < longest]
    return (*(doubling or [max(1, longest // 2)]), longest)


def _context_axis(contexts: Sequence[int]) -> chart.LogAxis:
    low, high = contexts[0], contexts[-1]
    shown = contexts[:: -(-len(contexts) // 5)]
    return chart.LogAxis("context, tokens", tuple((float(c), tokens(c)) for c in shown), low, high)
