"""A machine's facts, one file each in `engines/hardware/`: what engine specs name and plans reckon with."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, field_validator

from step35_trt.resources import load_yaml

Arithmetic = Literal["fp32", "bf16", "fp8", "int8"]


class Link(BaseModel):
    """What joins the devices of one machine; bytes per second of one device in one direction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str
    bandwidth: PositiveFloat


class Hardware(BaseModel):
    """One device: a GPU, or a CPU with its memory.

    Attributes:
        name: As its maker calls it.
        compute_capability: Of a GPU, as `9.0`.
        memory: Bytes, as published.
        unified: The operating system lives in the same memory.
        bandwidth: Published bytes per second.
        reachable_bandwidth: Bytes per second that kernels have been seen to reach, where that is known.
        operations: Published dense operations per second, a multiply-add being two; fp32 at least.
        reserved: Bytes that a plan leaves alone, by what for. Assumptions, not facts.
        link: Absent where devices of one machine are not joined.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d$")
    memory: int = Field(gt=0)
    unified: bool
    bandwidth: PositiveFloat
    reachable_bandwidth: PositiveFloat | None = None
    operations: dict[Arithmetic, PositiveFloat]
    reserved: dict[str, NonNegativeInt] = Field(default_factory=dict)
    link: Link | None = None

    @field_validator("operations")
    @classmethod
    def _something_for_all(cls, value: dict[Arithmetic, float]) -> dict[Arithmetic, float]:
        if "fp32" not in value:
            raise ValueError("operations need a rate for fp32, which stands for kinds that are not there")
        return value

    def rate(self, kind: Arithmetic) -> float:
        """Operations per second; a machine without arithmetic of this kind does it in fp32."""
        return self.operations.get(kind, self.operations["fp32"])

    @classmethod
    def load(cls, name: str) -> Hardware:
        """Shipped hardware by name, or a YAML file by path."""
        return load_yaml(cls, "engines/hardware", name)
