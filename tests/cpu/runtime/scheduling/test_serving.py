from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import pytest

from step35_trt.errors import Step35Error, UsageError
from step35_trt.runtime.scheduling.requests import Event, Failed, Finished, Limits, TokenRequest, Tokens
from step35_trt.runtime.scheduling.serving import ServingLoop
from tests.cpu.runtime.bounded import BoundedSession
from tests.cpu.runtime.fakes import FakeModel

MODEL = FakeModel.drawn(4)


def wait(events: SimpleQueue[Event]) -> tuple[list[int], Event]:
    """All of a request's events: its tokens and the last one."""
    tokens: list[int] = []
    while isinstance(event := events.get(timeout=20), Tokens):
        tokens += event.token_ids
    return tokens, event


class Gate(BoundedSession):
    """A session whose decoder steps wait until the test lets them pass."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(MODEL, **settings)
        self.passing = threading.Event()
        self.reached = threading.Event()

    def decode(self, calls: Any) -> Any:
        self.reached.set()
        assert self.passing.wait(20)
        return super().decode(calls)


def test_requests_from_many_threads_are_answered_together() -> None:
    session = BoundedSession(MODEL)
    results: dict[int, list[int]] = {}

    def ask(loop: ServingLoop, place: int) -> None:
        events: SimpleQueue[Event] = SimpleQueue()
        loop.submit(TokenRequest([place, 1], 30), events.put)
        tokens, end = wait(events)
        assert isinstance(end, Finished)
        results[place] = tokens

    with ServingLoop(session, Limits(sequences=4)) as loop:
        threads = [threading.Thread(target=ask, args=(loop, place)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert loop.drain(20)
        metrics = loop.metrics()
    assert results == {place: MODEL.greedy([place, 1], 30) for place in range(8)}
    assert (metrics.finished, metrics.running, metrics.waiting) == (8, 0, 0)
    assert not session.open_sequences


def test_draining_answers_what_is_there_and_takes_nothing_new() -> None:
    session = Gate()
    with ServingLoop(session) as loop:
        events: SimpleQueue[Event] = SimpleQueue()
        loop.submit(TokenRequest([1, 2], 9, draft_tokens=0), events.put)
        assert session.reached.wait(20)
        assert not loop.drain(0.01)
        with pytest.raises(UsageError, match="no more requests"):
            loop.submit(TokenRequest([1, 2], 9), events.put)
        session.passing.set()
        assert loop.drain(20)
        assert wait(events)[0] == MODEL.greedy([1, 2], 9)


def test_stopping_cancels_what_is_there() -> None:
    session = Gate()
    loop = ServingLoop(session, Limits(sequences=1))
    queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in range(3)]
    handles = [loop.submit(TokenRequest([1, 2], 4000), events.put) for events in queues]
    assert session.reached.wait(20)
    session.passing.set()
    loop.stop()
    loop.stop()
    ends = [wait(events)[1] for events in queues]
    assert [end.reason for end in ends if isinstance(end, Finished)] == ["cancelled"] * 3
    assert all(handle.done for handle in handles)
    assert not session.open_sequences
    with pytest.raises(UsageError):
        loop.submit(TokenRequest([1], 1), queues[0].put)


def test_a_handle_cancels_from_another_thread() -> None:
    session = Gate()
    session.passing.set()
    with ServingLoop(session) as loop:
        events: SimpleQueue[Event] = SimpleQueue()
        handle = loop.submit(TokenRequest([1, 2], 4000), events.put)
        assert isinstance(events.get(timeout=20), Tokens)
        handle.cancel()
        _, end = wait(events)
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"
        assert loop.drain(20)


def test_a_broken_session_is_one_sentence_to_everybody() -> None:
    session = Gate()

    def broken(calls: Any) -> Any:
        session.reached.set()
        assert session.passing.wait(20)
        raise RuntimeError("the device is gone\nand more")

    session.decode = broken  # type: ignore[method-assign]
    with ServingLoop(session, Limits(sequences=1)) as loop:
        queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in range(2)]
        for events in queues:
            loop.submit(TokenRequest([1, 2], 9), events.put)
        assert session.reached.wait(20)
        session.passing.set()
        for events in queues:
            _, end = wait(events)
            assert isinstance(end, Failed)
            assert end.error.message == "Serving stopped: RuntimeError: the device is gone"
        assert loop.drain(20)
        with pytest.raises(Step35Error, match="the device is gone"):
            loop.submit(TokenRequest([1], 1), queues[0].put)
        assert loop.failure is not None


def test_a_sink_may_submit() -> None:
    with ServingLoop(BoundedSession(MODEL)) as loop:
        events: SimpleQueue[Event] = SimpleQueue()

        def again(event: Event) -> None:
            if isinstance(event, Finished):
                loop.submit(TokenRequest([3, 4], 5), events.put)

        loop.submit(TokenRequest([1, 2], 5), again)
        assert wait(events)[0] == MODEL.greedy([3, 4], 5)
