"""An engine spec: what a bundle is built for. Data, read from `engines/*.yaml`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from step35_trt.resources import load_yaml


class EngineSpec(BaseModel):
    """Target, recipe and limits.

    `max_tokens` bounds prompt and answer together (absent: what the model was trained for);
    `prefill_chunk` is the most tokens run in one call; `draft_tokens` the most MTP modules used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    summary: str
    target: Literal["cpu"]
    recipe: str
    max_tokens: int | None = Field(default=None, gt=0)
    prefill_chunk: int = Field(default=512, gt=0)
    draft_tokens: int = Field(default=3, ge=0)

    @classmethod
    def load(cls, name: str) -> EngineSpec:
        """A shipped engine by name, or a YAML file by path."""
        return load_yaml(cls, "engines", name)
