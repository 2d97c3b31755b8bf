"""The report on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt import console
from step35_trt.pages import table
from step35_trt.quantize.report import tables

if TYPE_CHECKING:
    from step35_trt.quantize.report.data import QuantizationReport


def show(report: QuantizationReport) -> None:
    """Print what the page says, but for the drawings."""
    for line in (tables.heading(report), tables.verdict(report)):
        if line:
            console.out.print(line, markup=False)
    table.show(tables.tables(report))
    console.out.print("\nthis rests on", markup=False)
    for line in tables.basis(report):
        console.out.print(f"- {line}", markup=False)
