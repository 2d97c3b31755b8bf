"""`Rounds` of an `OnnxSession`: graphs that draft and verify without going back to the host in between."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.runtime.cache.kv_pages import reserve
from step35_trt.runtime.packing import check_lengths
from step35_trt.runtime.programs.round_packing import packed_round
from step35_trt.runtime.programs.round_plan import lags_of, shapes
from step35_trt.runtime.session import Call, RoundResult

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.programs.round_packing import PackedRound
    from step35_trt.runtime.programs.round_plan import PartShape
    from step35_trt.runtime.session import Floats, RoundCall
    from step35_trt.runtime.session_onnx import OnnxSequence, OnnxSession

# Rows that a module runs at a time when nobody drafts with it: a call's start costs as much as some rows.
QUERIES = 32


@dataclass(frozen=True)
class _Member:
    """A sequence in a round.

    Attributes:
        sequence: Its caches.
        rows: The decoder's before.
        known: Its last tokens, one more at the end.
        fed: What modules run beforehand that are too far behind.
        lags: Rows that each module which drafts is behind then.
    """

    sequence: OnnxSequence
    rows: int
    known: SequenceOf[int]
    fed: tuple[PartShape, ...]
    lags: tuple[int, ...]

    @classmethod
    def of(cls, sequence: OnnxSequence, call: RoundCall, lags: tuple[int, ...], due: bool) -> _Member:
        """Where modules of some sequence are `due`, those that soon will be are fed in the same step."""
        fed: tuple[PartShape, ...] = ()
        furthest = max(lags, default=0)
        if due and furthest > QUERIES // 2:
            queries = QUERIES if furthest > QUERIES else QUERIES // 2
            fed = tuple(part for part in shapes(lags, call.depth, queries) if not part.rows)
            behind = {part.graph - 1: part.behind - len(part.tokens) for part in fed}
            lags = tuple(behind.get(module, lag) for module, lag in enumerate(lags))
        return cls(sequence, sequence.length, call.token_ids, fed, lags[: call.depth])

    def hidden(self, graph: int, behind: int, end: int) -> Floats:
        """What a graph takes over of the rows before: from so many behind the decoder to so many."""
        return self.sequence.hidden(graph - 1).read(self.rows - behind, self.rows - end)

    def ids(self, part: PartShape, drafts: SequenceOf[int]) -> list[int]:
        """A part's tokens."""
        return [drafts[token - 1] if token > 0 else self.known[token - 1] for token in part.tokens]


@dataclass(frozen=True)
class OnnxRounds:
    """See `session.Rounds`.

    Attributes:
        session: Whose sequences take part.
    """

    session: OnnxSession

    @property
    def drafts(self) -> int:
        """See `Rounds`."""
        return len(self.session.program.rounds)

    @property
    def behind(self) -> int:
        """See `Rounds`."""
        return 2 * QUERIES

    def round(self, calls: SequenceOf[RoundCall]) -> list[RoundResult]:
        """See `Rounds`."""
        after = [call.sequence.length + 1 + call.depth for call in calls]
        check_lengths([call.sequence for call in calls], after, self.session.max_tokens)
        lags = [lags_of(call) for call in calls]
        due = any(lag > QUERIES for own in lags for lag in own)
        members = [
            _Member.of(self.session.own(call.sequence), call, own, due)
            for call, own in zip(calls, lags, strict=True)
        ]
        # In order of lags: whoever has which, rounds of the same ones are of one form, and there are few.
        places = sorted(range(len(members)), key=lambda place: members[place].lags)
        members = [members[place] for place in places]
        packed = packed_round(tuple(member.lags for member in members), QUERIES)
        _reserve(members, packed)
        self._feed(members)
        results = self._verify(members, packed) if len(packed.steps) == 1 else self._draft(members, packed)
        return [result for _, result in sorted(zip(places, results, strict=True), key=itemgetter(0))]

    def _feed(self, members: SequenceOf[_Member]) -> None:
        """Run what modules are too far behind with, several sequences together."""
        pairs = [(part, member) for member in members for part in member.fed]
        pairs.sort(key=lambda pair: pair[0].graph)
        for graph, some in groupby(pairs, key=lambda pair: pair[0].graph):
            calls = []
            for part, member in some:
                ids = np.array(member.ids(part, ()), np.int64)
                hidden = member.hidden(graph, part.behind, part.behind - len(part.tokens))
                calls.append(Call(member.sequence, ids, np.empty(0, np.int64), hidden))
            self.session.draft(graph - 1, calls)

    def _verify(self, members: SequenceOf[_Member], packed: PackedRound) -> list[RoundResult]:
        """A round without drafts is a step."""
        (step,) = packed.steps
        calls = [
            Call(member.sequence, np.array(member.ids(part, ()), np.int64), np.array(part.rows, np.int64))
            for member, part in zip(members, step.parts, strict=True)
        ]
        return [RoundResult((), _greedy(step.logits)) for step in self.session.decode(calls)]

    def _draft(self, members: SequenceOf[_Member], packed: PackedRound) -> list[RoundResult]:
        *modules, _ = packed.steps
        chosen = [[members[number] for number in step.members] for step in packed.steps]
        rows = [
            [member.sequence.held.of(step.graph) for member in some]
            for step, some in zip(packed.steps, chosen, strict=True)
        ]
        hidden = [
            [
                member.hidden(step.graph, behind, end)
                for member, (behind, end) in zip(some, step.taken, strict=False)
                if behind > end  # of a graph that has not run nothing is kept
            ]
            for step, some in zip(packed.steps, chosen, strict=True)
        ]
        known = [
            token
            for member, count in zip(members, packed.known, strict=True)
            for token in member.known[-count:]
        ]
        made = self.session.round_graph(len(modules)).run(packed, known, rows, hidden)
        drafts: list[list[int]] = [[] for _ in members]
        for draft, number in zip(made.drafts.tolist(), (m for s in modules for m in s.members), strict=True):
            drafts[number].append(draft)
        for step, some, given in zip(packed.steps, chosen, made.hidden, strict=True):
            for place, (number, member, part) in enumerate(zip(step.members, some, step.parts, strict=True)):
                own = given[step.starts[place] : step.starts[place + 1]]
                member.sequence.ran(step.graph, member.ids(part, drafts[number]), own)
        choices = made.choices.tolist()
        ends = accumulate((len(own) + 1 for own in drafts), initial=0)
        return [
            RoundResult(own, choices[start:end])
            for own, (start, end) in zip(drafts, pairwise(ends), strict=True)
        ]


def _reserve(members: SequenceOf[_Member], packed: PackedRound) -> None:
    """Pages for all that a round runs, or for nothing of it; a graph that is fed and drafts ends last."""
    parts = [(member, part) for member in members for part in member.fed]
    for step in packed.steps:
        parts += [(members[number], part) for number, part in zip(step.members, step.parts, strict=True)]
    ends = {(id(m), part.graph): (m, m.rows - part.behind + len(part.tokens)) for m, part in parts}
    reserve(
        [
            (table, end)
            for (_, graph), (member, end) in ends.items()
            for table in member.sequence.held.of(graph).tables
        ]
    )


def _greedy(logits: Floats) -> list[int]:
    """Of each row `[V]` the likeliest token; -1 where a logit is not finite."""
    choices: list[int] = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1).tolist()
    return choices
