"""Held-out text is text that calibration has not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.errors import UsageError
from step35_trt.nano.corpus import held_out_text, training_documents
from step35_trt.quantize.recipe import Calibration, Recipe
from step35_trt.quantize.report.held_out import held_out, shared_windows
from step35_trt.quantize.run import CalibrationOptions, Job
from step35_trt.resources import NANO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BRIEF = Recipe.load("int4-awq").model_copy(
    update={"calibration": Calibration(method="awq", tokens=8192, sequence=512)}
)


def test_windows_that_occur_elsewhere() -> None:
    rng = np.random.default_rng(0)
    ids, others = rng.integers(0, 1000, (2, 100)), rng.integers(0, 1000, (3, 100))
    assert shared_windows(ids, others) == 0
    others[1, 20:60] = ids[0, 5:45]  # 40 tokens: 9 windows of 32 in 2 x 69
    assert shared_windows(ids, others) == pytest.approx(9 / 138)
    assert shared_windows(ids, ids) == 1


def test_own_text_is_apart_from_own_calibration() -> None:
    job = Job.of(NANO, BRIEF, CalibrationOptions())
    found = held_out(job, None)
    assert found is not None
    assert found.token_ids.shape == (16, 512)
    assert found.in_calibration is not None
    assert found.in_calibration < 0.01
    assert held_out(job, "none") is None


def test_the_calibration_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(document.text for document in training_documents())[:60_000], "utf-8")
    job = Job.of(NANO, BRIEF, CalibrationOptions(text=text))
    with pytest.raises(UsageError, match=r"% of the held-out text .* is in the calibration text"):
        held_out(job, str(text))
    other = tmp_path / "other.txt"
    other.write_text(held_out_text()[:60_000], "utf-8")
    found = held_out(job, str(other))
    assert found is not None
    assert found.name == "other.txt"


def test_what_cannot_be_judged_by(job_of: Callable[[str], Job], tmp_path: Path) -> None:
    assert held_out(job_of("fp8"), None) is None
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        held_out(job_of("fp8"), "own")
    nano = Job.of(NANO, Recipe.load("fp8"), CalibrationOptions())
    short = tmp_path / "short.txt"
    short.write_text("a b", "utf-8")
    with pytest.raises(UsageError, match="too few"):
        held_out(nano, str(short))
    with pytest.raises(UsageError, match="cannot be read"):
        held_out(nano, str(tmp_path / "nothing.txt"))
