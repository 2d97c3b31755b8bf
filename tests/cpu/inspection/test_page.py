"""The page of a bundle: whole in itself, with every step and every buffer where it belongs."""

from __future__ import annotations

import html
import json
import re
from itertools import combinations
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from step35_trt.build import build
from step35_trt.bundle import Bundle, Manifest
from step35_trt.config import Step35Config
from step35_trt.digests import FileRecord
from step35_trt.engine import EngineSpec
from step35_trt.hardware import Hardware
from step35_trt.inspection import contents, drawing, page, steps
from step35_trt.inspection.drawing import ARENA, ARENA_WIDE, HEAD, ROW, Styles
from step35_trt.inspection.figures import figures
from step35_trt.pages import chart
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import PUBLISHED
from tests.cpu.pages.structure import check_page

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.inspection.steps import Row
    from step35_trt.program import SteppedProgram

SPARK = Hardware.load("dgx-spark")


@pytest.fixture(scope="module")
def rows(program: SteppedProgram) -> list[Row]:
    return steps.rows(program, SPARK, 1, 8192)


def decoder(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.graph == "decoder"]


def elements(markup: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(markup).iter())


def place(rect: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right, bottom."""
    x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def test_buffers_lie_where_the_program_puts_them(program: SteppedProgram, rows: list[Row]) -> None:
    """Drawn over their lifetimes, and no two on top of each other."""
    part, own = program.decoder, decoder(rows)
    shown = range(40, 90)
    drawn = elements(drawing.steps("", own, part, shown, Styles.of(rows)))
    found = [e for e in drawn if e.tag == "rect" and float(e.get("x", "")) >= ARENA]
    places = {(e.find("title").text or "").split(":")[0]: place(e) for e in found}  # type: ignore[union-attr]
    alive = {b.name: b for b in part.buffers if b.first < shown.stop and b.last >= shown.start}
    assert places.keys() == alive.keys()
    for name, (left, top, right, bottom) in places.items():
        buffer = alive[name]
        room = drawing.room(part)
        assert left - ARENA == pytest.approx(min(1, buffer.offset / room) * ARENA_WIDE, abs=0.1)
        assert right - left == pytest.approx(max(1.0, buffer.row_bytes / room * ARENA_WIDE), abs=0.1)
        first, last = max(buffer.first, shown.start), min(buffer.last, shown.stop - 1)
        assert (top - HEAD) // ROW == first - shown.start
        assert (bottom - HEAD) // ROW == last - shown.start
    wide = [b for name, b in places.items() if alive[name].row_bytes > 1000]
    for a, b in combinations(wide, 2):
        assert a[2] <= b[0] + 0.1 or b[2] <= a[0] + 0.1 or a[3] <= b[1] or b[3] <= a[1]


def test_every_step_is_drawn_once(program: SteppedProgram, rows: list[Row]) -> None:
    drawn = [figure for figure in figures(rows, program) if "steps" in figure.title]
    assert [figure.title.split(":")[0] for figure in drawn] == ["decoder"] * 4 + ["mtp-0, mtp-1, mtp-2"]
    shown = [e for figure in drawn for e in elements(figure.drawing)]
    codes = [e.text for e in shown if "middle" in e.get("class", "").split()]
    assert codes == [row.code for row in decoder(rows)] + [r.code for r in rows if r.graph == "mtp-0"]
    assert all(-0.1 <= place(e)[0] <= place(e)[2] <= chart.WIDTH + 0.1 for e in shown if e.tag == "rect")


def test_what_steps_share_has_a_colour_of_its_own(rows: list[Row]) -> None:
    styles = Styles.of(rows)
    uses = {code: sum(row.code == code for row in rows) for code in styles.by_code}
    shared = [code for code, count in uses.items() if code[0] == "S" and count > 1]
    colours = [styles.by_code[code] for code in shared]
    assert len(shared) > 5
    assert len(set(colours)) == len(colours)
    others = {style for code, style in styles.by_code.items() if code not in shared}
    assert not others & set(colours)


def test_times_are_those_of_the_rows(program: SteppedProgram, rows: list[Row]) -> None:
    whole = figures(rows, program)[0]
    bars = [e for e in elements(whole.drawing) if e.tag == "rect"]
    own = decoder(rows)
    longest = sum(row.seconds for row in own)
    widths = [float(e.get("width", "")) for e in bars]
    first = len({row.code for row in own})
    full = sum(widths[:first])
    for code, width in zip(dict.fromkeys(row.code for row in own), widths, strict=False):
        seconds = sum(row.seconds for row in own if row.code == code)
        assert width == pytest.approx(seconds / longest * full, abs=0.2)
    names = [e.text for e in elements(whole.drawing) if e.tag == "text"]
    assert names[0] == f"decoder: {longest * 1e3:.2f} ms"


def test_the_page_of_a_gpu_bundle(program: SteppedProgram, tmp_path: Path) -> None:
    spec = EngineSpec.load("dgx-spark-int4")
    manifest = Manifest(
        schema_version=2,
        key="",
        versions={"triton": "<3>"},
        engine=spec,
        recipe=Recipe.load(spec.recipe),
        max_tokens=1000,
        notes=("<b>a note</b>",),
        files={"weights/a": FileRecord(size=3_000_000_000), "program.json": FileRecord(size=1000)},
        model={},
    )
    config = Step35Config.load(PUBLISHED)
    bundle = Bundle(directory=tmp_path, manifest=manifest, program=program, config=config)
    text = page.render(bundle, 4, 900)
    check_page(text)
    assert "4 tokens after 900 positions" in text
    assert "Nothing on this page was measured" in text
    assert "&lt;b&gt;a note&lt;/b&gt;" in text
    found = steps.rows(program, SPARK, 4, 900)
    for table in (steps.table(found, SPARK, 4, 900), contents.files(manifest)):
        for row in table.rows:
            assert "".join(f"<td>{html.escape(cell)}</td>" for cell in row) in text
    assert "3.00 GB" in text
    for line in steps.drawing(found, program):
        assert html.escape(line) in text


def test_the_command_writes_a_page(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a CPU bundle: no steps to draw, its graphs and files all the same."""
    from step35_trt import cli

    out = tmp_path / "bundle"
    build(checkpoints["small-window"], out, EngineSpec.load("cpu-int4"))
    call = ["step35-trt", "inspect", str(out), "--html", str(tmp_path / "page.html"), "--json", "--check"]
    monkeypatch.setattr("sys.argv", call)
    cli.main()
    assert json.loads(capsys.readouterr().out)["checked"]
    text = (tmp_path / "page.html").read_text()
    check_page(text)
    assert "decoder.onnx" in text
    assert not re.search("<svg", text)
