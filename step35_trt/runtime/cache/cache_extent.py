"""How many pages of keys and values a device has, and how long the lines are that name a sequence's."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from step35_trt.kernels import plugin
from step35_trt.runtime.cache.kv_pages import idle_pages, pages_for
from step35_trt.runtime.session import MOST_REJECTED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from step35_trt.config import LayerSpec


@cache
def page_rows() -> int:
    """Rows of a page that GPU kernels are compiled for."""
    rows: int = plugin.load("gated_attention", "geometry").PAGE
    return rows


@cache
def round_tokens() -> int:
    """Tokens that a round adds to a sequence in one graph at most: those of two decoding steps."""
    queries: int = plugin.load("gated_attention", "geometry").QUERIES
    return 2 * queries


@dataclass(frozen=True)
class Extent:
    """How much caches hold.

    Attributes:
        slots: Sequences that may be open at once.
        rows: The most of each.
        call: Tokens of a step at most.
        cached: Rows of all sequences together in layers without a window; None for all that the slots allow.
        page: Rows of a page.
    """

    slots: int
    rows: int
    call: int
    cached: int | None = None
    page: int = field(default_factory=page_rows)

    def pages(self, window: int) -> int:
        """Pages of a pool. A window's always suffices for as many rows as there are without one.

        Between two steps a sequence holds rows that its window and what may be taken back make visible; a
        step adds `call` to all together, a round some to each. Beside those there is room for what ended
        sequences leave.
        """
        longest = self.slots * pages_for(self.rows, self.page)
        if not window:
            return longest if self.cached is None else pages_for(self.cached, self.page)
        # n consecutive rows lie in (n - 2) // page + 2 pages at most; here summed over all slots.
        held = self.slots * (_kept(window) - 2) + max(self.call, self.slots * round_tokens())
        return min(2 * self.slots + held // self.page, longest) + idle_pages(window, self.page)

    def width(self, window: int) -> int:
        """Entries of a slot's line: a page for every row, or for those of a window that are held at once."""
        longest = pages_for(self.rows, self.page)
        if not window:
            return longest
        return min((_kept(window) + self.call - 2) // self.page + 2, longest)

    def nbytes(self, layers: Iterable[LayerSpec], itemsize: int) -> int:
        """Bytes of all layers' keys and values."""
        numbers = (self.pages(layer.window) * layer.kv_heads * layer.head_dim for layer in layers)
        return 2 * itemsize * self.page * sum(numbers)


@dataclass(frozen=True)
class TableSpec:
    """What layers of a graph share: a pool of pages, and a line of them for each slot.

    Position p of the sequence in slot s lies in the page that entry
    `first + s * width + p // page_rows % width` names.

    Attributes:
        graph: Whose rows they are: `DECODER`, or k + 1 for MTP module k.
        window: Of the layers; 0 where they have none.
        layers: Their indices.
        pages: Of the pool.
        width: Entries of a line.
        first: The first entry of slot 0.
    """

    graph: int
    window: int
    layers: tuple[int, ...]
    pages: int
    width: int
    first: int

    @property
    def name(self) -> str:
        """As a `PageTable`'s."""
        return f"{self.graph}.{self.window}"


@dataclass(frozen=True)
class CacheLayout:
    """The tables of a model's graphs.

    Attributes:
        extent: How much they hold.
        tables: The decoder's, then each module's.
    """

    extent: Extent
    tables: tuple[TableSpec, ...]

    @classmethod
    def of(cls, graphs: Sequence[Sequence[LayerSpec]], extent: Extent) -> CacheLayout:
        """The layout for the decoder's layers and each module's."""
        found: list[TableSpec] = []
        first = 0
        for graph, layers in enumerate(graphs):
            for window in dict.fromkeys(layer.window for layer in layers):
                alike = tuple(layer.index for layer in layers if layer.window == window)
                width = extent.width(window)
                found.append(TableSpec(graph, window, alike, extent.pages(window), width, first))
                first += extent.slots * width
        return cls(extent, tuple(found))

    def table(self, layer: int) -> TableSpec:
        """The one that a layer's pages are found by."""
        return next(spec for spec in self.tables if layer in spec.layers)


def _kept(window: int) -> int:
    """Rows of a sequence that a later call may see, whatever of the latest one is taken back."""
    return window - 1 + MOST_REJECTED
