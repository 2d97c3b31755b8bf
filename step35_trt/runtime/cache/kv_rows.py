"""The rows of one sequence in one graph, and which of them later sequences can begin with.

Row p of the decoder depends on tokens 0 .. p, row p of MTP module k on tokens 0 .. p + 1 + k (specification
3.2): it looks k + 1 tokens ahead. A page of complete and settled rows is registered under the digest of all
tokens up to its end, and those ahead. A sequence with the same beginning can then take the page as its own:
the rows it would compute are the same. Rows are settled when no `truncate` may take them back any more.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.runtime.cache.kv_pages import PAGE_ROWS, PageTable
from step35_trt.runtime.session import MOST_REJECTED

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass
class Prefixes:
    """Keys of the pages of a token sequence, made as far as they are asked for."""

    tokens: list[int]
    page_rows: int = PAGE_ROWS
    _digests: list[bytes] = field(default_factory=list)

    def of(self, tokens: list[int], pages: int) -> Prefixes:
        """Those of other tokens that share so many pages."""
        return Prefixes(tokens, self.page_rows, self._digests[:pages])

    def key(self, page: int, ahead: int) -> bytes:
        """The key of a page whose rows look `ahead` tokens ahead; those tokens must be settled."""
        while len(self._digests) <= page:
            start = len(self._digests) * self.page_rows
            before = self._digests[-1] if self._digests else b""
            part = _bytes(self.tokens[start : start + self.page_rows])
            self._digests.append(hashlib.blake2b(before + part, digest_size=32).digest())
        end = (page + 1) * self.page_rows
        return self._digests[page] + _bytes(self.tokens[end : end + ahead])


def _bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, np.int64).tobytes()


@dataclass
class CachedRows:
    """What a sequence has in one graph.

    Attributes:
        tables: Its pages, one table for layers without a window and one for those with.
        ahead: Tokens that a row looks ahead.
        tokens: What each row took; of module k, row p has token p + ahead.
        settled: Rows that cannot be taken back.
    """

    tables: tuple[PageTable, ...]
    ahead: int
    tokens: list[int] = field(default_factory=list)
    settled: int = 0
    _registered: int = 0  # pages

    @property
    def length(self) -> int:
        """How many there are."""
        return len(self.tokens)

    @property
    def page_rows(self) -> int:
        """Rows of a page."""
        return self.tables[0].pool.page_rows if self.tables else PAGE_ROWS

    def append(self, token_ids: Iterable[int]) -> None:
        """Count the rows of a call that has been run. Of a long one only the last few can be taken back."""
        before = self.length
        self.tokens += token_ids
        self.settled = max(before, self.length - MOST_REJECTED)

    def truncate(self, length: int) -> None:
        """Forget rows at and after `length`, which lie in the latest call."""
        there = all(table.needed_from(length) >= table.first for table in self.tables)
        possible = there and self._registered * self.page_rows <= length <= self.length
        assert possible, "only the latest call's last rows can be taken back"
        del self.tokens[length:]
        self.settled = min(self.settled, length)
        for table in self.tables:
            table.truncate(length)

    def settle(self) -> None:
        """No row will be taken back any more."""
        self.settled = self.length

    def register(self, decoder: CachedRows, prefixes: Prefixes) -> None:
        """Make complete pages findable whose rows, and the tokens they depend on, are settled.

        `prefixes` are those of the decoder's tokens. A module whose rows took other tokens than the decoder
        (a refused draft that was left in its cache) is of use to nobody.
        """
        known = min(self.settled, decoder.settled - self.ahead) // self.page_rows
        while self._registered < known:
            start, end = self._registered * self.page_rows, (self._registered + 1) * self.page_rows
            if self.tokens[start:end] != decoder.tokens[start + self.ahead : end + self.ahead]:
                return
            for table in self.tables:
                if self._registered >= table.first:
                    key = prefixes.key(self._registered, self.ahead)
                    table.pool.register(int(table.entries[self._registered]), key)
            self._registered += 1

    def drop(self) -> None:
        """Give back what lies before the window of every later token."""
        for table in self.tables:
            table.drop(self.settled)

    def close(self) -> None:
        """Give back all pages."""
        for table in self.tables:
            table.truncate(0)

    def begin_with(self, pages: int, prefixes: Prefixes) -> None:
        """Start with so many pages of a prompt, all of which `reusable_pages` found."""
        for table in self.tables:
            first = table.needed_from(pages * self.page_rows)
            found = [table.pool.find(prefixes.key(page, self.ahead)) for page in range(first, pages)]
            table.adopt(first, [page for page in found if page is not None])
            assert table.count == pages
        end = pages * self.page_rows
        self.tokens = prefixes.tokens[self.ahead : end + self.ahead]
        self.settled, self._registered = end, pages


def table_width(batch: Iterable[CachedRows]) -> int:
    """Entries that a batch's tables of pages have room for: a power of two, so that it rarely changes."""
    return 1 << (max(table.count for rows in batch for table in rows.tables) - 1).bit_length()


def reusable_pages(graphs: Iterable[CachedRows], prefixes: Prefixes, most: int) -> int:
    """The longest prefix, in pages and at most `most`, that all graphs still have.

    Of layers with a window only the pages that the first token after the prefix sees must be there.
    """
    fits = np.ones(most + 1, bool)
    for rows in graphs:
        for table in rows.tables:
            fits[1:] &= _fits(table, rows.ahead, prefixes, len(fits) - 1)
            fits = fits[: np.flatnonzero(fits)[-1] + 1]
    return len(fits) - 1


def _fits(table: PageTable, ahead: int, prefixes: Prefixes, most: int) -> np.ndarray:
    """Whether the pool has what a prefix of 1, 2, ... `most` pages needs."""
    run, result = 0, np.zeros(most, bool)
    for page in range(most):
        run = run + 1 if table.pool.find(prefixes.key(page, ahead)) is not None else 0
        if not run and not table.window:
            break
        result[page] = run > page - table.needed_from((page + 1) * prefixes.page_rows)
    return result
