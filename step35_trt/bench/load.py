"""A closed loop: so many requests in flight, the next one sent when one is answered."""

from __future__ import annotations

import itertools
import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from step35_trt.errors import Step35Error
from step35_trt.runtime.scheduling.requests import Failed, Finished, Limits, TokenRequest, Tokens
from step35_trt.runtime.scheduling.serving import ServingLoop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.bench.workload import Item
    from step35_trt.progress import Progress
    from step35_trt.runtime.scheduling.requests import Event
    from step35_trt.runtime.session import Session


@dataclass(frozen=True)
class Answer:
    """What one request went through; seconds of one monotonic clock.

    Attributes:
        sent: When it was submitted.
        arrivals: When tokens came, and how many at once: a round settles several when drafts are accepted.
        finished: Its last event.
    """

    sent: float
    arrivals: tuple[tuple[float, int], ...]
    finished: Finished


@dataclass(frozen=True)
class Load:
    """All answers at one concurrency, and the seconds from the first request to the last answer."""

    concurrency: int
    seconds: float
    answers: tuple[Answer, ...]


@dataclass
class _Flight:
    """A request under way; its sink, which the loop's thread calls."""

    done: queue.SimpleQueue[_Flight]
    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    last: Finished | Failed | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self.arrivals.append((time.perf_counter(), len(event.token_ids)))
        else:
            self.last = event
            self.done.put(self)


def run(
    session: Session,
    items: Sequence[Item],
    concurrency: int,
    draft_tokens: int | Literal["auto"],
    progress: Progress = lambda *_: None,
) -> Load:
    """Answer all items with `concurrency` of them in flight.

    Raises:
        Step35Error: a request failed; a benchmark of part of a load would mislead.
    """
    done: queue.SimpleQueue[_Flight] = queue.SimpleQueue()
    pending, answers = iter(items), list[Answer]()
    with ServingLoop(session, Limits(sequences=concurrency)) as loop:

        def send(item: Item) -> None:
            flight = _Flight(done, time.perf_counter())
            loop.submit(TokenRequest(item.prompt_ids, item.output_tokens, draft_tokens=draft_tokens), flight)

        started = time.perf_counter()
        for item in itertools.islice(pending, concurrency):
            send(item)
        while len(answers) < len(items):
            flight = done.get()
            if isinstance(flight.last, Failed):
                raise flight.last.error
            assert flight.last is not None
            answers.append(Answer(flight.sent, tuple(flight.arrivals), flight.last))
            progress(len(answers), len(items), f"{concurrency} at a time")
            for item in itertools.islice(pending, 1):
                send(item)
        seconds = time.perf_counter() - started
    if loop.failure is not None:
        raise Step35Error(loop.failure.message, loop.failure.hint)
    return Load(concurrency, seconds, tuple(answers))
