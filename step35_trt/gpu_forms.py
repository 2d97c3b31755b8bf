"""The forms that a GPU's engines and kernels take weights in, by recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from step35_trt.checkpoint import EXPERT_PROJECTIONS, expected_tensors
from step35_trt.errors import UnsupportedError
from step35_trt.quantize.formats import Coding
from step35_trt.weight_forms import Forms, Packed, packed_weight, same_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.program import ExpertFormat
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.weight_forms import WeightForm

GROUP = 128  # values of a row that share a scale where kernels take int4
FORMATS: dict[Coding, ExpertFormat] = {
    Coding("int4", GROUP): "int4",
    Coding("fp8-rows"): "fp8_channel",
    Coding("fp8-blocks", 128): "fp8_block",
}


def expert_format(codings: Sequence[Coding]) -> ExpertFormat:
    """The kernels' format of experts whose projections are so coded; bf16 where they have none for it."""
    found = {FORMATS.get(coding, "bf16") for coding in codings}
    return found.pop() if len(found) == 1 else "bf16"


def kernel_format(form: WeightForm) -> ExpertFormat | None:
    """The kernels' name for a matrix's codes; None where they have none."""
    if form.dtype == "int4" and form.block == (1, GROUP) and form.shape[1] % GROUP == 0:
        return "int4"
    if form.dtype != "float8_e4m3fn":
        return None
    if len(form.scale_shape) == 1:
        return "fp8_channel"
    return "fp8_block" if form.block == (GROUP, GROUP) else None


def deployed_forms(recipe: Recipe, config: Step35Config) -> tuple[Forms, dict[str, ExpertFormat]]:
    """The forms of a recipe, and the format of each layer's experts.

    Raises:
        UnsupportedError: the recipe computes in fp32, for which there are no GPU kernels.
    """
    if recipe.activations == "fp32":
        raise UnsupportedError(
            f"recipe {recipe.name} computes in fp32, and the GPU kernels take bf16 activations",
            "Name a recipe such as bf16 or int4-awq in the engine.",
        )
    shapes = expected_tensors(config)
    experts: dict[str, ExpertFormat] = {}
    for layer in config.layers:
        if layer.moe:
            prefix = f"{layer.prefix}.moe"
            names = [f"{prefix}.{part}.weight" for part in EXPERT_PROJECTIONS]
            experts[prefix] = expert_format([recipe.coding(name, shapes[name]) for name in names])

    base = Forms.of(recipe, shapes)

    def coding(name: str) -> Coding:
        plain = len(shapes[name]) == 3 and experts[experts_of(name)] == "bf16"
        return Coding("bf16") if plain else base.coding(name)

    return replace(base, coding=coding), experts


def not_quantised(checkpoint: Checkpoint, forms: Forms) -> str | None:
    """A weight that the checkpoint has not in the codes of its form, if there is one."""
    for name in forms.shapes:
        form = forms(name)
        if form.scale_dtype is not None and not same_codes(checkpoint.codings[name], form):
            return name
    return None


def as_kernels_scale(checkpoint: Checkpoint) -> Callable[[str, WeightForm, int | None], Packed]:
    """A checkpoint's weights in their forms; kernels multiply experts by scales as they are stored."""

    def read(name: str, form: WeightForm, expert: int | None) -> Packed:
        exact = expert is not None and form.dtype == "int4"
        return packed_weight(
            checkpoint, name, replace(form, scale_dtype="float32") if exact else form, expert
        )

    return read


def experts_of(name: str) -> str:
    """The prefix of a stacked parameter: `P.moe` of `P.moe.up_proj.weight`."""
    return name.rsplit(".", 2)[0]
