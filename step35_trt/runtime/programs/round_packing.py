"""A round of several sequences as steps of packed tokens, for a graph that runs them all (`onnx_round`).

Nothing here depends on what the tokens are: an id is a place among the tokens known beforehand or, after
them, among the drafts in the order in which the steps make them; a hidden row that a module takes over is a
place among those of earlier rounds or, after them, among those that the step before has just made. Rounds of
the same lags and depths are thus alike, and of one sequence there are few kinds: none is planned twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from step35_trt.runtime.programs.round_plan import shapes

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.programs.round_plan import PartShape

# Of a sequence: rows that each module which drafts is behind the decoder.
Lags = tuple[int, ...]


@dataclass(frozen=True)
class PackedStep:
    """A graph's step in a round.

    Attributes:
        members: Which of the round's sequences take part, ascending.
        parts: What it runs for each of them.
        starts: `[s + 1]`, where each one's tokens begin and the last one's end.
        ids: `[t]`, see the module's text.
        rows: `[r]` packed tokens whose likeliest next one is wanted.
        taken: Of each one, from how many rows behind n to how many its hidden rows come from earlier rounds;
            none of the decoder.
        carried: `[t]`, see the module's text; None where all come from earlier rounds.
    """

    members: tuple[int, ...]
    parts: tuple[PartShape, ...]
    starts: tuple[int, ...]
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    taken: tuple[tuple[int, int], ...]
    carried: tuple[int, ...] | None

    @property
    def graph(self) -> int:
        """Whose step it is."""
        return self.parts[0].graph


@dataclass(frozen=True, eq=False)
class PackedRound:
    """A round of several sequences; the same object for the same lags.

    Attributes:
        known: Tokens that each sequence has to give, its last ones.
        steps: Of the modules that draft, in order, and of the decoder.
    """

    known: tuple[int, ...]
    steps: tuple[PackedStep, ...]


@lru_cache(maxsize=1024)
def packed_round(states: tuple[Lags, ...], queries: int) -> PackedRound:
    """Pack a round of sequences; `queries` as for `shapes`, and no module is further behind."""
    depths = [len(lags) for lags in states]
    plans = [shapes(lags, depth, queries) for lags, depth in zip(states, depths, strict=True)]
    known = tuple(1 - min(token for shape in plan for token in shape.tokens) for plan in plans)
    newest = [end - 1 for end in accumulate(known)]  # place of each one's newest token
    drafted = sum(known)
    drafts: list[list[int]] = [[] for _ in states]  # places of each one's
    steps: list[PackedStep] = []
    for module in range(max(depths) + 1):
        verifies = module == max(depths)
        members = [m for m, depth in enumerate(depths) if verifies or depth > module]
        parts = [plans[m][-1 if verifies else module - depths[m] - 1] for m in members]
        starts = (0, *accumulate(len(part.tokens) for part in parts))
        ids = [
            drafts[member][token - 1] if token > 0 else newest[member] + token
            for member, part in zip(members, parts, strict=True)
            for token in part.tokens
        ]
        rows = [start + row for part, start in zip(parts, starts, strict=False) for row in part.rows]
        taken, carried = ((), None) if verifies else _carried(members, parts, steps)
        steps.append(
            PackedStep(tuple(members), tuple(parts), starts, tuple(ids), tuple(rows), taken, carried)
        )
        for member in () if verifies else members:
            drafts[member].append(drafted)
            drafted += 1
    return PackedRound(known, tuple(steps))


def _carried(
    members: SequenceOf[int], parts: SequenceOf[PartShape], steps: SequenceOf[PackedStep]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...] | None]:
    """Where a module's hidden rows come from; `steps` are those before."""
    if not steps:
        return tuple((part.behind, part.behind - len(part.tokens)) for part in parts), None
    before = steps[-1]
    made = dict(zip(before.members, zip(before.parts, before.starts, strict=False), strict=True))
    taken = [
        (part.behind, min(part.behind, made[member][0].behind))
        for member, part in zip(members, parts, strict=True)
    ]
    held = sum(first - end for first, end in taken)
    seen, carried = 0, list[int]()
    for member, (first, end) in zip(members, taken, strict=True):
        source, start = made[member]
        newer = held + start + source.behind - end
        carried += (*range(seen, seen + first - end), *range(newer, newer + end))
        seen += first - end
    return tuple(taken), tuple(carried)
