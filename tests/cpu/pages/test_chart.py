"""Drawings: values are where they belong."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from step35_trt.pages import chart


def test_lines_are_where_their_values_are() -> None:
    axis = chart.LogAxis("", ((1.0, "1"), (100.0, "100")), 1, 100)
    points = tuple(chart.Point(v, v, v < 50, "") for v in (1.0, 10.0, 100.0))
    root = ElementTree.fromstring(chart.lines("", axis, axis, [chart.Line("", points)]))
    dots = [(float(c.get("cx", "")), float(c.get("cy", "")), c.get("class")) for c in root.iter("circle")]
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    top, bottom = chart.TOP, chart.HEIGHT - chart.BOTTOM
    assert dots == [
        (left, bottom, "s0"),
        ((left + right) / 2, (top + bottom) / 2, "s0"),
        (right, top, "s0 thin"),
    ]


def test_bars_are_as_long_as_their_values() -> None:
    bar = chart.Bar("", ((0, 1.0, ""), (3, 3.0, "")))
    root = ElementTree.fromstring(chart.bars("", [bar], 8.0, chart.Level("", 8.0)))
    first, second = root.iter("rect")
    assert float(second.get("width", "")) == pytest.approx(3 * float(first.get("width", "")), abs=0.2)
    assert float(second.get("x", "")) == pytest.approx(
        float(first.get("x", "")) + float(first.get("width", "")), abs=0.2
    )
    (limit,) = (line for line in root.iter("line") if line.get("class") == "limit")
    whole = float(limit.get("x1", "")) - float(first.get("x", ""))
    assert whole == pytest.approx(8 * float(first.get("width", "")), abs=0.5)


@pytest.mark.parametrize("values", [(0.003, 0.004), (1.0, 1.0), (7.0, 90000.0), (999.0, 1001.0)])
def test_an_axis_holds_its_values(values: tuple[float, float]) -> None:
    axis = chart.LogAxis.over("", values, str)
    assert all(-1e-6 <= axis.place(v) <= 1 + 1e-6 for v in values)
    assert all(-1e-6 <= axis.place(v) <= 1 + 1e-6 for v, _ in axis.marks)
    assert len(axis.marks) >= 2


@pytest.mark.parametrize("most", [0.0, 1e-4, 0.0339, 0.5, 1.0, 7.0, 9999.0])
def test_a_linear_axis_begins_at_zero(most: float) -> None:
    axis = chart.LinearAxis.from_zero("", most, str)
    assert axis.place(0) == 0
    assert axis.place(axis.high) == 1
    assert axis.high / 2 <= axis.place(most) * axis.high + (not most) <= axis.high
    assert 3 <= len(axis.marks) <= 6
    assert [value for value, _ in axis.marks][-1] == pytest.approx(axis.high)


def test_strips_are_as_long_as_their_values() -> None:
    rows = [chart.Bar(str(n), ((0, 1.0, ""), (9, 3.0, "a note"))) for n in range(5)]
    root = ElementTree.fromstring(chart.strips("", rows, 4.0))
    parts = [(rect.get("class"), float(rect.get("width", ""))) for rect in root.iter("rect")]
    room = chart.WIDTH - chart.LEFT - chart.RIGHT
    assert len(parts) == 10
    assert all(w == pytest.approx(room * (0.25 if c == "f0" else 0.75), abs=0.1) for c, w in parts)
    places = {rect.get("x") for rect in root.iter("rect")}
    assert places == {f"{chart.LEFT:.1f}", f"{chart.LEFT + room / 4:.1f}"}
    assert [text.text for text in root.iter("text")] == ["0", "2", "4"]
