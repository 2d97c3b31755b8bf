"""What a weight costs a plan: bytes of its codes, of the scales that blocks of them share, and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step35_trt.hardware import Arithmetic
    from step35_trt.plan.parameters import Parameter
    from step35_trt.quantize.recipe import Recipe


@dataclass(frozen=True)
class WeightCost:
    """What a matrix `[..., N, K]` costs in one form; how a checkpoint stores it is a `Coding`.

    Attributes:
        bits: Of one number.
        rows: Rows that share a scale; 0 for none at all.
        columns: Columns that share a scale; 0 for whole rows.
        scale_bytes: Of one scale.
        arithmetic: What its products are computed in.
    """

    bits: int
    arithmetic: Arithmetic
    rows: int = 0
    columns: int = 0
    scale_bytes: int = 0

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor, scales included."""
        size = math.prod(shape) * self.bits // 8
        if self.rows:
            *stack, n, k = shape
            blocks = math.ceil(n / self.rows) * math.ceil(k / (self.columns or k))
            size += math.prod(stack) * blocks * self.scale_bytes
        return size


# What each tensor of a model costs in an engine.
CostOf = Callable[["Parameter"], WeightCost]

FP32 = WeightCost(32, "fp32")
BF16 = WeightCost(16, "bf16")
FP8_BLOCKS = WeightCost(8, "fp8", 128, 128, 4)  # the official repository's (specification 4.2)
FP8_ROWS = WeightCost(8, "fp8", 1, 0, 4)
INT4_128 = WeightCost(4, "bf16", 1, 128, 2)
NVFP4 = WeightCost(4, "bf16", 1, 16, 1)


def experts_and_rest(experts: WeightCost, rest: WeightCost, modules: WeightCost = BF16) -> CostOf:
    """A format that tells only the routed experts and the MTP modules from the rest (specification 7.2)."""
    forms = {"routed experts": experts, "MTP body": modules, "MTP head": modules}
    return lambda parameter: forms.get(parameter.group, rest) if len(parameter.shape) > 1 else BF16


# Formats that the specification tabulates, for comparison with the engine's own.
PUBLISHED_FORMATS: dict[str, CostOf] = {
    "BF16": experts_and_rest(BF16, BF16),
    "FP8 experts in 128 x 128 blocks, BF16 rest (the official FP8 repository)": experts_and_rest(
        FP8_BLOCKS, BF16
    ),
    "INT4 experts in groups of 128, BF16 rest": experts_and_rest(INT4_128, BF16),
    "NVFP4 experts, BF16 rest": experts_and_rest(NVFP4, BF16),
    "INT4 in groups of 128 everywhere": experts_and_rest(INT4_128, INT4_128),
}


def of_recipe(recipe: Recipe, *, cpu: bool) -> CostOf:
    """What an engine of this recipe stores; a CPU's keeps in fp32 what is not quantised."""
    plain = FP32 if cpu else BF16

    def cost(parameter: Parameter) -> WeightCost:
        coding = recipe.coding(parameter.name, parameter.shape)
        if coding.kind in ("int4", "int8"):
            arithmetic: Arithmetic = "int8" if recipe.activations == "int8" else plain.arithmetic
            # ONNX Runtime's look-up takes the int8 embedding's scales in fp32.
            scale = 4 if cpu and coding.kind == "int8" else 2
            return WeightCost(4 if coding.kind == "int4" else 8, arithmetic, 1, coding.block, scale)
        if coding.kind == "fp8-blocks":
            return replace(FP8_BLOCKS, rows=coding.block, columns=coding.block)
        return {"fp32": FP32, "bf16": plain, "fp8-rows": FP8_ROWS}[coding.kind]

    return cost


def kv_value_bytes(recipe: Recipe) -> int:
    """Bytes of one number in a KV cache."""
    return {"fp32": 4, "bf16": 2, "fp8": 1}[recipe.kv_cache]
