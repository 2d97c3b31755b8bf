"""How ranks share a model: along which axis each weight is cut, and where partial results are put together.

A product whose weight is cut by output features gives every rank some of them; the product after it, cut by
input features, gives every rank a summand of the result. Between the two nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from step35_trt.weight_forms import Forms, Packed, WeightForm

if TYPE_CHECKING:
    from collections.abc import Mapping

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

    def share(self, forms: Forms) -> Forms:
        """The forms of what one rank holds."""

        def cut(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
            axis = self.axis(name)
            if axis is None:
                return shape
            at = {"rows": -2, "columns": -1, "experts": 0}[axis] % len(shape)
            return tuple(size // self.ranks if i == at else size for i, size in enumerate(shape))

        shapes = {name: cut(name, shape) for name, shape in forms.shapes.items()}
        return Forms(shapes, forms.coding, forms.activation)

    def cut(self, packed: Packed, name: str, form: WeightForm, rank: int) -> Packed:
        """A rank's share of a whole matrix; whole experts are not cut but held or not (`holds`).

        Args:
            packed: The matrix.
            name: Of its parameter.
            form: Of the whole matrix.
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

    def holds(self, name: str, expert: int, experts: int, rank: int) -> bool:
        """Whether a rank has one of `experts` experts, which are dealt in order."""
        return self.axis(name) != "experts" or expert // (experts // self.ranks) == rank


ALONE = Sharing()


def _part(weight: str) -> Part | None:
    if weight == "lm_head.weight" or weight.endswith(".shared_head.output.weight"):
        return "head"
    if not weight.endswith("_proj.weight") or weight.endswith(".eh_proj.weight"):
        return None
    module = weight.split(".")[3]
    parts: dict[str, Part] = {"self_attn": "attention", "mlp": "dense MLP", "share_expert": "shared expert"}
    return parts.get(module, "routed experts")
