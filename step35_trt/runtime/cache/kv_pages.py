"""Pages of keys and values: who holds which, which can be found again, which is evicted."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import DoesNotFitError

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.session import Ids

PAGE_ROWS = (
    64  # what attention does at once (`plugins/gated_attention/attend.h`, KEYS): no block is in two pages
)
IDLE_WINDOWS = 8  # of layers with a window: those of ended sequences, kept for ones that begin alike
NONE = -1
FIRST_ENTRIES = 4


def pages_for(rows: int, page_rows: int = PAGE_ROWS) -> int:
    """Pages that so many rows take."""
    return -(-rows // page_rows)


def idle_pages(window: int, page_rows: int = PAGE_ROWS) -> int:
    """Pages that are kept of a layer with a window when nobody holds them any more."""
    return IDLE_WINDOWS * (pages_for(window, page_rows) + 1)  # a window may begin within a page


@dataclass
class PagePool:
    """The pages 0 .. limit - 1 of the layers that share a table; sequences hold them together or alone.

    A page that was registered under a key can be found by it. When nobody holds it any more it stays as long
    as there is room; what was given back longest ago goes first. What a window has passed counts by itself:
    of those pages and of all others, the kind of which more are kept gives way, so that one long prompt does
    not push out where other sequences ended, with which their next turns begin. Pages are in no memory before
    they are first used: with `most_idle` pages kept, one of them is taken rather than a new one.
    """

    limit: int
    most_idle: int
    page_rows: int = PAGE_ROWS
    held: int = 0
    _fresh: int = 0  # pages from here on were never used
    _empty: list[int] = field(default_factory=list)
    _holders: dict[int, int] = field(default_factory=dict)
    _pages: dict[bytes, int] = field(default_factory=dict)
    _keys: dict[int, bytes] = field(default_factory=dict)
    # Registered and held by nobody: what ended sequences left, and what windows have passed.
    _left: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _passed: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return self.limit - self.held

    @property
    def _idle(self) -> int:
        return len(self._left) + len(self._passed)

    def take(self) -> int:
        """A page that nobody holds; there must be one `free`."""
        if self._empty:
            page = self._empty.pop()
        elif self._fresh < self.limit and (self._idle < self.most_idle or not self._idle):
            page = self._fresh
            self._fresh += 1
        else:
            assert self._idle, "every page is held"
            more = self._passed if len(self._passed) >= len(self._left) else self._left
            page, _ = more.popitem(last=False)
            del self._pages[self._keys.pop(page)]
        self._holders[page] = 1
        self.held += 1
        return page

    def hold(self, page: int) -> None:
        """Hold a page that was found, beside whoever holds it."""
        for idle in (self._left, self._passed):
            if page in idle:
                del idle[page]
                self.held += 1
        self._holders[page] = self._holders.get(page, 0) + 1

    def release(self, page: int, *, passed: bool = False) -> None:
        """Hold a page no longer.

        Args:
            page: It is held.
            passed: Whether its holder goes on without it.
        """
        self._holders[page] -= 1
        if self._holders[page]:
            return
        del self._holders[page]
        self.held -= 1
        if page in self._keys:
            (self._passed if passed else self._left)[page] = None
        else:
            self._empty.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Make a page findable that will not change any more; the first page of a key stays."""
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def find(self, key: bytes) -> int | None:
        """The page that was registered under `key`, if it is still there."""
        return self._pages.get(key)


@dataclass
class PageTable:
    """A sequence's pages of one pool: entry p is where the rows of its p-th page lie.

    Attributes:
        name: As `CacheSpec.table`.
        pool: Where pages come from.
        window: Of the layers; pages before it are given back. 0 where they have none.
        first: The first page that is held.
        count: Entries from `first` to `count` - 1 are held.
        told: Entries before this one are as they were when somebody last copied them elsewhere.
        entries: The pages' places in the pool.
    """

    name: str
    pool: PagePool
    window: int
    first: int = 0
    count: int = 0
    told: int = 0
    entries: Ids = field(default_factory=lambda: np.full(FIRST_ENTRIES, NONE, np.int64))

    def missing(self, rows: int) -> int:
        """Pages to take before the sequence can have `rows` rows."""
        return max(pages_for(rows, self.pool.page_rows) - self.count, 0)

    def reserve(self, rows: int) -> None:
        """Take pages for `rows` rows in all; the pool must have those `missing`."""
        while self.missing(rows):
            self._append(self.pool.take())

    def adopt(self, first: int, pages: SequenceOf[int]) -> None:
        """Begin, as an empty table, with pages that were found: entries from `first` on."""
        assert not self.count
        self.first = self.count = first
        for page in pages:
            self.pool.hold(page)
            self._append(page)

    def write(self, row: Ids) -> None:
        """Copy the entries to where an operator reads them; what lies beyond is not looked at."""
        row[: self.count] = self.entries[: self.count]

    def needed_from(self, length: int) -> int:
        """The first page that tokens from position `length` on still see."""
        return max(length - self.window + 1, 0) // self.pool.page_rows if self.window else 0

    def drop(self, length: int) -> None:
        """Give back what no token from position `length` on sees."""
        for page in range(self.first, min(self.needed_from(length), self.count)):
            self.pool.release(int(self.entries[page]), passed=True)
            self.entries[page] = NONE
            self.first = page + 1

    def truncate(self, length: int) -> None:
        """Give back pages without rows below `length`, the last first: evictions then begin at the end."""
        while self.count > max(pages_for(length, self.pool.page_rows), self.first):
            self.count -= 1
            self.pool.release(int(self.entries[self.count]))
            self.entries[self.count] = NONE
        self.told = min(self.told, self.count)

    def _append(self, page: int) -> None:
        while self.count >= len(self.entries):
            self.entries = np.concatenate([self.entries, np.full(len(self.entries), NONE, np.int64)])
        self.entries[self.count] = page
        self.count += 1


def reserve(after: SequenceOf[tuple[PageTable, int]]) -> None:
    """Take the pages for the rows that each table is to have, all of them or none.

    Raises:
        DoesNotFitError: a pool has not enough; nothing has changed.
    """
    after = [(table, rows) for table, rows in after if table.missing(rows)]
    for pool in {id(table.pool): table.pool for table, _ in after}.values():
        missing = sum(table.missing(rows) for table, rows in after if table.pool is pool)
        if missing > pool.free:
            raise DoesNotFitError(
                f"{missing * pool.page_rows} more rows are needed, the caches have "
                f"{pool.free * pool.page_rows}",
                "Run fewer or shorter sequences at once, or build with more cache_tokens.",
            )
    for table, rows in after:
        table.reserve(rows)
