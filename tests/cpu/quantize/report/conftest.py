from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.report.held_out import HeldOut
from step35_trt.quantize.run import CalibrationOptions, Job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


OPTIONS = CalibrationOptions()


@pytest.fixture(scope="session")
def small(checkpoints: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(checkpoints["small-window"])


@pytest.fixture(scope="session")
def held() -> HeldOut:
    """Three sequences of 20 tokens: more than two windows of the small geometry."""
    return HeldOut("a test's", np.random.default_rng(11).integers(0, 97, (3, 20)), None)


@pytest.fixture(scope="session")
def job_of(small: Checkpoint) -> Callable[[str], Job]:
    """A job of a recipe; a calibrated one reads four sequences of 24 tokens."""

    def make(recipe: str) -> Job:
        job = Job.of(small.directory, Recipe.load(recipe).model_copy(update={"calibration": None}), OPTIONS)
        if Recipe.load(recipe).calibration is None:
            return job
        ids = np.random.default_rng(7).integers(0, 97, (4, 24))
        return replace(job, recipe=Recipe.load(recipe), token_ids=ids, key="calibrated")

    return make


@pytest.fixture(scope="session")
def converted(
    job_of: Callable[[str], Job], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Job, Path]]:
    """A recipe's job and a finished conversion, made once."""
    made: dict[str, tuple[Job, Path]] = {}

    def get(recipe: str) -> tuple[Job, Path]:
        if recipe not in made:
            job, out = job_of(recipe), tmp_path_factory.mktemp(recipe) / "checkpoint"
            job.run(out)
            made[recipe] = (job, out)
        return made[recipe]

    return get
