"""`step35-trt quantize` says what it did."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from step35_trt import cli

if TYPE_CHECKING:
    from pathlib import Path


def test_quantize_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "checkpoint"
    command = ["step35-trt", "quantize", "nano", "-o", str(out), "--recipe", "cpu-int4"]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    said = capsys.readouterr()
    assert "Recipe cpu-int4: 8.98 MB became" in said.out
    assert "layer-8" in said.out
    assert "is ready" in said.err
    assert "quantization.html has this with drawings" in said.err
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    cli.main()
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((out / "reports/quantization.json").read_text("utf-8"))
    assert "there already" in said.err


def test_a_text_that_is_not_there_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "checkpoint"
    monkeypatch.setattr(
        sys, "argv", ["x", "quantize", "nano", "-o", str(out), "--recipe", "fp8", "--evaluate", "no.txt"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "no.txt cannot be read" in capsys.readouterr().err
    assert not out.exists()
