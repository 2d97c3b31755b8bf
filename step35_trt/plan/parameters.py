"""Every parameter of the model by group, from `config.json` alone (specification section 5)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from step35_trt.checkpoint import expected_tensors

if TYPE_CHECKING:
    from step35_trt.config import Step35Config

Group = Literal[
    "full attention",
    "window attention",
    "dense MLP",
    "routed experts",
    "shared expert",
    "router",
    "norms",
    "embedding",
    "head",
    "MTP body",
    "MTP head",
]
MTP_GROUPS: tuple[Group, ...] = ("MTP body", "MTP head")
OUTSIDE_LAYERS: dict[str, Group] = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norms",
    "lm_head.weight": "head",
}
INSIDE_LAYERS: dict[str, Group] = {"mlp": "dense MLP", "share_expert": "shared expert"}


@dataclass(frozen=True)
class Parameter:
    """One tensor.

    Attributes:
        name: As the checkpoint spells it.
        shape: `[out, in]`, `[experts, out, in]` or `[features]`.
        group: What part of the model it belongs to.
        layer: Index of its layer; None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    group: Group
    layer: int | None

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GroupCount:
    """Parameters of a group: `units` layers (or modules, or tables) and all of them together."""

    group: Group
    units: int
    parameters: int


@functools.lru_cache(maxsize=8)
def parameters(config: Step35Config) -> tuple[Parameter, ...]:
    """The decoder's tensors in order, then those of the MTP modules."""
    found = []
    for name, shape in expected_tensors(config).items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        found.append(Parameter(name, shape, _group(config, name, layer), layer))
    return tuple(found)


def count_groups(everything: tuple[Parameter, ...]) -> tuple[GroupCount, ...]:
    """Parameters by group, in the model's order."""
    totals: dict[Group, int] = {}
    units: dict[Group, set[int | None]] = {}
    for parameter in everything:
        totals[parameter.group] = totals.get(parameter.group, 0) + parameter.count
        units.setdefault(parameter.group, set()).add(parameter.layer)
    order = [group for group in get_args(Group) if group in totals]
    return tuple(GroupCount(group, len(units[group] - {None}) or 1, totals[group]) for group in order)


def _group(config: Step35Config, name: str, layer: int | None) -> Group:
    if layer is None:
        return OUTSIDE_LAYERS[name]
    if layer >= config.num_hidden_layers:
        return "MTP head" if name.endswith("shared_head.output.weight") else "MTP body"
    part = name.split(".")[3]
    if part == "self_attn":
        return "full attention" if config.layer_types[layer] == "full_attention" else "window attention"
    if part == "moe":
        return "routed experts" if "_proj." in name else "router"
    return INSIDE_LAYERS.get(part, "norms")
