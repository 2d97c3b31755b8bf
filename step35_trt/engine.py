"""An engine spec: what a bundle is built for. Data, read from `engines/*.yaml`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from step35_trt.hardware import Hardware
from step35_trt.resources import load_yaml

Target = Literal["cpu", "torch", "tensorrt-rtx", "tensorrt"]
Count = Annotated[int, Field(gt=0, lt=2**31)]


class Parallelism(BaseModel):
    """How the devices of an engine share each part of the model.

    `tensor` gives every device some heads, or some of a product's width; `expert` gives it whole experts;
    `replicated` gives it everything. What a tensor split would cut through a scale block is replicated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    attention: Literal["tensor", "replicated"] = "tensor"
    experts: Literal["expert", "tensor"] = "expert"
    mlp: Literal["tensor", "replicated"] = "tensor"
    head: Literal["tensor", "replicated"] = "tensor"


class EngineSpec(BaseModel):
    """Target, recipe and limits.

    `hardware` names a file of `engines/hardware/` and is kept whole, so that a bundle says what it was made
    for; an engine runs on `devices` of it. `max_tokens` bounds prompt and answer of a sequence together
    (absent: what the model was trained for), `max_sequences` those that run at once. `cache_tokens` is what
    all sequences, of any length, have together (absent: what `max_sequences` of the greatest length take);
    on a CPU nothing else bounds how many run. `prefill_chunk` is the most tokens run in one call;
    `draft_tokens` the most MTP modules used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    summary: str
    target: Target
    hardware: Hardware | None = None
    devices: Count = 1
    parallelism: Parallelism = Parallelism()
    recipe: str
    max_tokens: Count | None = None
    max_sequences: Count = 1
    cache_tokens: Count | None = None
    prefill_chunk: Count = 512
    draft_tokens: int = Field(default=3, ge=0)

    @field_validator("hardware", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return Hardware.load(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _joined(self) -> EngineSpec:
        if self.devices > 1 and (self.hardware is None or self.hardware.link is None):
            raise ValueError("several devices need hardware with a link between them")
        return self

    @classmethod
    def load(cls, name: str) -> EngineSpec:
        """A shipped engine by name, or a YAML file by path."""
        return load_yaml(cls, "engines", name)
