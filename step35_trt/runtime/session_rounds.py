"""`Rounds` of a `ProgramSession` whose runner keeps hidden rows and drafts on its device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from step35_trt.runtime.cache.page_account import Growth
from step35_trt.runtime.packing import check_lengths
from step35_trt.runtime.programs.leading import lead
from step35_trt.runtime.programs.round_order import RoundOrder
from step35_trt.runtime.programs.round_plan import parts
from step35_trt.runtime.session import RoundResult

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.device.round_runner import RoundRunner
    from step35_trt.runtime.programs.round_plan import Part
    from step35_trt.runtime.session import Ids, RoundCall
    from step35_trt.runtime.session_program import ProgramSequence, ProgramSession


@dataclass(frozen=True)
class SessionRounds:
    """See `session.Rounds`. All ranks find the same drafts, as their logits are put together on each.

    Attributes:
        session: Whose sequences take part.
        runner: This rank's.
    """

    session: ProgramSession
    runner: RoundRunner

    @property
    def drafts(self) -> int:
        """See `Rounds`."""
        return self.runner.queries - 1

    @property
    def behind(self) -> int:
        """See `Rounds`."""
        return 2 * self.runner.queries

    def round(self, calls: SequenceOf[RoundCall]) -> list[RoundResult]:
        """See `Rounds`."""
        sequences = [_own(call) for call in calls]
        plans = [parts(call, self.runner.queries) for call in calls]
        check_lengths(sequences, [plan[-1].end for plan in plans], self.session.max_tokens)
        pairs = [*zip(sequences, plans, strict=True)]
        order = RoundOrder.of([(sequence.slot, part) for sequence, plan in pairs for part in plan])
        growths = [growth for sequence, plan in pairs for growth in _growths(sequence, plan)]
        drafts, choices = self.session.lead(order, growths, self._run)
        results = [
            RoundResult(drafts[s.slot, : call.depth].tolist(), choices[s.slot, : call.depth + 1].tolist())
            for call, s in zip(calls, sequences, strict=True)
        ]
        for (sequence, plan), result in zip(pairs, results, strict=True):
            for part in plan:
                rows = sequence.rows.of(part.graph)
                rows.append(part.filled(result.drafts))
                self.session.settled(sequence.rows, rows)
        return results

    def _run(self, order: RoundOrder) -> tuple[Ids, Ids]:
        return lead(self.session.runner.ranks, order, partial(self.runner.run, order))


def _growths(sequence: ProgramSequence, plan: list[Part]) -> list[Growth]:
    """One for each graph, which may run twice."""
    tokens: dict[int, int] = {}
    for part in plan:
        tokens[part.graph] = tokens.get(part.graph, 0) + len(part.token_ids)
    return [Growth(sequence.slot, sequence.rows.of(graph), count) for graph, count in tokens.items()]


def _own(call: RoundCall) -> ProgramSequence:
    sequence: ProgramSequence = call.sequence  # type: ignore[assignment]
    return sequence
