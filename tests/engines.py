"""Sessions over freshly built bundles and exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.build import build, export_onnx
from step35_trt.checkpoint import Checkpoint
from step35_trt.engine import EngineSpec
from step35_trt.program import Program
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime.load import open_bundle
from tests.exports import ExportedSession

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.dialects.onnx import Spelling
    from step35_trt.runtime.session import Session


def engine(checkpoint: Path, out: Path, name: str = "cpu-fp32") -> Session:
    """The session of a bundle, built when it is not there."""
    build(checkpoint, out, EngineSpec.load(name))
    return open_bundle(out)


def exported(checkpoint: Path, out: Path, spelling: Spelling, recipe: str) -> ExportedSession:
    """A session over an export."""
    export_onnx(checkpoint, out, spelling, Recipe.load(recipe))
    program = Program.model_validate_json((out / "program.json").read_text())
    return ExportedSession(out, Checkpoint.open(checkpoint).config, program)
