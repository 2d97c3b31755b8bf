"""Generations as coroutines: they yield the next call of a graph that they need and are sent its result.

Whoever drives one decides when its calls run and what runs beside them: `drive` one after the other, a
scheduler packed with those of other sequences.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from step35_trt.runtime.session import Call, RoundCall, RoundResult, Step, rounds_of

if TYPE_CHECKING:
    from step35_trt.runtime.session import Rounds, Session

R = TypeVar("R")
# What runs in one packed step: an MTP module by number, None for the decoder, or rounds with all they need.
Graph = int | None | Literal["round"]


@dataclass(frozen=True)
class ModelCall:
    """One sequence's part of a step of one graph.

    Attributes:
        module: The MTP module; None for the decoder.
        call: What to run.
        divisible: Whether only the first tokens may be run. The result then has as many hidden rows as were
            run, and the coroutine asks for the rest anew.
    """

    module: int | None
    call: Call
    divisible: bool = False

    def __len__(self) -> int:
        return len(self.call.token_ids)

    @property
    def graph(self) -> Graph:
        """Whose step it is part of."""
        return self.module

    def first(self, count: int) -> ModelCall:
        """The call cut to its first `count` tokens."""
        call = self.call
        if count >= len(self):
            return self
        return replace(
            self,
            call=Call(
                call.sequence,
                call.token_ids[:count],
                call.rows[call.rows < count],
                None if call.hidden is None else call.hidden[:count],
            ),
        )


@dataclass(frozen=True)
class WholeRound:
    """One sequence's part of a packed round (`session.Rounds`); its length is what the decoder verifies.

    Attributes:
        call: What to run.
    """

    call: RoundCall

    def __len__(self) -> int:
        return self.call.depth + 1

    @property
    def graph(self) -> Graph:
        """Whose step it is part of."""
        return "round"

    @property
    def module(self) -> None:
        """It is the decoder whose cache it fills."""

    @property
    def divisible(self) -> bool:
        """No part of it can be run alone."""
        return False

    def first(self, count: int) -> WholeRound:
        """The round itself."""
        assert count >= len(self)
        return self


Needed = ModelCall | WholeRound
Calls = Generator[Needed, Step | RoundResult, R]


def step_of(call: ModelCall) -> Calls[Step]:
    """Ask for a step's part."""
    step = yield call
    assert isinstance(step, Step)
    return step


def round_of(call: RoundCall) -> Calls[RoundResult]:
    """Ask for a round's part."""
    result = yield WholeRound(call)
    assert isinstance(result, RoundResult)
    return result


def run(session: Session, rounds: Rounds | None, needed: Needed) -> Step | RoundResult:
    """Run one call by itself; `rounds` are the session's."""
    if isinstance(needed, WholeRound):
        assert rounds is not None
        return rounds.round([needed.call])[0]
    if needed.module is None:
        return session.decode([needed.call])[0]
    return session.draft(needed.module, [needed.call])[0]


def drive(session: Session, calls: Calls[R]) -> Generator[None]:
    """Run a coroutine's calls one after the other; yields after each, and closes the coroutine at the end."""
    rounds = rounds_of(session)
    try:
        needed = next(calls, None)
        while needed is not None:
            result = run(session, rounds, needed)
            try:
                needed = calls.send(result)
            except StopIteration:
                needed = None
            yield
    finally:
        calls.close()
