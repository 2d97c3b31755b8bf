"""Keys and values on a device, in pages that all sequences share, and the lines that say whose they are.

A step's order names sequences by slots. Each slot has a line of page numbers on the device, which a recorded
step looks up there, so the same recording serves whichever sequences come. Lines stay where they are: a step
is told only the entries that have changed, which for decoding is one a page's rows, often none, where whole
tables would be most of what is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from step35_trt.kernels import plugin
from step35_trt.runtime.cache.cache_extent import CacheLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from step35_trt.config import LayerSpec
    from step35_trt.runtime.cache.cache_extent import Extent, TableSpec
    from step35_trt.runtime.session import Ids


@dataclass(frozen=True)
class DevicePages:
    """The pages of every layer.

    Attributes:
        layout: Which layers share pages, and how many there are.
        keys: By layer, `[pages, G, page, d]`.
        values: Likewise.
        entries: int32, the lines of all tables as `TableSpec.first` says.
        ones: By layer, `[G]` fp32: what stored numbers are multiplied by.
    """

    layout: CacheLayout
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    entries: Tensor
    ones: dict[int, Tensor]

    @classmethod
    def of(
        cls,
        graphs: Sequence[Sequence[LayerSpec]],
        extent: Extent,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DevicePages:
        """Pages for the decoder's layers and each module's, not cleared.

        Until lines are changed each slot has pages of its own, as far as there are so many.
        """
        layout = CacheLayout.of(graphs, extent)
        lines = [torch.arange(extent.slots * spec.width) % spec.pages for spec in layout.tables]
        found = cls(layout, {}, {}, torch.cat(lines).to(device, torch.int32), {})
        for layer in (layer for layers in graphs for layer in layers):
            shape = layout.table(layer.index).pages, layer.kv_heads, extent.page, layer.head_dim
            for kept in (found.keys, found.values):
                kept[layer.index] = torch.empty(shape, dtype=dtype, device=device)
            found.ones[layer.index] = torch.ones(layer.kv_heads, device=device)
        return found

    @property
    def extent(self) -> Extent:
        """How much there is."""
        return self.layout.extent

    def move(self, moves: Ids) -> None:
        """Change entries: `moves` `[m, 2]` has each with the page that it names from now on."""
        if len(moves):
            # From pageable memory: read when this returns, without waiting for steps that still run.
            sent = torch.from_numpy(moves).to(self.entries.device, non_blocking=True)
            places, pages = sent.unbind(1)
            self.entries.index_copy_(0, places, pages.int())

    def lines(self, spec: TableSpec, slots: Tensor) -> Tensor:
        """The lines `[n, width]` of some slots `[n]` in a table, looked up on the device."""
        end = spec.first + self.extent.slots * spec.width
        return self.entries[spec.first : end].view(-1, spec.width).index_select(0, slots)

    def cache(self, layer: int, lines: Tensor) -> Any:
        """`gated_attention.batch.PagedCache` of a layer for the slots of `lines`."""
        module, ones = plugin.load("gated_attention", "batch"), self.ones[layer]
        return module.PagedCache(self.keys[layer], self.values[layer], lines, ones, ones)


@dataclass(frozen=True)
class DeviceBatch:
    """`gated_attention.batch.Batch` of which only the device knows the values: its numbers may change.

    Every sequence has 1 to `queries` new tokens. What the host must know, sizes of launches, are bounds.

    Attributes:
        tokens: Packed tokens.
        sequences: How many.
        queries: The most new tokens of one.
        longest: The most rows of one, new ones included.
        starts: `[sequences + 1]` int32.
        offsets: `[sequences]` int32, rows before the step.
        token_sequence: `[tokens]` int32.
    """

    tokens: int
    sequences: int
    queries: int
    longest: int
    starts: Tensor
    offsets: Tensor
    token_sequence: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """A bound for each sequence."""
        return (self.queries,) * self.sequences

    def decoded(self, queries: int) -> tuple[int, int]:
        """See `Batch`: bounds, which launch programs that find nothing to do and leave."""
        assert self.queries <= queries
        return self.queries, self.longest

    def check(self, cache: Any, geometry: Any) -> None:
        """See `Batch`.

        Raises:
            ValueError: the table does not span what the bounds allow.
        """
        rows = cache.table.shape[1] * geometry.page
        needed = min(self.longest, geometry.window + self.queries - 1) if geometry.window else self.longest
        if needed > rows:
            raise ValueError(f"sequences of {self.longest} rows need {needed}, the table spans {rows}")
