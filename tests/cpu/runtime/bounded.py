"""The fake session with a cache that is counted: pages, at most so many sequences, prefixes found again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from step35_trt.config import Step35Config
from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.session import Capacity, RoundResult, Step
from tests.cpu.runtime.fakes import Cache, FakeSequence, FakeSession
from tests.synthetic import raw_config


@dataclass
class BoundedSession(FakeSession):
    """`FakeSession` that gives out pages; every sequence's rows are found again as prefixes of later ones."""

    most_sequences: int = 8
    most_rows: int = 4096
    page_rows: int = 4
    steps: list[list[tuple[FakeSequence, int]]] = field(default_factory=list)  # decoder steps: who, tokens

    @property
    def capacity(self) -> Capacity:  # type: ignore[override]
        held = [self.pages(sequence) for sequence in self.open_sequences]
        return Capacity(
            self.most_sequences - len(held), self.most_rows - sum(held) * self.page_rows, self.page_rows
        )

    @capacity.setter
    def capacity(self, value: Capacity) -> None:
        """What the base class starts with does not count."""

    @property
    def config(self) -> Step35Config:
        heads, vocabulary = self.model.heads.shape[:2]
        return Step35Config.parse(raw_config(vocab_size=vocabulary, modules=heads))

    @property
    def open_sequences(self) -> list[FakeSequence]:
        return [sequence for sequence in self.opened if not sequence.closed]

    def pages(self, sequence: FakeSequence, more: int = 0) -> int:
        return -(-(sequence.length + more) // self.page_rows)

    def open(self, prompt_ids: Any = None, modules: int | None = None) -> FakeSequence:
        if len(self.open_sequences) >= self.most_sequences:
            raise DoesNotFitError("no sequence is left")
        sequence = super().open()
        if prompt_ids is None:
            return sequence
        heads = len(sequence.modules) if modules is None else modules
        tokens = prompt_ids.tolist()
        for other in self.opened[:-1]:
            rows = self._shared(other, tokens, heads)
            if rows > sequence.length:
                sequence.decoder = _copy(other.decoder, rows)
                for head in range(heads):
                    sequence.modules[head] = _copy(other.modules[head], rows)
        return sequence

    def decode(self, calls: Any) -> list[Step]:
        self._take_pages([(call.sequence, len(call.token_ids)) for call in calls])
        return super().decode(calls)

    def round(self, calls: Any) -> list[RoundResult]:
        self._take_pages([(call.sequence, call.depth + 1) for call in calls])
        return super().round(calls)

    def _take_pages(self, step: list[tuple[FakeSequence, int]]) -> None:
        held = sum(self.pages(sequence) for sequence in self.open_sequences)
        more = sum(self.pages(sequence, tokens) - self.pages(sequence) for sequence, tokens in step)
        assert (held + more) * self.page_rows <= self.most_rows, "a page too many was asked for"
        self.steps.append(step)

    def _shared(self, other: FakeSequence, tokens: list[int], heads: int) -> int:
        """Rows that two sequences have in common, whole pages."""
        most = min([len(tokens) - 1 - heads, other.length, *(len(c.tokens) for c in other.modules[:heads])])
        rows = max(most, 0) // self.page_rows * self.page_rows
        while rows and not self._same(other, tokens, heads, rows):
            rows -= self.page_rows
        return rows

    def _same(self, other: FakeSequence, tokens: list[int], heads: int, rows: int) -> bool:
        return other.decoder.tokens[:rows] == tokens[:rows] and all(
            other.modules[head].tokens[:rows] == tokens[1 + head : 1 + head + rows] for head in range(heads)
        )


def _copy(cache: Cache, rows: int) -> Cache:
    return Cache(cache.tokens[:rows], cache.sums[:rows], rows)
