"""A sealed bundle finished by the TensorRT of the machine that it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from step35_trt.build import build_quantized
from step35_trt.bundle import Bundle
from step35_trt.engine import EngineSpec
from step35_trt.finish import finish
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.run import CalibrationOptions, Job
from step35_trt.resources import NANO
from step35_trt.runtime.gpu import capabilities

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8-official", "int4-awq"])
def test_nano_is_finished(tmp_path: Path, recipe: str) -> None:
    """Every form of weights as inputs of full TensorRT's engines, from which they can be loaded."""
    trt = pytest.importorskip("tensorrt")
    if capabilities()[:1] != ["9.0"]:
        pytest.skip("this is for Hopper")
    spec = EngineSpec.load("h200-int4").model_copy(update={"recipe": recipe})
    rounded = Recipe.load(recipe).model_copy(update={"calibration": None})
    build_quantized(Job.of(NANO, rounded, CalibrationOptions()), tmp_path / "bundle", spec)
    assert finish(tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    assert not opened.manifest.unfinished
    assert opened.damaged() == []
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    for path in sorted((tmp_path / "bundle" / "segments").glob("*.engine")):
        assert runtime.deserialize_cuda_engine(path.read_bytes()) is not None
    assert not finish(tmp_path / "bundle")
