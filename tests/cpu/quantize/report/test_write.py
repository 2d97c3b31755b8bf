"""The report beside the weights: complete, the same every time, and no hindrance to the checkpoint."""

from __future__ import annotations

import html
import re
import shutil
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import CorruptInputError
from step35_trt.pages import chart
from step35_trt.quantize.report import figures, page, tables, terminal, write
from step35_trt.quantize.report.data import QuantizationReport
from step35_trt.quantize.report.layers import stage_lines
from step35_trt.quantize.report.write import HTML, JSON, write_report
from step35_trt.quantize.run import REPORT
from tests.cpu.pages.structure import check_page
from tests.cpu.test_build import contents

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from step35_trt.quantize.report.held_out import HeldOut
    from step35_trt.quantize.run import Job

    Case = tuple[Job, Path, HeldOut | None, QuantizationReport]

CASES = [("cpu-int4", False), ("fp8", True), ("int4-awq", True)]


@pytest.fixture(scope="module", params=CASES, ids=[f"{r}-{'text' if t else 'weights'}" for r, t in CASES])
def case(
    request: pytest.FixtureRequest,
    converted: Callable[[str], tuple[Job, Path]],
    held: HeldOut,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    recipe, evaluated = request.param
    job, made = converted(recipe)
    out = tmp_path_factory.mktemp("report") / "checkpoint"
    shutil.copytree(made, out)
    text = held if evaluated else None
    return job, out, text, write_report(job, out, text)


def test_the_checkpoint_stays_what_it_was(case: Case, converted: Callable[[str], tuple[Job, Path]]) -> None:
    job, out, _, report = case
    before, after = contents(converted(job.recipe.name)[1]), contents(out)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {JSON, HTML}
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]  # no work is left
    assert Checkpoint.open(out).nbytes == sum(group.after for group in report.groups)
    assert not job.run(out)
    assert QuantizationReport.model_validate_json((out / JSON).read_bytes()) == report


def test_the_same_bytes_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, out, held, report = case
    copy = tmp_path / "checkpoint"
    shutil.copytree(out, copy)
    (copy / JSON).unlink()
    write_report(job, copy, held)
    assert {name: (copy / name).read_bytes() for name in (JSON, HTML)} == {
        name: (out / name).read_bytes() for name in (JSON, HTML)
    }
    monkeypatch.setattr(write, "_stages", None)  # what is there is not made again
    assert write_report(job, copy, held) == report


def test_an_interrupted_report_is_made_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out, held, _ = case
    copy = tmp_path / "checkpoint"
    shutil.copytree(out, copy)
    for name in (JSON, HTML):
        (copy / name).unlink()
    with monkeypatch.context() as broken:
        broken.setattr(page, "render", None)
        with pytest.raises(TypeError):
            write_report(job, copy, held)
    assert not (copy / JSON).exists()
    assert not job.run(copy)  # the checkpoint itself is whole
    write_report(job, copy, held)
    assert contents(copy) == contents(out)


def test_another_text_is_another_report(case: Case, held: HeldOut, tmp_path: Path) -> None:
    job, out, text, report = case
    copy = tmp_path / "checkpoint"
    shutil.copytree(out, copy)
    other = write_report(job, copy, None if text else held)
    assert other.key != report.key
    assert (other.quality is None) == (report.quality is not None)


def test_what_is_measured(case: Case) -> None:
    job, _, held, report = case
    calibrated = job.token_ids is not None
    assert report.calibrated == calibrated
    assert (report.quality is not None) == (held is not None)
    seen = job.token_ids if job.token_ids is not None else held.token_ids if held else None
    assert report.seen == (0 if seen is None else seen.size)
    for line, stage in zip(stage_lines(report), report.stages, strict=True):
        assert line.name == stage.name
        assert line.after == sum(matrix.bytes_after for matrix in stage.matrices)
        if stage.name == "embedding" and job.recipe.name == "fp8":
            assert line.weight_error == 0  # in bf16 on both sides
        else:
            assert 0 < line.weight_error < 0.3
        layer = job.source.config.layers[int(stage.name[6:])] if stage.name.startswith("layer") else None
        if seen is not None and layer:
            assert line.output_error is not None
            assert line.output_error > 0
            assert (line.flips is not None) == layer.moe
            assert (stage.coverage is not None) == layer.moe
        if stage.coverage:
            assert sum(stage.coverage.tokens) == report.seen * job.source.config.moe_top_k


def test_the_page(case: Case) -> None:
    _, out, _, report = case
    text = (out / HTML).read_text(encoding="utf-8")
    assert text == page.render(report)
    check_page(text)
    for table in tables.tables(report):
        for row in table.rows:
            assert "".join(f"<td>{html.escape(cell)}</td>" for cell in row) in text
    for line in (tables.heading(report), tables.verdict(report), *tables.basis(report)):
        assert html.escape(line) in text.replace("&#39;", "&#x27;")
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == len(figures.figures(report)) == (5 if report.seen else 2)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        numbers = [float(v) for e in root.iter() for k, v in e.items() if k in ("x1", "x2", "cx", "width")]
        assert numbers
        assert all(-0.1 <= n <= chart.WIDTH + 0.1 for n in numbers)


def test_every_expert_is_in_the_picture(case: Case) -> None:
    report = case[3]
    if not report.seen:
        pytest.skip("nothing was run")
    drawing = next(f for f in figures.figures(report) if f.title.startswith("How the text"))
    root = ElementTree.fromstring(drawing.drawing)
    room = chart.WIDTH - chart.LEFT - chart.RIGHT
    rows: dict[str, float] = {}
    for rect in root.iter("rect"):
        rows[rect.get("y", "")] = rows.get(rect.get("y", ""), 0) + float(rect.get("width", ""))
    assert len(rows) == sum(stage.coverage is not None for stage in report.stages)
    assert all(width == pytest.approx(room, abs=0.5) for width in rows.values())
    said = [int(title.text.split(", ")[1].split()[0]) for title in root.iter("title") if title.text]
    assert sum(said) == sum(len(stage.coverage.tokens) for stage in report.stages if stage.coverage)


def test_the_terminal_says_what_the_page_says(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    report = case[3]
    terminal.show(report)
    said = capsys.readouterr().out
    assert tables.heading(report) in said
    for table in tables.tables(report):
        assert table.title in said
    assert bool(tables.verdict(report)) == (report.quality is not None)
    assert tables.verdict(report) in said


def test_a_damaged_calibration_report_is_named(
    converted: Callable[[str], tuple[Job, Path]], tmp_path: Path
) -> None:
    job, made = converted("int4-awq")
    out = tmp_path / "checkpoint"
    shutil.copytree(made, out)
    (out / REPORT).write_text("[{}]", "utf-8")
    with pytest.raises(CorruptInputError, match=r"calibration\.json is missing or damaged"):
        write_report(job, out)
