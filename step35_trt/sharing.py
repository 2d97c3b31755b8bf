"""How ranks share a model: along which axis each weight is cut, and where partial results are put together.

A product whose weight is cut by output features gives every rank some of them; the product after it, cut by
input features, gives every rank a summand of the result. Between the two nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from step35_trt.errors import UnsupportedError
from step35_trt.weight_forms import Forms, Packed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from step35_trt.config import Step35Config

# As `plan.splits` names them, which decides what an engine may cut.
Part = Literal["attention", "routed experts", "shared expert", "dense MLP", "head"]
Way = Literal["tensor", "expert"]
# Output features, input features, or whole experts.
Axis = Literal["rows", "columns", "experts"]

AXES: dict[str, Axis] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj", "gate_proj", "up_proj"), "rows"),
    **dict.fromkeys(("o_proj", "down_proj"), "columns"),
}


@dataclass(frozen=True)
class Sharing:
    """`ranks` devices of which each holds a share of the parts in `ways`, and all of every other."""

    ranks: int = 1
    ways: Mapping[Part, Way] = field(default_factory=dict)

    def axis(self, weight: str) -> Axis | None:
        """Along which axis a weight is cut; None where every rank holds all of it."""
        part = _part(weight)
        if part is None or part not in self.ways:
            return None
        if part == "head":
            return "rows"
        return "experts" if self.ways[part] == "expert" else AXES[weight.split(".")[-2]]

    def check(self, forms: Forms) -> None:
        """See that every cut falls between values that share a scale.

        Raises:
            UnsupportedError: one does not; the weight is named.
        """
        for name in forms.shapes:
            axis, form = self.axis(name), forms(name)
            if axis not in ("rows", "columns"):
                continue
            at = 0 if axis == "rows" else 1
            size, edge = form.shape[at], form.block[at] or 1
            # One scale for the whole width holds for any part of it; a byte of two codes is not cut either.
            whole = 2 if form.dtype == "int4" and at == 1 else 1
            unit = whole if edge >= size else edge
            if size % self.ranks or size // self.ranks % unit:
                raise UnsupportedError(
                    f"{name} cannot be cut for {self.ranks} devices: {size} {axis}, {unit} of which belong "
                    "together",
                    "Let every device hold that part whole: parallelism in the engine's file.",
                )

    def config(self, config: Step35Config) -> Step35Config:
        """The model as one rank's kernels see it: the heads, experts and widths that it holds.

        Raises:
            UnsupportedError: a rank would hold fewer experts than a token takes.
        """
        changes: dict[str, object] = {}
        if "attention" in self.ways:
            other = config.attention_other_setting
            narrow = {
                "num_attention_heads": other.num_attention_heads // self.ranks,
                "num_attention_groups": other.num_attention_groups // self.ranks,
            }
            changes |= {
                "num_attention_heads": config.num_attention_heads // self.ranks,
                "num_attention_groups": config.num_attention_groups // self.ranks,
                "attention_other_setting": other.model_copy(update=narrow),
            }
        if way := self.ways.get("routed experts"):
            name = "moe_num_experts" if way == "expert" else "moe_intermediate_size"
            changes[name] = getattr(config, name) // self.ranks
        own = config.model_copy(update=changes)
        if own.moe_num_experts < own.moe_top_k:
            raise UnsupportedError(
                f"each of {self.ranks} devices would hold {own.moe_num_experts} experts, and a token takes "
                f"{own.moe_top_k}",
                "Take fewer devices.",
            )
        return own

    def share(self, forms: Forms) -> Forms:
        """The forms of what one rank holds."""
        if not self.ways:
            return forms

        def cut(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
            axis = self.axis(name)
            if axis is None:
                return shape
            at = {"rows": -2, "columns": -1, "experts": 0}[axis] % len(shape)
            return tuple(size // self.ranks if i == at else size for i, size in enumerate(shape))

        shapes = {name: cut(name, shape) for name, shape in forms.shapes.items()}
        return Forms(shapes, forms.coding, forms.activation)

    def cut(self, packed: Packed, name: str, rank: int) -> Packed:
        """A rank's share of a whole matrix; whole experts are not cut but held or not (`holds`).

        Args:
            packed: The matrix.
            name: Of its parameter.
            rank: From 0.
        """
        axis = self.axis(name)
        if axis not in ("rows", "columns"):
            return packed
        at = 0 if axis == "rows" else 1
        values = np.split(packed.values, self.ranks, at)[rank]
        scales = packed.scales
        # A scale that holds for a whole row holds for any part of it.
        if scales is not None and at < scales.ndim and scales.shape[at] > 1:
            scales = np.split(scales, self.ranks, at)[rank]
        return Packed(np.ascontiguousarray(values), scales)

    def held(self, name: str, experts: int, rank: int) -> range:
        """Which of `experts` experts, dealt in order, a rank has."""
        share = experts // self.ranks
        return range(rank * share, (rank + 1) * share) if self.axis(name) == "experts" else range(experts)

    def holds(self, name: str, expert: int, experts: int, rank: int) -> bool:
        """Whether a rank has one of `experts` experts."""
        return expert in self.held(name, experts, rank)


ALONE = Sharing()


def _part(weight: str) -> Part | None:
    if weight == "lm_head.weight" or weight.endswith(".shared_head.output.weight"):
        return "head"
    if not weight.endswith("_proj.weight") or weight.endswith(".eh_proj.weight"):
        return None
    module = weight.split(".")[3]
    parts: dict[str, Part] = {"self_attn": "attention", "mlp": "dense MLP", "share_expert": "shared expert"}
    return parts.get(module, "routed experts")
