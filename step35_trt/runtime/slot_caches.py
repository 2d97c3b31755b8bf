"""Keys and values on a device where nothing moves: each slot has pages of its own in every layer.

A recorded step finds them again, whichever sequences it is for: a slot's line of page numbers is looked up on
the device. What that costs against pages shared out on demand is memory for sequences that stay short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from step35_trt.kernels import plugin
from step35_trt.runtime.session import MOST_REJECTED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from step35_trt.config import LayerSpec


@dataclass(frozen=True)
class Extent:
    """How much slots hold.

    Attributes:
        slots: Sequences that may be open at once.
        rows: The most of each.
        call: Tokens that a call adds to one at most.
    """

    slots: int
    rows: int
    call: int

    def pages(self, layer: LayerSpec) -> int:
        """Pages of a slot. A window's are a ring that also keeps what a call adds and what it takes back."""
        needed = self.rows
        if layer.window:
            needed = min(self.rows, layer.window + self.call + MOST_REJECTED)
        return -(-needed // _page())

    def nbytes(self, layers: Iterable[LayerSpec], itemsize: int) -> int:
        """Bytes of all layers' keys and values."""
        rows = (
            self.slots * self.pages(layer) * _page() * layer.kv_heads * layer.head_dim for layer in layers
        )
        return 2 * itemsize * sum(rows)


@dataclass(frozen=True)
class SlotCaches:
    """The pages of every layer.

    Attributes:
        extent: How much there is.
        keys: By layer, `[slots * pages, G, page, d]`.
        values: Likewise.
        lines: By layer, `[slots, pages]` int32: a slot's pages in order; layers alike share one.
        ones: By layer, `[G]` fp32: what stored numbers are multiplied by.
    """

    extent: Extent
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    lines: dict[int, Tensor]
    ones: dict[int, Tensor]

    @classmethod
    def of(
        cls, layers: Iterable[LayerSpec], extent: Extent, dtype: torch.dtype, device: torch.device
    ) -> SlotCaches:
        """Room for every slot, not cleared."""
        page = _page()
        found = cls(extent, {}, {}, {}, {})
        shared: dict[int, Tensor] = {}
        for layer in layers:
            count = extent.pages(layer)
            if count not in shared:
                numbers = torch.arange(extent.slots * count, dtype=torch.int32, device=device)
                shared[count] = numbers.view(extent.slots, count)
            shape = extent.slots * count, layer.kv_heads, page, layer.head_dim
            for kept in (found.keys, found.values):
                kept[layer.index] = torch.empty(shape, dtype=dtype, device=device)
            found.lines[layer.index] = shared[count]
            found.ones[layer.index] = torch.ones(layer.kv_heads, device=device)
        return found

    def tables(self, slots: Tensor) -> dict[int, Tensor]:
        """The lines of some slots `[n]` int32 by number of pages, looked up on the device."""
        distinct = {line.shape[1]: line for line in self.lines.values()}
        return {width: line.index_select(0, slots) for width, line in distinct.items()}

    def cache(self, layer: int, tables: dict[int, Tensor]) -> Any:
        """`gated_attention.batch.PagedCache` of a layer for the slots of `tables`."""
        table = tables[self.lines[layer].shape[1]]
        module, ones = plugin.load("gated_attention", "batch"), self.ones[layer]
        return module.PagedCache(self.keys[layer], self.values[layer], table, ones, ones)


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


def _page() -> int:
    page: int = plugin.load("gated_attention", "geometry").PAGE
    return page
