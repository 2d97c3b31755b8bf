"""All compilations that a model's experts need on a GPU, from its tactics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.kernels.variant import KernelVariant

from .geometry import BITS, KERNELS, PLUGIN, Geometry, constants

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.config import Step35Config
    from step35_trt.kernels.tactics import Tactic, Tactics

    from .pack import Format

_PRODUCTS = ("few_gate_up", "few_down", "grouped_gate_up", "grouped_down")
_GATE_UP = ("gate", "gate_scales", "up", "up_scales", "hidden", "limit_bits", "shared_limit_bits")
_TILES = ("order", "tiles")
_DOWN = ("mix", "down", "down_scales")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "route_logits": ("logits", "bias", "ids", "mix", "first"),
    "route_selection": ("selection", "weights", "ids", "mix", "first"),
    "count_pairs": ("ids", "counts", "pairs"),
    "place_pairs": ("ids", "counts", *_TILES, "pairs", "most_tiles"),
    "few_gate_up": ("x", "ids", *_GATE_UP),
    "few_down": ("hidden", "ids", *_DOWN, "y"),
    "grouped_gate_up": ("x", *_TILES, *_GATE_UP, "most_tiles"),
    "grouped_down": ("hidden", *_TILES, *_DOWN, "partial", "most_tiles"),
    "combine": ("partial", "ids", "y"),
}
"""Each kernel's arguments that are no constants, in order."""

VALUES: Mapping[Format, str] = {
    "bf16": "*bf16",
    "fp8_channel": "*fp8e4nv",
    "fp8_block": "*fp8e4nv",
    "int4": "*i16",
}
SCALES: Mapping[Format, str] = {
    "bf16": "*bf16",
    "fp8_channel": "*fp32",
    "fp8_block": "*fp32",
    "int4": "*i32",
}
_TYPES = {
    **dict.fromkeys(("x", "hidden", "y"), "*bf16"),
    **dict.fromkeys(("logits", "bias", "selection", "weights", "mix", "partial"), "*fp32"),
    **dict.fromkeys(("ids", "counts", "order", "tiles"), "*i32"),
    **dict.fromkeys(("first", "pairs", "most_tiles", "limit_bits", "shared_limit_bits"), "i32"),
}


def variants(
    config: Step35Config, target: int, tactics: Tactics, *, shared: bool = False, held: int | None = None
) -> list[KernelVariant]:
    """Every kernel in every weight format and tiling; names do not repeat.

    Args:
        config: The model.
        target: Compute capability; tactics are the target's already, so nothing else depends on it.
        tactics: Of the target.
        shared: Whether the shared expert is the last of the stacks, which takes one as wide as the others.
        held: See `Geometry`.
    """
    formats: list[Format] = list(BITS)
    found: dict[str, KernelVariant] = {}
    for kind in formats:
        geometry = Geometry(
            config.moe_num_experts,
            config.moe_top_k,
            config.hidden_size,
            config.moe_intermediate_size,
            config.moe_router_scaling_factor,
            kind,
            shared,
            held,
        )
        for tactic in tactics.entries:
            if _concerns(tactic, geometry):
                for made in _of(tactic, geometry, tactics.entries):
                    found.setdefault(made.name, made)
    return list(found.values())


def name(kernel: str, geometry: Geometry, tactic: Tactic, tokens_tile: int = 0) -> str:
    """What the variant is called that `launch` would run for this tactic."""
    parts = [kernel]
    if kernel in _PRODUCTS:
        least, most = tactic.when.get("tokens", (0, 0))
        parts += [geometry.format, f"{least}-{most}"]
    if tokens_tile:
        parts.append(f"by{tokens_tile}")
    return ".".join(parts)


def _concerns(tactic: Tactic, geometry: Geometry) -> bool:
    """Whether some number of tokens would choose it."""
    least, _ = tactic.when.get("tokens", (1, 1))
    return tactic.admits(geometry.problem(least))


def _of(tactic: Tactic, geometry: Geometry, entries: Sequence[Tactic]) -> list[KernelVariant]:
    tiles = [0]
    if tactic.kernel == "place_pairs":
        grouped = [e for e in entries if e.kernel == "grouped_gate_up" and _concerns(e, geometry)]
        tiles = sorted({int(entry.constants["TOKENS"] or 0) for entry in grouped})
    return [_variant(tactic, geometry, tile) for tile in tiles]


def _variant(tactic: Tactic, geometry: Geometry, tokens_tile: int) -> KernelVariant:
    kernel = tactic.kernel
    types = dict(_TYPES)
    for weight in ("gate", "up", "down"):
        types |= {weight: VALUES[geometry.format], f"{weight}_scales": SCALES[geometry.format]}
    if kernel == "route_selection":
        types["weights"] = "*fp32"
    signature = {argument: types[argument] for argument in ARGUMENTS[kernel]}
    return KernelVariant(
        plugin=PLUGIN,
        module=KERNELS[kernel],
        function=kernel,
        name=name(kernel, geometry, tactic, tokens_tile),
        signature=signature,
        constants=constants(kernel, geometry, tactic, tokens_tile=tokens_tile, interpreted=False),
        aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*")),
        num_warps=tactic.num_warps,
        num_stages=tactic.num_stages,
    )
