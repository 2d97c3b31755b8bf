"""The page: whole in itself, well formed, escaped, and holding every figure of the tables."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from step35_trt.config import Step35Config
from step35_trt.engine import EngineSpec
from step35_trt.pages import chart
from step35_trt.plan import page, report
from step35_trt.plan.plan import Plan, make_plan
from step35_trt.resources import NANO
from tests.cpu.pages.structure import check_page

if TYPE_CHECKING:
    from collections.abc import Callable

PLANS: dict[str, Callable[[Step35Config], Plan]] = {
    "fits": lambda config: make_plan(config, EngineSpec.load("h100x8-fp8")),
    "does not fit": lambda config: make_plan(
        config, EngineSpec.load("dgx-spark-int4").model_copy(update={"max_sequences": 8})
    ),
    "nothing fits": lambda config: make_plan(
        config, EngineSpec.load("dgx-spark-int4").model_copy(update={"recipe": "bf16"})
    ),
    "small": lambda _: make_plan(Step35Config.load(NANO), EngineSpec.load("cpu-int4")),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_page(step35: Step35Config, case: str) -> None:
    plan = PLANS[case](step35)
    text = page.render(plan, "<b>here</b> & there")
    check_page(text)
    assert "&lt;b&gt;here&lt;/b&gt; &amp; there" in text
    assert "Nothing on this page was measured" in text
    for table in report.tables(plan):
        for row in table.rows:
            assert "".join(f"<td>{html.escape(cell)}</td>" for cell in row) in text
    for line in (*plan.alternatives, *report.refusals(plan), *plan.assumptions):
        assert html.escape(line, quote=False) in html.unescape(text).replace("&", "&amp;")
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        numbers = [float(v) for e in root.iter() for k, v in e.items() if k in ("x1", "x2", "cx", "width")]
        assert numbers
        assert all(-0.1 <= n <= chart.WIDTH + 0.1 for n in numbers)
