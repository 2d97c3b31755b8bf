"""What rank 0 tells the others of a packed step: what to run, on which sequences, as whole numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from step35_trt.runtime.session import Ids

DECODER = 0  # graph k + 1 is MTP module k
_COUNTS = 6


def _none() -> Ids:
    return np.empty((0, 2), np.int64)


@dataclass(frozen=True)
class StepOrder:
    """One run of a graph on tokens of several sequences.

    It says of every sequence how many rows it has before the step: a rank forgets what it holds beyond, so
    truncations need no messages, and a slot begins anew with a `past` of 0.

    Attributes:
        graph: `DECODER`, or k + 1 for MTP module k.
        slots: Of each sequence, where its caches are kept.
        pasts: Rows that the graph's caches keep of each.
        lengths: Packed tokens of each.
        token_ids: `[t]`, packed.
        rows: `[r]` indices into them.
        closed: Slots whose sequences have ended since the last step.
        moves: `[m, 2]` entries of the device's lines of pages, each with the page that it names from now on.
    """

    graph: int
    slots: tuple[int, ...]
    pasts: tuple[int, ...]
    lengths: tuple[int, ...]
    token_ids: Ids
    rows: Ids
    closed: tuple[int, ...] = ()
    moves: Ids = field(default_factory=_none)

    def encoded(self) -> Ids:
        """The step as one vector."""
        parts = self.slots, self.closed, self.token_ids, self.rows, self.moves
        numbers = [self.graph, *map(len, parts), *self.slots, *self.pasts, *self.lengths, *self.closed]
        return np.concatenate([np.array(numbers, np.int64), self.token_ids, self.rows, self.moves.ravel()])

    @classmethod
    def decode(cls, vector: Ids) -> StepOrder:
        """The inverse of `encoded`; what lies beyond is ignored."""
        graph, sequences, closed, tokens, rows, moves = map(int, vector[:_COUNTS])
        sizes = [_COUNTS, sequences, sequences, sequences, closed, tokens, rows, 2 * moves]
        _, *parts = np.split(vector[: sum(sizes)], np.cumsum(sizes)[:-1])
        slots, pasts, lengths, ended = (tuple(map(int, part)) for part in parts[:4])
        return cls(graph, slots, pasts, lengths, parts[4], parts[5], ended, parts[6].reshape(-1, 2))
