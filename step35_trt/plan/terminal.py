"""A plan on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt import console
from step35_trt.pages import table
from step35_trt.plan import report

if TYPE_CHECKING:
    from step35_trt.plan.plan import Plan


def show(plan: Plan) -> None:
    """Print every table, what was refused, and what the figures rest on."""
    summary = f"{plan.spec.name}: {plan.spec.summary}"
    for line in (summary, report.heading(plan), report.verdict(plan), report.building(plan)):
        if line:
            console.out.print(line, markup=False)
    table.show(report.tables(plan))
    for title, lines in (("refused splits", report.refusals(plan)), ("this rests on", plan.assumptions)):
        if lines:
            console.out.print(f"\n{title}", markup=False)
        for line in lines:
            console.out.print(f"- {line}", markup=False)
