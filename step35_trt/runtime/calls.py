"""Generations as coroutines: they yield the next call of a graph that they need and are sent its result.

Whoever drives one decides when its calls run and what runs beside them: `drive` one after the other, a
scheduler packed with those of other sequences.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from step35_trt.runtime.session import Call, Step

if TYPE_CHECKING:
    from step35_trt.runtime.session import Session

R = TypeVar("R")


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


Calls = Generator[ModelCall, Step, R]


def run(session: Session, needed: ModelCall) -> Step:
    """Run one call by itself."""
    if needed.module is None:
        return session.decode([needed.call])[0]
    return session.draft(needed.module, [needed.call])[0]


def drive(session: Session, calls: Calls[R]) -> Generator[None]:
    """Run a coroutine's calls one after the other; yields after each, and closes the coroutine at the end."""
    try:
        needed = next(calls, None)
        while needed is not None:
            step = run(session, needed)
            try:
                needed = calls.send(step)
            except StopIteration:
                needed = None
            yield
    finally:
        calls.close()
