"""What serves a bundle inside a server's process: the scheduler's loop and two threads around it."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from threading import Condition, Event, Lock, Semaphore, Thread
from typing import TYPE_CHECKING

from step35_trt.errors import Step35Error
from step35_trt.triton_repo.answers import Answer, CancelledError, TimedOutError
from step35_trt.triton_repo.requests import parse, timeout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.scheduling.requests import Metrics
    from step35_trt.runtime.scheduling.serving import ServingLoop
    from step35_trt.triton_repo.answers import Responder
    from step35_trt.triton_repo.limits import ServingLimits
    from step35_trt.triton_repo.requests import Inputs, Wanted

REPORT_SECONDS = 0.5
IDLE_SECONDS = 0.02
FULL_SECONDS = 0.05
# Each client is asked so often whether it is still there, unless that takes more than a share of the time.
WATCH_SECONDS = 0.4
WATCH_SHARE = 0.05
# And so much into responses of running streams. A response costs a server about a millisecond whatever is in
# it, so under load they become longer and fewer instead of slowing the steps down.
STREAM_SHARE = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """A request as the server hands it over.

    Attributes:
        inputs: Tensors by name.
        parameters: Of the request.
        timeout: Microseconds for the answer, 0 for no limit.
        responder: The client.
    """

    inputs: Inputs
    parameters: Mapping[str, object]
    timeout: int
    responder: Responder


@dataclass(frozen=True)
class _Waiting:
    """A checked request before there is room for it."""

    wanted: Wanted
    seconds: float | None
    since: float
    responder: Responder


class Outbox:
    """Answers with something to send: first tokens and ends at once, what is between when there is time."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._urgent: deque[Answer] = deque()
        self._other: deque[Answer] = deque()
        self._resting_until = 0.0
        self._closed = False

    def put(self, answer: Answer, urgent: bool) -> None:
        """An answer has something to send."""
        with self._changed:
            answers = self._urgent if urgent else self._other
            answers.append(answer)
            if urgent or len(answers) == 1:  # for further ones that can wait a time is set already
                self._changed.notify()

    def get(self) -> Answer | None:
        """The next answer to deliver; None when there is none left after `close`."""
        with self._changed:
            while True:
                left = self._resting_until - time.perf_counter()
                if self._urgent:
                    return self._urgent.popleft()
                if self._other and (left <= 0 or self._closed):
                    return self._other.popleft()
                if self._closed:
                    return None
                self._changed.wait(left if self._other else None)

    def rest(self, seconds: float) -> None:
        """Nothing that can wait is given out for so long."""
        self._resting_until = time.perf_counter() + seconds

    def close(self) -> None:
        """Nothing comes any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()


class Host:
    """Takes requests from a server and sees that each gets its responses.

    Besides the loop's own thread there is one that sends responses, so that no step waits for a client, and
    one that asks whether clients are still there, since a server does not say so by itself.

    Args:
        loop: Runs the requests; belongs to the host from here on.
        text: The bundle's tokenizer, if it has one.
        stop_ids: The checkpoint's.
        limits: Of a request, and of all.
        report: Given the loop's figures every now and then, from the watching thread.
    """

    def __init__(
        self,
        loop: ServingLoop,
        text: Text | None,
        stop_ids: Sequence[int],
        limits: ServingLimits,
        report: Callable[[Metrics], None],
    ) -> None:
        self._loop = loop
        self._text = text
        self._stop_ids = tuple(stop_ids)
        self._limits = limits
        self._report = report
        self._room = Semaphore(limits.sequences + limits.ahead)
        self._outbox = Outbox()
        self._open: set[Answer] = set()
        self._lock = Lock()
        self._ending = Event()
        self._threads = (
            Thread(target=self._deliver, name="responses", daemon=True),
            Thread(target=self._watch, name="watch", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def submit(self, arrivals: Sequence[Arrival]) -> None:
        """Answer requests, in this order; whatever is wrong with one goes to its client.

        Waits while as many requests are open as the limits allow: the server's queue holds the others. A
        request's time, and its client's patience, may be over before there is room; from then on the time
        counts anew.
        """
        read = [self._read(arrival) for arrival in arrivals]
        waiting = [one for one in read if one is not None]
        while waiting:
            if self._room.acquire(timeout=FULL_SECONDS):
                self._begin(waiting.pop(0))
            else:
                waiting = [one for one in waiting if self._still_wanted(one)]

    def _read(self, arrival: Arrival) -> _Waiting | None:
        """A request if it is one."""
        try:
            seconds = timeout_of(arrival.timeout, arrival.parameters)
            wanted = parse(arrival.inputs, arrival.parameters, self._text, self._stop_ids, self._limits)
        except Step35Error as error:
            arrival.responder.fail(error)
            return None
        except Exception as error:  # the others are not to blame
            arrival.responder.fail(Step35Error(f"{type(error).__name__}: {error}"))
            return None
        return _Waiting(wanted, seconds, time.monotonic(), arrival.responder)

    def _still_wanted(self, one: _Waiting) -> bool:
        """Whether a request may go on waiting for room."""
        if one.seconds is not None and time.monotonic() >= one.since + one.seconds:
            one.responder.fail(TimedOutError("the request's time was up before there was room for it"))
            return False
        if one.responder.cancelled():
            one.responder.fail(CancelledError("the request was cancelled"))
            return False
        return True

    def _begin(self, one: _Waiting) -> None:
        """Run a request that there is room for."""
        answer = Answer(one.wanted, self._text, one.responder, self._outbox.put)
        with self._lock:
            self._open.add(answer)
        try:
            answer.handle = self._loop.submit(replace(one.wanted.tokens, timeout=one.seconds), answer.put)
        except Step35Error as error:
            self._close(answer)
            one.responder.fail(error)
            return
        if answer.text_stopped:  # before there was a handle to cancel
            answer.handle.cancel()

    def stop(self) -> None:
        """End all requests, each with an error, and the threads."""
        self._loop.stop()
        self._ending.set()
        self._outbox.close()
        for thread in self._threads:
            thread.join()

    def _close(self, answer: Answer) -> None:
        with self._lock:
            if answer not in self._open:  # delivered once more after its end
                return
            self._open.remove(answer)
        self._room.release()

    def _deliver(self) -> None:
        while (answer := self._outbox.get()) is not None:
            started = time.perf_counter()
            try:
                answer.deliver()
            except Exception:  # of the server; the others' responses must go on
                _log.exception("a response could not be sent")
                if answer.handle is not None:
                    answer.handle.cancel()
            if answer.over:
                self._close(answer)
            self._outbox.rest((time.perf_counter() - started) * (1 / STREAM_SHARE - 1))

    def _watch(self) -> None:
        reported = float("-inf")
        while not self._ending.is_set():
            with self._lock:
                answers = list(self._open)
            for answer in answers:
                started = time.perf_counter()
                try:
                    answer.watch()
                except Exception:
                    _log.exception("a request could not be asked for its state")
                took = time.perf_counter() - started
                pace = min(WATCH_SECONDS / len(answers), IDLE_SECONDS)
                self._ending.wait(max(pace, took * (1 / WATCH_SHARE - 1)))
            if time.monotonic() - reported >= REPORT_SECONDS:
                self._report(self._loop.metrics())
                reported = time.monotonic()
            if not answers:
                self._ending.wait(IDLE_SECONDS)
        self._report(self._loop.metrics())
