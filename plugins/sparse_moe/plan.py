"""Which path and tiling a step takes, and the scratch memory it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .geometry import most_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from step35_trt.kernels.tactics import Tactic

    from .geometry import Geometry

ALIGN = 256


@dataclass(frozen=True)
class Plan:
    """Which path and tiling a step takes, and its workspace.

    Attributes:
        tactics: Of each kernel that runs.
        buffers: Name, shape and type of each part of the workspace.
        most_tiles: Of the grouped path.
    """

    tactics: dict[str, Tactic]
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]]
    most_tiles: int

    @classmethod
    def of(cls, g: Geometry, entries: Sequence[Tactic], tokens: int, as_for: int) -> Plan:
        """The path for few tokens where a tactic of it admits `as_for` tokens, else the grouped one.

        Raises:
            UnsupportedError: no tactic admits the problem.
        """
        pairs, problem = tokens * g.slots, g.problem(as_for)
        hidden = ((pairs, g.inner), torch.bfloat16)
        if any(entry.kernel == "few_gate_up" and entry.admits(problem) for entry in entries):
            names = ["few_gate_up", "few_down"]
            return cls({name: g.tactic(entries, name, as_for) for name in names}, {"hidden": hidden}, 0)
        names = ["count_pairs", "place_pairs", "grouped_gate_up", "grouped_down", "combine"]
        tactics = {name: g.tactic(entries, name, as_for) for name in names}
        tile = int(tactics["grouped_gate_up"].constants["TOKENS"] or 0)
        if tactics["grouped_down"].constants["TOKENS"] != tile:
            raise ValueError("both grouped products have to take tiles of equally many tokens")
        most = most_tiles(g, tokens, tile)
        buffers = {
            "hidden": hidden,
            "partial": ((pairs, g.hidden), torch.float32),
            "counts": ((g.stack,), torch.int32),
            "order": ((pairs,), torch.int32),
            "tiles": ((1 + 3 * most,), torch.int32),
        }
        return cls(tactics, buffers, most)

    @property
    def few(self) -> bool:
        """Whether tokens go from ids to output without being sorted."""
        return "few_gate_up" in self.tactics

    @property
    def bytes(self) -> int:
        """Size of the workspace."""
        return sum(padded(shape, dtype) for shape, dtype in self.buffers.values())

    def views(self, workspace: Tensor) -> dict[str, Tensor]:
        """The buffers, one after the other in `workspace`."""
        found, start = {}, 0
        for name, (shape, dtype) in self.buffers.items():
            size = math.prod(shape) * dtype.itemsize
            found[name] = workspace[start : start + size].view(dtype).view(shape)
            start += padded(shape, dtype)
        return found


def padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a buffer; the next one starts aligned."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGN) * ALIGN
