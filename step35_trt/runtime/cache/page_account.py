"""Which pages of a device are whose: what rank 0 counts, and tells the ranks whose lines have to change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.cache.kv_pages import PagePool, PageTable, reserve
from step35_trt.runtime.cache.kv_rows import CachedRows
from step35_trt.runtime.programs.orders import DECODER

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.cache.cache_extent import CacheLayout, TableSpec
    from step35_trt.runtime.session import Ids


@dataclass(frozen=True)
class Growth:
    """Rows that a step adds to a sequence.

    Attributes:
        slot: The sequence's.
        rows: What it has in the step's graph.
        tokens: How many come.
    """

    slot: int
    rows: CachedRows
    tokens: int


@dataclass
class PageAccount:
    """The pools of a layout."""

    layout: CacheLayout
    pools: dict[str, PagePool] = field(default_factory=dict)
    _specs: dict[str, TableSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        page = self.layout.extent.page
        self._specs = {spec.name: spec for spec in self.layout.tables}
        self.pools = {spec.name: PagePool(spec.pages, spec.pages, page) for spec in self.layout.tables}

    @property
    def free_rows(self) -> int:
        """Rows that sequences may still take together: pages of windows suffice for as many (`Extent`)."""
        page = self.layout.extent.page
        return min(self.pools[spec.name].free for spec in self.layout.tables if not spec.window) * page

    def rows(self, graph: int) -> CachedRows:
        """Those of a new sequence in a graph: none."""
        specs = [spec for spec in self.layout.tables if spec.graph == graph]
        tables = (PageTable(spec.name, self.pools[spec.name], spec.window) for spec in specs)
        return CachedRows(tuple(tables), ahead=graph - DECODER)

    def grow(self, growths: SequenceOf[Growth]) -> Ids:
        """Take the pages that steps need; what changes of the lines, as `StepOrder.moves` has it.

        Raises:
            DoesNotFitError: there are not enough, or too many tokens come at once; nothing has changed.
        """
        most = self.layout.extent.call
        for growth in growths:
            if growth.tokens > most:
                raise DoesNotFitError(f"a step of {growth.tokens} tokens, where {most} are the most")
        reserve([(table, g.rows.length + g.tokens) for g in growths for table in g.rows.tables])
        moves = [move for g in growths for table in g.rows.tables for move in self._moves(g.slot, table)]
        return np.array(moves, np.int64).reshape(-1, 2)

    def told(self, growths: Iterable[Growth]) -> None:
        """All ranks have had what `grow` gave."""
        for table in (table for g in growths for table in g.rows.tables):
            table.told = table.count

    def take_back(self, growths: Iterable[Growth]) -> None:
        """Nothing of what `grow` made room for has come."""
        for growth in growths:
            for table in growth.rows.tables:
                table.truncate(growth.rows.length)

    def _moves(self, slot: int, table: PageTable) -> list[tuple[int, int]]:
        spec, new = self._specs[table.name], range(max(table.told, table.first), table.count)
        line = spec.first + slot * spec.width
        return [(line + page % spec.width, int(table.entries[page])) for page in new]
