"""A bundle as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from step35_trt.inspection import contents, steps
from step35_trt.inspection.figures import figures
from step35_trt.pages import page as pages
from step35_trt.program import SteppedProgram

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle
    from step35_trt.pages.page import Figure


def render(bundle: Bundle, tokens: int, context: int) -> str:
    """The page: of a GPU bundle with its program drawn, in a call of `tokens` after `context` positions."""
    manifest, program = bundle.manifest, bundle.program
    tables, lines = [contents.files(manifest)], list[str]()
    drawn: tuple[Figure, ...] = ()
    if isinstance(program, SteppedProgram):
        assert manifest.engine.hardware is not None
        found = steps.rows(program, manifest.engine.hardware, tokens, context)
        drawn = figures(found, program)
        lines = steps.drawing(found, program)
        tables.insert(0, steps.table(found, manifest.engine.hardware, tokens, context))
    else:
        tables.insert(0, contents.graphs(program))
    given = {
        "manifest": manifest,
        "summary": contents.summary(bundle),
        "call": steps.call(tokens, context) if drawn else "",
        "lines": lines,
        "figures": drawn,
        "tables": tables,
    }
    return pages.render(Path(__file__).with_name("page.html.jinja"), given)
