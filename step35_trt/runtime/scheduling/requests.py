"""What is asked of a scheduler, and what it says: requests, events, limits, figures.

A request's events arrive through its sink, in order: any number of `Tokens`, then exactly one `Finished` or
`Failed`. The scheduler's thread calls the sink between two steps, so a sink must be quick (put the event into
a queue, hand it to an event loop) and must not raise. It may cancel the request, for instance because a stop
string has come: nothing but `Finished` follows then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from step35_trt.runtime.decoding.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Collection
    from collections.abc import Sequence as SequenceOf

    from step35_trt.errors import Step35Error
    from step35_trt.runtime.decoding.generation_stats import GenerationStats

Ended = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True)
class TokenRequest:
    """One answer wanted; nothing is checked before the request is submitted.

    Attributes:
        prompt_ids: Token ids, at least one.
        max_tokens: Tokens to generate at most; the context limit may end the answer earlier.
        sampling: Filters and seed. A seeded answer depends neither on what runs beside it nor on the clock.
        stop_ids: Ids that end the answer; they are not given out.
        draft_tokens: Drafts a round, 0 .. number of MTP modules, or 'auto': chosen together with those of the
            other running requests, from measured costs.
        priority: Smaller numbers are admitted first; among equals whoever came first. It does not disturb
            what runs already, but whoever must make room is taken from the largest numbers.
        timeout: Seconds from submission until the request ends with what it has; None for no limit.
    """

    prompt_ids: SequenceOf[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: Collection[int] = ()
    draft_tokens: int | Literal["auto"] = "auto"
    priority: int = 0
    timeout: float | None = None


@dataclass(frozen=True)
class Tokens:
    """The answer's next tokens, at least one, as soon as they are certain."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """The request is over and holds nothing any more.

    Attributes:
        reason: 'stop' and 'length' as for `generate`; 'cancelled' and 'timeout' may come before any token.
        stats: Of the generation.
        queued_seconds: From submission to admission; to the end for a request that was never admitted.
        first_token_seconds: From submission to the first token; None without one.
        total_seconds: From submission to the end.
    """

    reason: Ended
    stats: GenerationStats
    queued_seconds: float
    first_token_seconds: float | None
    total_seconds: float


@dataclass(frozen=True)
class Failed:
    """The request is over and holds nothing any more, because of an error of its own or of the whole loop."""

    error: Step35Error


Event = Tokens | Finished | Failed
Sink = Callable[[Event], None]


class RequestHandle(Protocol):
    """A submitted request; usable from any thread."""

    @property
    def done(self) -> bool:
        """Whether the last event has been given to the sink."""
        ...

    def cancel(self) -> None:
        """End the request before the next step; does nothing where it is over."""
        ...


@dataclass(frozen=True)
class Limits:
    """How much a scheduler takes on.

    Attributes:
        sequences: Requests that run at the same time at most; the session may allow fewer.
        step_tokens: Tokens of a packed step at most; None: the session's chunk, which it cannot exceed. A few
            are always allowed, as some calls cannot be cut.
        waiting: Requests that wait at most, a further one fails at once; None for no limit.
    """

    sequences: int = 32
    step_tokens: int | None = None
    waiting: int | None = None


@dataclass(frozen=True)
class Metrics:
    """What a scheduler has done since its start, and does now.

    Attributes:
        running: Requests that hold a sequence.
        waiting: Requests that do not yet, or no longer.
        finished: Requests that ended by 'stop' or 'length'.
        cancelled: Requests that ended by 'cancelled'.
        timed_out: Requests that ended by 'timeout'.
        failed: Requests that ended with an error.
        preempted: How often a running request gave up its sequence to make room.
        prompt_tokens: Of all requests that were admitted, once each.
        reused_tokens: How many of them were found in the cache.
        generated_tokens: Given to sinks.
        steps: Packed decoder steps.
        step_tokens: Tokens of these steps, prompts and drafts included.
        drafted: Drafts of each MTP head.
        accepted: How many of them the decoder confirmed.
        free_rows: Rows of cache that nobody holds.
    """

    running: int
    waiting: int
    finished: int
    cancelled: int
    timed_out: int
    failed: int
    preempted: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    steps: int
    step_tokens: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    free_rows: int

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of each head's drafts that the decoder confirmed, 0 for a head that drafted nothing."""
        return tuple(a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True))
