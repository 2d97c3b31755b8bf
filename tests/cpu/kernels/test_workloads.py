"""What the benchmark runs: its checks can fail, and it runs in the interpreter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import kernels
from step35_trt.kernels.checks import check
from step35_trt.kernels.workloads import Workload, small, workloads

ROWS = torch.arange(12.0).reshape(3, 4)
GOOD = Workload(
    plugin="toy",
    name="rows",
    problem={},
    bound="bandwidth",
    run=lambda _: ROWS.clone(),
    definition=ROWS[:2].clone,
    plain=lambda: ROWS,
    alone=lambda entries: (ROWS[:1], ROWS[:1]),
    tolerance=1e-3,
    bytes=1,
    operations=1,
)


def test_a_right_workload_passes() -> None:
    assert check(GOOD, ()).passed


def test_each_failure_is_seen() -> None:
    calls = iter(range(99))
    wrong = check(replace(GOOD, definition=lambda: ROWS[:2] * 1.01), ())
    assert (wrong.passed, wrong.repeats, wrong.independent) == (False, True, True)
    assert not check(replace(GOOD, definition=lambda: ROWS[:2] * float("nan")), ()).passed
    unsteady = check(replace(GOOD, run=lambda entries: ROWS + 1e-5 * next(calls)), ())
    assert (unsteady.passed, unsteady.repeats) == (False, False)
    social = check(replace(GOOD, alone=lambda entries: (ROWS[:1], ROWS[:1] + 1e-6)), ())
    assert (social.passed, social.independent) == (False, False)


def test_the_workloads_are_those_the_figures_are_quoted_for() -> None:
    names = [make().name for make in workloads(small(), torch.device("cpu"))]
    assert len(set(names)) == len(names)
    for part in (
        "decode full",
        "decode window",
        "prefill full",
        "prefill window",
        "int4",
        "fp8_block",
        "bf16",
    ):
        assert any(part in name for name in names)


@pytest.mark.parametrize("only", ["full, fp8, 1 x 1", "experts int4, 1 tokens"])
def test_smoke(only: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["kernels", "--smoke", "--json", "--only", only])
    kernels.main()
    [result] = json.loads(capsys.readouterr().out)["results"]
    assert 0 < result["error"] < result["tolerance"]
    assert result["repeats"]
    assert result["independent"]
