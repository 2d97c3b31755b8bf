"""A recipe: which precision each group of weights gets. Data, read from `export/*.yaml`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from step35_trt.errors import UnsupportedError
from step35_trt.resources import load_yaml

Precision = Literal["fp32", "int8", "int4"]


class Rule(BaseModel):
    """Weights whose checkpoint name matches the shell pattern `weights`; the first match of a recipe wins.

    `block` is the most input features that share a scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: str
    precision: Precision
    block: Literal[16, 32, 64, 128] = 128


class Recipe(BaseModel):
    """Precisions of a whole model.

    `activations` is what quantised products multiply with; `max_mean_kl` how far, in nats, `verify` lets the
    predictions be from the checkpoint's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    summary: str
    activations: Literal["fp32", "int8"] = "fp32"
    max_mean_kl: float = Field(gt=0)
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
