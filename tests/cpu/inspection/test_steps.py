"""The table and the drawing of a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.hardware import Hardware
from step35_trt.inspection.steps import drawing, folded, rows, table

if TYPE_CHECKING:
    from step35_trt.program import SteppedProgram

SPARK = Hardware.load("dgx-spark")


def test_the_figures_are_the_costs(program: SteppedProgram) -> None:
    found = rows(program, SPARK, 1, 8192)
    assert len(found) == sum(len(part.steps) for part in program.programs)
    moved = sum(row.bytes for row in found)
    assert moved == sum(step.cost.bytes(1, 8192) for part in program.programs for step in part.steps)
    # The experts of 42 layers, 8 of 288 each: 64.9 MB a layer (plugins/sparse_moe/README.md).
    experts = [row.bytes for row in found if row.kind == "sparse_moe"]
    assert len(experts) == 42
    assert experts[0] == pytest.approx(64.9e6, rel=0.001)
    # One token waits for memory, four thousand for arithmetic.
    for row in found:
        assert row.seconds * SPARK.bandwidth == pytest.approx(row.bytes)
    large = max(rows(program, SPARK, 4096, 8192), key=lambda row: row.seconds)
    assert large.seconds == pytest.approx(large.flops / SPARK.operations["bf16"])


def test_the_table_has_each_distinct_step_once(program: SteppedProgram) -> None:
    found = rows(program, SPARK, 1, 8192)
    shown = table(found, SPARK, 1, 8192)
    *lines, total = shown.rows
    assert len(lines) == len({row.code for row in found}) < 40
    assert sum(int(line[2]) for line in lines) == int(total[2]) == len(found)
    assert float(total[3].replace(",", "")) == pytest.approx(sum(r.bytes for r in found) / 1e6, abs=0.01)


def test_the_drawing_folds_what_repeats(program: SteppedProgram) -> None:
    lines = drawing(rows(program, SPARK, 1, 8192), program)
    assert [line.split(":")[0] for line in lines] == ["decoder", "mtp-0", "mtp-1", "mtp-2"]
    assert all(len(line) < 200 for line in lines)
    assert ")x10" in lines[0]  # a full layer and three with windows, again and again


@given(st.lists(st.sampled_from(["S1", "A1", "A2", "M1"]), max_size=40))
def test_a_folded_sequence_unfolds(codes: list[str]) -> None:
    text, unfolded = folded(codes), list[str]()
    while text:
        if text.startswith("("):
            inner, text = text[1:].split(")x", 1)
            times, _, text = text.partition(" ")
            unfolded += inner.split() * int(times)
        else:
            part, _, text = text.partition(" ")
            name, _, times = part.partition("x")
            unfolded += [name] * int(times or 1)
    assert unfolded == codes
