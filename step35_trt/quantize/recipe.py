"""A recipe: which precision each group of weights gets, how it is calibrated. Data, from `export/*.yaml`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from step35_trt.errors import UnsupportedError
from step35_trt.quantize.blocks import block_size
from step35_trt.quantize.formats import Coding, Kind
from step35_trt.resources import load_yaml


class Rule(BaseModel):
    """Weights whose checkpoint name matches the shell pattern `weights`; the first match of a recipe wins.

    `block` is the most input features that share a scale, or the edge of a square of FP8 weights that do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: str
    precision: Kind
    block: Literal[16, 32, 64, 128] = 128


class Calibration(BaseModel):
    """How a recipe looks for factors that make weights easier to quantise.

    `tokens` of text are run through the model, in pieces of `sequence` tokens. An expert that fewer than
    `min_expert_tokens` of them reach is quantised from its weights alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: Literal["awq"]
    tokens: int = Field(default=131072, gt=0)
    sequence: int = Field(default=2048, gt=0)
    min_expert_tokens: int = Field(default=64, ge=0)


class Recipe(BaseModel):
    """Precisions of a whole model.

    `activations` is what products with 8-bit floats (fp8) or with integers (int8) multiply with; absent, the
    codes are widened to the activations. `kv_cache` is the type of cached keys and values. `max_mean_kl` is
    how far, in nats, `verify` lets the predictions be from the checkpoint's. Without `calibration` weights
    are rounded as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    summary: str
    activations: Literal["fp32", "bf16", "fp8", "int8"] = "fp32"
    kv_cache: Literal["fp32", "bf16", "fp8"] = "bf16"
    max_mean_kl: float = Field(gt=0)
    calibration: Calibration | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)

    @classmethod
    def load(cls, name: str) -> Recipe:
        """A shipped recipe by name, or a YAML file by path."""
        return load_yaml(cls, "export", name)

    def rule(self, weight: str) -> Rule:
        """The rule for a weight.

        Raises:
            UnsupportedError: no pattern of the recipe matches.
        """
        for rule in self.rules:
            if fnmatchcase(weight, rule.weights):
                return rule
        raise UnsupportedError(f"recipe {self.name} has no rule for {weight}")

    def coding(self, weight: str, shape: tuple[int, ...]) -> Coding:
        """How a parameter of that shape is stored in a checkpoint; in bf16 where no block divides its width.

        Raises:
            UnsupportedError: no rule matches, or one quantises a vector.
        """
        rule = self.rule(weight)
        if rule.precision in ("fp32", "bf16"):
            return Coding(rule.precision)
        if len(shape) == 1:
            raise UnsupportedError(
                f"recipe {self.name} quantises {weight}, a vector",
                'Add a rule such as {weights: "*norm.weight", precision: bf16} before the one that matches.',
            )
        if rule.precision == "fp8-rows":
            return Coding(rule.precision)
        if rule.precision == "fp8-blocks":
            return Coding(rule.precision, rule.block)
        block = block_size(rule.block, shape[-1])
        return Coding(rule.precision, block) if block else Coding("bf16")
