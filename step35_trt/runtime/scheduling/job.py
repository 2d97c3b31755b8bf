"""A request on its way: when it came, what it runs, and what its sink is told."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.scheduling.requests import Failed, Finished, Tokens

if TYPE_CHECKING:
    from step35_trt.errors import Step35Error
    from step35_trt.runtime.decoding.calls import Calls, Needed
    from step35_trt.runtime.decoding.generation import Generation
    from step35_trt.runtime.scheduling.batch_depth import Member
    from step35_trt.runtime.scheduling.requests import Ended, Event, Sink, TokenRequest

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A submitted request; as `RequestHandle` it may be used from any thread, otherwise from the scheduler's.

    Attributes:
        request: What is wanted.
        sink: Who is told.
        number: Place in the order of arrival.
        submitted: The scheduler's clock then.
        generation: The answer's state; None until the request was looked at.
        member: Its share in the choice of depths, where it leaves that to the scheduler.
        calls: The coroutine, while a sequence is held.
        needed: The call it waits for.
        served: The turn in which it last got one.
        cancelled: Whether somebody wants it to end.
        done: See `RequestHandle`.
    """

    request: TokenRequest
    sink: Sink
    number: int
    submitted: float
    generation: Generation | None = None
    member: Member | None = None
    calls: Calls[None] | None = None
    needed: Needed | None = None
    served: int = 0
    cancelled: bool = False
    done: bool = False
    _admitted: float | None = field(default=None, init=False)
    _first_token: float | None = field(default=None, init=False)

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first is admitted first and gives way last."""
        return self.request.priority, self.number

    @property
    def rows(self) -> int:
        """Rows that its sequence has."""
        return self.needed.call.sequence.length if self.needed is not None else 0

    @property
    def admitted(self) -> bool:
        """Whether it has ever held a sequence."""
        return self._admitted is not None

    @property
    def rows_ahead(self) -> int:
        """Rows that its sequence has after the prompt and one more round."""
        assert self.generation is not None
        return self.generation.known_tokens + self.generation.round_tokens

    def cancel(self) -> None:
        """See `RequestHandle`."""
        self.cancelled = True

    def expired(self, now: float) -> bool:
        """Whether its time is up."""
        return self.request.timeout is not None and now >= self.submitted + self.request.timeout

    def start(self, now: float) -> bool:
        """Open its sequence and ask for its first call; whether that is the first time.

        Raises:
            DoesNotFitError: the session has no sequence to give.
        """
        assert self.generation is not None
        first = not self.admitted
        self._admitted = now if self._admitted is None else self._admitted
        self.calls = self.generation.calls()
        self.needed = next(self.calls)
        return first

    def give_back(self) -> None:
        """Close its sequence; `start` goes on later."""
        if self.calls is not None:
            self.calls.close()
        self.calls = self.needed = None

    def count_drafts(self, drafted: list[int], accepted: list[int]) -> None:
        """Add its drafts so far to the sums of each head."""
        if self.generation is None:
            return
        stats = self.generation.stats
        for head, (made, confirmed) in enumerate(zip(stats.drafted, stats.accepted, strict=True)):
            drafted[head] += made
            accepted[head] += confirmed

    def tell_tokens(self, now: float) -> int:
        """Give out the tokens that have become certain; returns how many."""
        new = self.generation.take() if self.generation is not None else []
        if new:
            self._first_token = now if self._first_token is None else self._first_token
            self._tell(Tokens(tuple(new)))
        return len(new)

    def tell_end(self, reason: Ended, now: float) -> None:
        """Give back the sequence and say that it is over."""
        self.give_back()
        stats = self.generation.stats if self.generation is not None else GenerationStats()
        admitted = now if self._admitted is None else self._admitted
        first = None if self._first_token is None else self._first_token - self.submitted
        self.done = True
        self._tell(Finished(reason, stats, admitted - self.submitted, first, now - self.submitted))

    def tell_failure(self, error: Step35Error) -> None:
        """Give back the sequence and say what went wrong."""
        with suppress(Exception):  # what went wrong may be the session
            self.give_back()
        self.done = True
        self._tell(Failed(error))

    def _tell(self, event: Event) -> None:
        try:
            self.sink(event)
        except Exception:  # whose sink is broken hears no more; the others must not notice
            _log.exception("the sink of request %d raised; the request is cancelled", self.number)
            self.sink = _deaf
            self.cancelled = True


def _deaf(event: Event) -> None:
    """For those whose sink is broken."""
