"""A scheduler on a thread of its own: submit from anywhere, events through sinks.

    with ServingLoop(session, Limits(sequences=16)) as loop:
        handle = loop.submit(TokenRequest(prompt_ids, max_tokens=64), events.put)
        ...
        loop.drain()

Interface, stable for its users:

* `submit(request, sink) -> RequestHandle`, from any thread, also from a sink. It raises `UsageError` when the
  loop is draining or stopped; everything that is wrong with the request itself arrives as `Failed`.
* `handle.cancel()`; the sequence is free before the next step.
* `metrics() -> Metrics`, as of the end of the last step.
* `drain(timeout=None) -> bool`: take nothing new, wait until all is answered; False when time was up.
* `stop()`: take nothing new, cancel what there is, end the thread; each sink gets its last event.
* `failure`: None, or the error that took the loop down; every request then got it as `Failed`.

The session belongs to the loop's thread from the constructor to the end of `stop`.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Self

from step35_trt.errors import Step35Error, UsageError
from step35_trt.runtime.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from types import TracebackType

    from step35_trt.runtime.decoding.generation import Clock
    from step35_trt.runtime.scheduling.requests import Limits, Metrics, RequestHandle, Sink, TokenRequest
    from step35_trt.runtime.session import Session


_log = logging.getLogger(__name__)


class ServingLoop:
    """See the module's text; the thread starts with the constructor, and leaving the context stops it.

    Args:
        session: A loaded bundle.
        limits: How much to take on.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, session: Session, limits: Limits | None = None, *, clock: Clock = time.monotonic
    ) -> None:
        self._scheduler = Scheduler(session, limits, clock=clock)
        self._changed = threading.Condition()
        self._closed = False  # nothing new is taken
        self._stopping = False
        self._idle = True
        self._metrics = self._scheduler.metrics()
        self.failure: Step35Error | None = None
        self._thread = threading.Thread(target=self._work, name="serving-loop", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def submit(self, request: TokenRequest, sink: Sink) -> RequestHandle:
        """Take a request; its events arrive at `sink`, in the loop's thread.

        Raises:
            UsageError: the loop is draining or stopped.
            Step35Error: the loop has failed; it is `failure`.
        """
        with self._changed:
            if self.failure is not None:
                raise self.failure
            if self._closed:
                raise UsageError("The serving loop takes no more requests: it is being stopped")
            handle = self._scheduler.submit(request, sink)
            self._idle = False
            self._changed.notify_all()
        return handle

    def metrics(self) -> Metrics:
        """Figures as of the end of the last step."""
        return self._metrics

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and wait until all is answered; False when `timeout` seconds were not enough."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: self._idle or self.failure is not None, timeout)

    def stop(self) -> None:
        """Take nothing new, cancel what there is, wait for the thread's end; not from a sink."""
        with self._changed:
            self._closed = self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._wait():
                self._scheduler.step()
                self._metrics = self._scheduler.metrics()
            self._scheduler.end_all()
        except BaseException as error:  # whatever it is, nobody may wait for an answer for ever
            self._fail(error)
        finally:
            with self._changed:
                self._closed = self._idle = True
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when the loop is to end."""
        with self._changed:
            self._idle = self._scheduler.idle
            if self._idle:
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or not self._scheduler.idle)
            return not self._stopping

    def _fail(self, error: BaseException) -> None:
        reason = error.message if isinstance(error, Step35Error) else f"{type(error).__name__}: {error}"
        first_line = (reason.splitlines() or [""])[0]
        with self._changed:
            self._closed = True
            self.failure = Step35Error(f"Serving stopped: {first_line}", "Restart it; the log has the rest.")
        _log.error("the serving loop failed", exc_info=error)
        self._scheduler.end_all(self.failure)
