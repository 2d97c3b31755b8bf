"""Keys and values of sequences in pages of a pool that they share, a pool for each layer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from step35_trt.kernels import plugin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FIRST_PAGES = 4
Lines = tuple[tuple[int, ...], ...]


@dataclass
class PagePool:
    """The pages of one layer; they double when all are taken.

    Attributes:
        keys: `[pages, G, page, d]`.
        values: Like `keys`.
        window: Keys that a query sees including its own; 0 is all.
        free: Pages that nobody holds.
    """

    keys: Tensor
    values: Tensor
    window: int
    free: list[int]
    _table: tuple[Lines, Tensor] | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, window: int) -> PagePool:
        """A pool of pages `shape`, `[G, page, d]`."""
        keys, values = (torch.empty(FIRST_PAGES, *shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, window, list(range(FIRST_PAGES)))

    @property
    def page(self) -> int:
        """Rows of a page."""
        return self.keys.shape[2]

    def open(self) -> PagedRows:
        """Rows of a new sequence. Their pages come back when nobody refers to them any more."""
        rows = PagedRows(self)
        weakref.finalize(rows, self.free.extend, rows.pages)
        return rows

    def take(self) -> int:
        """A page of the free ones."""
        if not self.free:
            count = len(self.keys)
            self.keys, self.values = (torch.cat([x, torch.empty_like(x)]) for x in (self.keys, self.values))
            self.free.extend(range(count, 2 * count))
        return self.free.pop()

    def cache(self, sequences: Sequence[PagedRows]) -> Any:
        """The pages of some sequences as kernels take them: `gated_attention.batch.PagedCache`.

        The table is as narrow as the longest sequence's pages allow: a ring where a window moves on.
        """
        width = max([1, *(len(rows.pages) for rows in sequences)])
        lines = tuple(rows.ring(width) for rows in sequences)
        if self._table is None or self._table[0] != lines:  # most steps take no new page
            self._table = lines, torch.from_numpy(np.array(lines, np.int32)).to(self.keys.device)
        ones = torch.ones(self.keys.shape[1], device=self.keys.device)
        module = plugin.load("gated_attention", "batch")
        return module.PagedCache(self.keys, self.values, self._table[1], ones, ones)


@dataclass(eq=False)
class PagedRows:
    """The rows of one sequence in a layer, `Rows` of the torch dialect.

    Attributes:
        pool: Whose pages they are.
        first: Position of the first page's first row, in pages.
        pages: Those that hold what is visible, in order of their positions.
    """

    pool: PagePool
    first: int = 0
    pages: list[int] = field(default_factory=list)

    def reserve(self, past: int, new: int) -> None:
        """Room for `new` rows after `past`; what no query from `past` on can see is given back.

        So rows of the latest call can be taken back afterwards, and no others where there is a window.

        Raises:
            ValueError: rows that queries from `past` on see were given back before.
        """
        needed = self._first_seen(past)
        if needed < self.first:
            raise ValueError(f"rows from {needed * self.pool.page} on were given back")
        for _ in range(min(needed - self.first, len(self.pages))):
            self.pool.free.append(self.pages.pop(0))
        self.first = needed
        for _ in range(-(-(past + new) // self.pool.page) - self.first - len(self.pages)):
            self.pages.append(self.pool.take())

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows; those after them are overwritten by what comes next.

        Raises:
            ValueError: rows that later queries see were given back before.
        """
        if self._first_seen(length) < self.first:
            raise ValueError(f"no more than the latest call can be taken back, not all after {length} rows")
        keep = max(0, -(-length // self.pool.page) - self.first)
        while len(self.pages) > keep:
            self.pool.free.append(self.pages.pop())

    def ring(self, width: int) -> tuple[int, ...]:
        """Each page at its position modulo `width`; entries in between may be any page."""
        line = [0] * width
        for place, page in enumerate(self.pages, self.first):
            line[place % width] = page
        return tuple(line)

    def _first_seen(self, position: int) -> int:
        """The page with the first row that a query at or after `position` sees."""
        window = self.pool.window
        return max(0, position - window + 1) // self.pool.page if window else 0
