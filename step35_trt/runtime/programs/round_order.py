"""What rank 0 tells the others of a packed round: its steps, with places for the drafts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.runtime.programs.orders import StepOrder

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.programs.round_plan import Part
    from step35_trt.runtime.session import Ids

ROUND = -1  # what an encoded round begins with, where a step has its graph


def _none() -> Ids:
    return np.empty((0, 2), np.int64)


@dataclass(frozen=True)
class RoundOrder:
    """The steps of a round, one after the other without a look at what they give.

    Attributes:
        steps: In order. An id of -1 - j stands for draft j of the sequence; what a module takes over are the
            rows that the module before, or the decoder, left on the device.
        closed: See `StepOrder`.
        moves: See `StepOrder`; of all steps.
    """

    steps: tuple[StepOrder, ...]
    closed: tuple[int, ...] = ()
    moves: Ids = field(default_factory=_none)

    @classmethod
    def of(cls, parts: SequenceOf[tuple[int, Part]]) -> RoundOrder:
        """Pack sequences' parts, each with its sequence's slot, into as few steps as they allow."""

        def order(pair: tuple[int, Part]) -> tuple[bool, int, int]:
            place = pair[1].place
            return place == 0, place > 0, abs(place)

        packed = groupby(sorted(parts, key=order), key=order)
        return cls(tuple(_step([*some]) for _, some in packed))

    def encoded(self) -> Ids:
        """The round as one vector."""
        steps = [step.encoded() for step in self.steps]
        sizes = [ROUND, len(self.closed), len(self.moves), len(steps), *map(len, steps), *self.closed]
        return np.concatenate([np.array(sizes, np.int64), self.moves.ravel(), *steps])

    @classmethod
    def decode(cls, vector: Ids) -> RoundOrder:
        """The inverse of `encoded`; what lies beyond is ignored."""
        closed, moves, steps = map(int, vector[1:4])
        lengths = vector[4 : 4 + steps].tolist()
        sizes = [4 + steps, closed, 2 * moves, *lengths]
        _, ended, changed, *rest = np.split(vector[: sum(sizes)], np.cumsum(sizes)[:-1])
        return cls(tuple(map(StepOrder.decode, rest)), tuple(ended.tolist()), changed.reshape(-1, 2))


def _step(pairs: list[tuple[int, Part]]) -> StepOrder:
    """One graph's step of several sequences."""
    slots, parts = zip(*pairs, strict=True)
    lengths = tuple(len(part.token_ids) for part in parts)
    starts = np.cumsum((0, *lengths[:-1]))
    return StepOrder(
        parts[0].graph,
        slots,
        tuple(part.past for part in parts),
        lengths,
        np.array([token for part in parts for token in part.token_ids], np.int64),
        np.array([s + row for part, s in zip(parts, starts, strict=True) for row in part.rows], np.int64),
    )
