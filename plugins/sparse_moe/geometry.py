"""What is fixed when kernels are compiled: the model's numbers, the weights' format, and the tiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.kernels.tactics import choose

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.kernels.tactics import Tactic
    from step35_trt.kernels.variant import Constant

    from .pack import Format

PLUGIN = "sparse_moe"
BITS: Mapping[Format, int] = {"bf16": 16, "fp8_channel": 8, "fp8_block": 8, "int4": 4}

KERNELS: Mapping[str, str] = {
    "route_logits": "routing",
    "route_selection": "routing",
    "count_pairs": "sorting",
    "place_pairs": "sorting",
    "few_gate_up": "few_tokens",
    "few_down": "few_tokens",
    "grouped_gate_up": "grouped",
    "grouped_down": "grouped",
    "combine": "grouped",
}
"""Each kernel and the file that holds it."""


@dataclass(frozen=True)
class Geometry:
    """A layer's experts.

    Attributes:
        experts: Routed experts.
        top_k: How many of them a token takes.
        hidden: Features of a token, D.
        inner: Features inside an expert.
        scale: What the mixing weights, whose sum is 1, are multiplied by.
        format: How weights are stored (`pack.py`).
        shared: Whether the stacks hold, last, an expert that every token takes with weight 1.
        held: How many of the routed experts the stacks hold, where other devices hold the others.
    """

    experts: int
    top_k: int
    hidden: int
    inner: int
    scale: float
    format: Format
    shared: bool = False
    held: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top {self.top_k} of {self.experts} experts")
        if self.dealt and (self.shared or not 1 <= self.here < self.experts):
            raise ValueError(f"{self.here} of {self.experts} experts{' and the shared one' * self.shared}")

    @property
    def here(self) -> int:
        """Routed experts that the stacks hold."""
        return self.experts if self.held is None else self.held

    @property
    def dealt(self) -> bool:
        """Whether other devices hold some of the experts: ids of theirs are -1 here."""
        return self.here != self.experts

    @property
    def slots(self) -> int:
        """Experts a token takes, the shared one included."""
        return self.top_k + self.shared

    @property
    def stack(self) -> int:
        """Matrices in a stack."""
        return self.here + self.shared

    def tactic(self, entries: Sequence[Tactic], kernel: str, tokens: int) -> Tactic:
        """The tiling of `kernel` for a step of `tokens` tokens.

        Raises:
            UnsupportedError: no entry admits it.
        """
        return choose(entries, kernel, self.problem(tokens))

    def problem(self, tokens: int) -> dict[str, int]:
        """The fields that a tactic's `when` may bound."""
        bits = BITS[self.format]
        return {
            "tokens": tokens,
            "bits": bits,
            "hidden": self.hidden,
            "inner": self.inner,
            "top_k": self.top_k,
        }


def constants(
    kernel: str, geometry: Geometry, tactic: Tactic, *, tokens_tile: int = 0, interpreted: bool
) -> dict[str, Constant]:
    """All `tl.constexpr` arguments of `kernel`: those of `tactic` and those that follow from the model.

    Args:
        kernel: A key of `KERNELS`.
        geometry: The layer.
        tactic: The kernel's tiling.
        tokens_tile: For `place_pairs`, the tile of tokens that the products take.
        interpreted: Whether Triton's interpreter runs the kernel.
    """
    g = geometry
    model: dict[str, Constant] = {
        "D": g.hidden,
        "INNER": g.inner,
        "FORMAT": g.format,
        "INTERPRETED": interpreted,
    }
    product = {**model, "STAGES": tactic.num_stages}
    slots: dict[str, Constant] = {"TOP_K": g.top_k, "SLOTS": g.slots}
    route: dict[str, Constant] = {
        "EXPERTS": g.experts,
        "HERE": g.here,
        "LANES": _power(g.experts),
        "SCALE": g.scale,
        **slots,
    }
    own: Mapping[str, dict[str, Constant]] = {
        "route_logits": route,
        "route_selection": route,
        "count_pairs": {},
        "place_pairs": {"ALL": g.stack, "LANES": _power(g.stack), "TOKENS": tokens_tile},
        "few_gate_up": {**product, **slots, "DEALT": g.dealt},
        "few_down": {**product, **slots, "SPLITS": _power(g.top_k), "DEALT": g.dealt},
        "grouped_gate_up": {**product, "EXPERTS": g.experts, "SLOTS": g.slots},
        "grouped_down": product,
        "combine": {"D": g.hidden, "SLOTS": g.slots, "DEALT": g.dealt},
    }
    return {**own[kernel], **tactic.constants}


def most_tiles(geometry: Geometry, tokens: int, tokens_tile: int) -> int:
    """Tiles that `tokens` tokens can need however they are routed; what the grid is made for."""
    pairs = tokens * geometry.slots
    return min(pairs, geometry.stack + pairs // tokens_tile)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
