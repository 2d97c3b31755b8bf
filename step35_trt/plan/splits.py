"""How the devices of an engine share the model, and which shares are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from step35_trt.engine import Parallelism
from step35_trt.plan.parameters import parameters
from step35_trt.plan.weight_cost import FP8_BLOCKS

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.plan.parameters import Parameter
    from step35_trt.plan.weight_cost import CostOf, WeightCost

Part = Literal[
    "attention", "routed experts", "routed experts in official FP8", "shared expert", "dense MLP", "head"
]
Way = Literal["tensor", "expert"]


@dataclass(frozen=True)
class Split:
    """Whether `ranks` devices can share a part that way; `refusal` says why not, or is empty."""

    part: Part
    way: Way
    ranks: int
    refusal: str


def attention_refusal(config: Step35Config, ranks: int) -> str:
    """Why heads cannot be dealt to the ranks (specification 8.6); empty where they can."""
    layers = (*config.layers, *config.mtp_layers)
    if uneven := sorted({layer.query_heads for layer in layers if layer.query_heads % ranks}):
        return f"{' and '.join(map(str, uneven))} query heads do not divide by {ranks}"
    heads = min(layer.kv_heads for layer in layers)
    if ranks > heads:
        return f"{ranks} ranks are more than the {heads} KV heads, which would have to be copied"
    return f"{heads} KV heads do not divide by {ranks}" if heads % ranks else ""


def width_refusal(width: int, ranks: int, up: WeightCost, down: WeightCost) -> str:
    """Why a SwiGLU's width cannot be cut: rows of gate and up, columns of down (specification 8.5)."""
    if width % ranks:
        return f"width {width} does not divide by {ranks}"
    share = width // ranks
    # A scale that spans whole rows of `down` holds for any part of them.
    block = math.lcm(max(1, up.rows), max(1, down.columns))
    if share % block:
        # Recipes cut blocks down to 16; the largest power of two that divides the share is what still fits.
        fitting = share & -share
        other = f", or use groups of {fitting}" if fitting >= 16 and up.rows <= 1 else ""
        return (
            f"{width} / {ranks} = {share} is no multiple of {block}, the width that shares a scale: "
            f"deal out whole experts{other}"
        )
    return ""


def expert_refusal(config: Step35Config, ranks: int) -> str:
    """Why experts cannot be dealt out whole."""
    experts = config.moe_num_experts
    return f"{experts} experts do not divide by {ranks}" if experts % ranks else ""


@dataclass(frozen=True)
class Shares:
    """What one device of an engine holds; the same for every device, so any of them is the fullest.

    Attributes:
        ranks: Devices.
        splits: The engine's own ways of sharing, refused or not.
    """

    ranks: int
    config: Step35Config
    parallelism: Parallelism
    splits: tuple[Split, ...]

    @classmethod
    def of(cls, config: Step35Config, parallelism: Parallelism, ranks: int, cost_of: CostOf) -> Shares:
        """The shares of an engine."""
        wanted: list[tuple[Part, str]] = [
            ("attention", parallelism.attention),
            ("routed experts", parallelism.experts),
            ("shared expert", parallelism.mlp),
            ("dense MLP", parallelism.mlp),
            ("head", parallelism.head),
        ]
        every = possible_splits(config, (ranks,), cost_of)
        chosen = [s for part, way in wanted for s in every if (s.part, s.way) == (part, way)]
        return cls(ranks, config, parallelism, tuple(chosen) if ranks > 1 else ())

    @classmethod
    def whole(cls, config: Step35Config) -> Shares:
        """A single device with everything."""
        return cls(1, config, Parallelism(), ())

    def of_parameter(self, parameter: Parameter) -> float:
        """The share of a parameter's bytes on one device, `1 / ranks` to 1."""
        part = _part(parameter)
        cut = any(split.part == part and not split.refusal for split in self.splits)
        return 1 / self.ranks if cut and len(parameter.shape) > 1 else 1.0

    @property
    def kv(self) -> float:
        """The share of every KV cache."""
        return 1 / self.ranks if any(s.part == "attention" and not s.refusal for s in self.splits) else 1.0

    @property
    def collectives(self) -> bool:
        """Whether every layer ends in sums over the devices."""
        return any(not split.refusal for split in self.splits)


def possible_splits(config: Step35Config, ranks: tuple[int, ...], cost_of: CostOf) -> tuple[Split, ...]:
    """Every way to share every part over each number of ranks, with the reason where it is refused."""
    forms: dict[str, dict[str, WeightCost]] = {}
    for parameter in parameters(config):
        if parameter.name.endswith("_proj.weight"):
            projection = parameter.name.split(".")[-2]
            forms.setdefault(parameter.group, {}).setdefault(projection, cost_of(parameter))
    found: list[Split] = []
    for count in ranks:
        found.append(Split("attention", "tensor", count, attention_refusal(config, count)))
        found.append(Split("routed experts", "expert", count, expert_refusal(config, count)))
        widths: list[tuple[Part, int]] = [
            ("routed experts", config.moe_intermediate_size),
            ("shared expert", config.share_expert_dim),
            ("dense MLP", config.intermediate_size),
        ]
        for part, width in widths:
            if form := forms.get(part):
                refusal = width_refusal(width, count, form["up_proj"], form["down_proj"])
                found.append(Split(part, "tensor", count, refusal))
                if part == "routed experts":
                    # What everybody tries first: the published blocks, whatever this engine stores.
                    refusal = width_refusal(width, count, FP8_BLOCKS, FP8_BLOCKS)
                    found.append(Split("routed experts in official FP8", "tensor", count, refusal))
        rows = config.vocab_size
        found.append(
            Split("head", "tensor", count, f"{rows} rows do not divide by {count}" if rows % count else "")
        )
    return tuple(found)


def _part(parameter: Parameter) -> Part | None:
    if parameter.group in ("head", "MTP head"):
        return "head"
    if ".self_attn." in parameter.name:
        return "attention"
    if ".mlp." in parameter.name:  # the modules' own too: as wide as the decoder's
        return "dense MLP"
    if parameter.group == "routed experts":
        return "routed experts"
    return "shared expert" if parameter.group == "shared expert" else None
