"""The rows of one sequence in all graphs, and how it begins with what others left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.runtime.cache.kv_rows import CachedRows, Prefixes, reusable_pages
from step35_trt.runtime.programs.orders import DECODER

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class SequenceRows:
    """What a sequence has in every graph that has run on it.

    Attributes:
        empty: A graph's rows of a new sequence.
    """

    empty: Callable[[int], CachedRows]
    closed: bool = False
    _rows: dict[int, CachedRows] = field(default_factory=dict)
    _prefixes: Prefixes = field(init=False)

    def __post_init__(self) -> None:
        decoder = self.of(DECODER)
        self._prefixes = Prefixes(decoder.tokens, decoder.page_rows)

    def of(self, graph: int) -> CachedRows:
        """Those in a graph."""
        assert not self.closed, "the sequence is closed"
        if graph not in self._rows:
            self._rows[graph] = self.empty(graph)
        return self._rows[graph]

    def length(self, graph: int) -> int:
        """How many there are in a graph."""
        return self._rows[graph].length if graph in self._rows else 0

    def begin_with(self, prompt: list[int], modules: int) -> None:
        """Take over what is cached of a prompt; the sequence is empty (see `Session.open`).

        Args:
            prompt: What it will begin with.
            modules: How many MTP modules will run on it.
        """
        decoder = self.of(DECODER)
        graphs = [decoder, *(self.of(1 + module) for module in range(modules))]
        prefixes = Prefixes(prompt, decoder.page_rows)
        most = max(len(prompt) - max(modules, 1), 0) // decoder.page_rows
        pages = reusable_pages(graphs, prefixes, most)
        for rows in graphs:
            rows.begin_with(pages, prefixes)
        self._prefixes = prefixes.of(decoder.tokens, pages)

    def settled(self, rows: CachedRows) -> None:
        """Of rows just run: make findable what cannot be taken back, and give back what nobody will see."""
        rows.register(self.of(DECODER), self._prefixes)
        rows.drop()

    def close(self) -> None:
        """Give back all pages; what they hold can be found until they are needed."""
        if self.closed:
            return
        decoder, self.closed = self.of(DECODER), True
        for rows in self._rows.values():
            rows.settle()
        for rows in self._rows.values():
            rows.register(decoder, self._prefixes)
            rows.close()
