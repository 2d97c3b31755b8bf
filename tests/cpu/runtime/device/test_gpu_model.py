"""The script for a whole model on a GPU, dry-run: every stage, small, in plain torch."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import gpu_model

pytestmark = pytest.mark.early


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    gpu_model.main([*arguments, "--device", "cpu"])
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert len(captured.err.splitlines()) == len(lines)
    return lines


def test_what_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    check, part = run(capsys, "check", "slice")
    assert check["equal_to_cpu"]
    assert check["graphs_equal_eager"]
    assert part["within_bf16"]
    assert 0 < part["median_error"] < 0.1


def test_what_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "decode", "drafts", "prefill", "--batches", "2", "--contexts", "140")
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_stage.setdefault(line["stage"], []).append(line)
    assert [(line["batch"], line["context"]) for line in by_stage["decode"]] == [(2, 140)]
    assert all(line["tokens_per_second"] > 0 for line in by_stage["decode"])
    assert all(0 < line["of_roofline"] < 1 for line in by_stage["decode"])
    assert [(line["batch"], line["drafts"]) for line in by_stage["drafts"]] == [
        (2, drafts) for drafts in range(4)
    ]
    assert all(line["round_ms"] > 0 and line["steps_ms"] > 0 for line in by_stage["drafts"])
    last = by_stage["drafts"][3]
    assert last["cost"] == pytest.approx(last["round_ms"] / by_stage["drafts"][0]["round_ms"])
    tokens = 1 + 0.85 + 0.85 * 0.75 + 0.85 * 0.75 * 0.65
    assert last["speed_up_at_0.85_0.75_0.65"] == pytest.approx(tokens / last["cost"])
    [prefill] = by_stage["prefill"]
    assert prefill["tokens_per_second"] == pytest.approx(96 / prefill["seconds"])


def test_the_time_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "decode", "--batches", "1", "--minutes", "0")
    assert lines[-1]["left_out"] == "time"
