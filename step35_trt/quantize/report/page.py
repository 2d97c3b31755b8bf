"""The report as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from step35_trt.pages import page as pages
from step35_trt.quantize.report import tables
from step35_trt.quantize.report.figures import figures

if TYPE_CHECKING:
    from step35_trt.quantize.report.data import QuantizationReport


def render(report: QuantizationReport) -> str:
    """The page."""
    context = {
        "report": report,
        "heading": tables.heading(report),
        "verdict": tables.verdict(report),
        "within": tables.within(report),
        "figures": figures(report),
        "tables": tables.tables(report),
        "basis": tables.basis(report),
    }
    return pages.render(Path(__file__).with_name("page.html.jinja"), context)
