"""The keys and values of all sequences in one graph, in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.cache.kv_pages import PAGE_ROWS, PagePool, PageTable, idle_pages, pages_for
from step35_trt.runtime.cache.kv_rows import CachedRows

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.program import CacheSpec
    from step35_trt.runtime.session import Floats


@dataclass(frozen=True)
class GraphCaches:
    """See the module's text.

    Attributes:
        ahead: Tokens that the graph's rows look ahead (see `CachedRows`).
        windows: Of each table of pages; 0 where it has none.
        pools: Each table's pages.
        pages: `[pages, kv_heads, page, head_dim]` by `key.` or `value.` and the layer.
    """

    ahead: int
    windows: dict[str, int]
    pools: dict[str, PagePool]
    pages: dict[str, Floats]

    @classmethod
    def of(cls, specs: SequenceOf[CacheSpec], ahead: int, rows: int) -> GraphCaches:
        """Room for `rows` rows of all sequences together.

        Raises:
            DoesNotFitError: so many do not fit into the address space.
        """
        windows, every = {spec.table: spec.window for spec in specs}, pages_for(rows)
        pools = {
            table: PagePool(every, idle_pages(window) if window else every)
            for table, window in windows.items()
        }
        try:
            # Memory is not taken before a page is first written.
            pages = {
                f"{name}.{spec.layer}": np.empty((every, spec.kv_heads, PAGE_ROWS, spec.head_dim), np.float32)
                for spec in specs
                for name in ("key", "value")
            }
        except MemoryError:
            raise DoesNotFitError(
                f"caches of {rows} rows do not fit", "Build with fewer cache_tokens."
            ) from None
        return cls(ahead, windows, pools, pages)

    def rows(self) -> CachedRows:
        """Those of a new sequence: none."""
        tables = (PageTable(table, self.pools[table], window) for table, window in self.windows.items())
        return CachedRows(tuple(tables), self.ahead)
