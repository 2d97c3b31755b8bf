"""What `config.json` says of how its weights are stored: `quantization_config`; `quant_config` writes it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Fp8Blocks(BaseModel):
    """`quantization_config` of the official FP8 repository: e4m3 experts with square block scales."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    quant_method: Literal["fp8"]
    weight_block_size: tuple[int, int] = (128, 128)
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"

    @property
    def block(self) -> int:
        """Edge of a block."""
        return self.weight_block_size[0]

    @field_validator("weight_block_size")
    @classmethod
    def _square(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] != value[1] or value[0] <= 0:
            raise ValueError(f"blocks of {value[0]} x {value[1]} are not square")
        return value


class ModelOptFormat(BaseModel):
    """`quantization_config` as ModelOpt writes it. The tensors say how they lie (`quantize.formats`)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    quant_method: Literal["modelopt"]
    quant_algo: str


QuantizationConfig = Annotated[Fp8Blocks | ModelOptFormat, Field(discriminator="quant_method")]
