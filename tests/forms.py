"""Forms of small models for tests of what is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.checkpoint import Checkpoint, expected_tensors
from step35_trt.interpret.session import InterpretedSession
from step35_trt.quantize.recipe import Recipe
from step35_trt.weight_forms import Forms

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.config import Step35Config

RECIPES = ("bf16", "fp8", "fp8-official", "int4-awq", "int4-experts-fp8")


def forms(config: Step35Config, recipe: str) -> Forms:
    """The forms of a shipped recipe."""
    return Forms.of(Recipe.load(recipe), expected_tensors(config))


def interpreted(directory: Path, recipe: str) -> InterpretedSession:
    """A checkpoint's programs, to be interpreted."""
    checkpoint = Checkpoint.open(directory)
    return InterpretedSession.of(checkpoint, forms(checkpoint.config, recipe))
