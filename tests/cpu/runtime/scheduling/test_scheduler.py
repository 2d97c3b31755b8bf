from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from step35_trt.errors import DoesNotFitError, UsageError, VerificationError
from step35_trt.runtime.decoding.drafting import SHORT
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.scheduling.requests import (
    Event,
    Failed,
    Finished,
    Limits,
    RequestHandle,
    TokenRequest,
    Tokens,
)
from step35_trt.runtime.scheduling.room import PATIENCE
from step35_trt.runtime.scheduling.scheduler import Scheduler
from tests.cpu.runtime.bounded import BoundedSession
from tests.cpu.runtime.fakes import FakeModel, FakeSession, flat

MODEL = FakeModel.drawn(4)
SHARED = (1, 2, 3, 4, 5, 6, 7, 0, 1, 3, 5, 7)


@dataclass
class Recorder:
    """A sink that checks the order of events."""

    events: list[Event] = field(default_factory=list)
    cancel_after: int | None = None  # tokens
    handle: RequestHandle | None = None

    def __call__(self, event: Event) -> None:
        assert not self.end, "nothing may follow the last event"
        assert not isinstance(event, Tokens) or event.token_ids
        self.events.append(event)
        if self.cancel_after is not None and len(self.tokens) >= self.cancel_after and self.handle:
            self.handle.cancel()

    @property
    def tokens(self) -> list[int]:
        return [t for event in self.events if isinstance(event, Tokens) for t in event.token_ids]

    @property
    def end(self) -> list[Event]:
        return [event for event in self.events if not isinstance(event, Tokens)]

    @property
    def reason(self) -> str:
        (end,) = self.end
        assert isinstance(end, Finished), end
        return end.reason

    @property
    def error(self) -> Exception:
        (end,) = self.end
        assert isinstance(end, Failed)
        return end.error


def submit(scheduler: Scheduler, request: TokenRequest, cancel_after: int | None = None) -> Recorder:
    recorder = Recorder(cancel_after=cancel_after)
    recorder.handle = scheduler.submit(request, recorder)
    return recorder


def run_all(scheduler: Scheduler, turns: int = 5000) -> None:
    for _ in range(turns):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def alone(request: TokenRequest, model: FakeModel = MODEL, context: int = 4096) -> list[int]:
    """The answer without anything beside it."""
    return flat(
        generate(
            FakeSession(model, max_tokens=context),
            request.prompt_ids,
            request.sampling,
            max_tokens=request.max_tokens,
            stop_ids=request.stop_ids,
            draft_tokens=request.draft_tokens,
        )
    )


SAMPLING = st.sampled_from([SamplingParams(), SamplingParams(temperature=1.0, seed=5)])
REQUESTS = st.builds(
    TokenRequest,
    prompt_ids=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    max_tokens=st.integers(1, 30),
    sampling=SAMPLING,
    stop_ids=st.sampled_from([(), (3,)]),
    draft_tokens=st.sampled_from([0, 1, 2, 3, "auto"]),
    priority=st.integers(0, 2),
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(REQUESTS, st.integers(0, 12), st.sampled_from([None, None, None, 0, 1, 5])),
        min_size=1,
        max_size=10,
    ),
    shared=st.booleans(),
    chunk=st.sampled_from([4, 7, 16, 64]),
    step_tokens=st.sampled_from([None, 1, 6]),
    sequences=st.integers(1, 6),
    rows=st.sampled_from([80, 120, 4096]),
    whole=st.booleans(),
)
@example(  # finds no page in the turn in which the other one ends
    arrivals=[
        *[(TokenRequest([0], 1, draft_tokens=0), turns, None) for turns in (0, 0, 3)],
        (TokenRequest([0, 0, 0, 1, 0], 27, draft_tokens=0), 11, None),
        (TokenRequest([0] * 7, 19, draft_tokens=0), 0, None),
    ],
    shared=True,
    chunk=4,
    step_tokens=None,
    sequences=2,
    rows=80,
    whole=False,
)
def test_each_request_gets_exactly_what_it_gets_alone(
    arrivals: list[tuple[TokenRequest, int, int | None]],
    shared: bool,
    chunk: int,
    step_tokens: int | None,
    sequences: int,
    rows: int,
    whole: bool,
) -> None:
    """Random arrivals, cancellations from sinks, priorities, prompts that share beginnings, too few pages."""
    session = BoundedSession(MODEL, prefill_chunk=chunk, most_rows=rows, most_sequences=5, whole=whole)
    scheduler = Scheduler(session, Limits(sequences, step_tokens), clock=session.clock)
    recorders: list[tuple[TokenRequest, Recorder, int | None]] = []
    for request, turns, cancel_after in arrivals:
        prompt = [*SHARED * shared, *request.prompt_ids]
        asked = TokenRequest(**(vars(request) | {"prompt_ids": prompt}))
        recorders.append((asked, submit(scheduler, asked, cancel_after), cancel_after))
        for _ in range(turns):
            scheduler.step()
    run_all(scheduler)
    for request, recorder, cancel_after in recorders:
        expected = alone(request)
        assert recorder.tokens == expected[: len(recorder.tokens)]
        if recorder.reason == "cancelled":
            assert cancel_after is not None
            assert len(recorder.tokens) >= cancel_after
        else:
            assert recorder.tokens == expected
        (end,) = recorder.end
        assert isinstance(end, Finished)
        assert end.stats.generated_tokens == len(recorder.tokens)
        assert 0 <= end.queued_seconds <= (end.first_token_seconds or math.inf)
        assert (end.first_token_seconds or 0) <= end.total_seconds
    assert not session.open_sequences
    metrics = scheduler.metrics()
    assert (metrics.running, metrics.waiting, metrics.failed, metrics.free_rows) == (0, 0, 0, rows)
    assert metrics.finished + metrics.cancelled == len(recorders)
    assert metrics.generated_tokens == sum(len(recorder.tokens) for _, recorder, _ in recorders)
    assert metrics.step_tokens == sum(size for step in session.steps for _, size in step)
    limit = min(chunk, max(SHORT, step_tokens or chunk))
    assert all(sum(size for _, size in step) <= limit for step in session.steps)


def test_running_requests_share_each_step_and_a_long_prompt_fills_it_up() -> None:
    session = BoundedSession(MODEL, prefill_chunk=16)
    scheduler = Scheduler(session, clock=session.clock)
    short = [submit(scheduler, TokenRequest([k], 30, draft_tokens=1)) for k in range(3)]
    scheduler.step()
    long = submit(scheduler, TokenRequest([1] * 60, 4, draft_tokens=0))
    session.steps.clear()
    before = [len(recorder.tokens) for recorder in short]
    for _ in range(6):
        scheduler.step()
    assert [[size for _, size in step] for step in session.steps] == [[2, 2, 2, 10]] * 6
    # Nobody waited: each answer got at least a token from every one of these steps.
    assert all(len(r.tokens) - b >= 6 for r, b in zip(short, before, strict=True))
    assert len(long.tokens) == 1
    run_all(scheduler)


def test_rounds_leave_the_other_steps_to_prompts_and_draws() -> None:
    """In one turn; nobody waits, and nobody's depth is chosen by what the others' steps cost."""
    session = BoundedSession(MODEL, prefill_chunk=16, whole=True)
    scheduler = Scheduler(session, clock=session.clock)
    asked = [TokenRequest([k], 40, draft_tokens=2) for k in range(2)]
    asked += [TokenRequest([3], 40, SamplingParams(temperature=1.0, seed=1), draft_tokens=1)]
    asked += [TokenRequest([4], 40, SamplingParams(log_probabilities=True), draft_tokens=0)]
    recorders = [submit(scheduler, request) for request in asked]
    scheduler.step()
    long = submit(scheduler, TokenRequest([1] * 60, 4, draft_tokens=0))
    session.steps.clear()
    before = [len(recorder.tokens) for recorder in recorders]
    for _ in range(4):
        scheduler.step()
    assert [sorted(size for _, size in step) for step in session.steps] == [[1, 2, 13], [3, 3]] * 4
    assert all(len(r.tokens) - b >= 4 for r, b in zip(recorders, before, strict=True))
    run_all(scheduler)
    assert [recorder.tokens for recorder in recorders] == [alone(request) for request in asked]
    assert long.reason == "length"


def test_prompts_are_admitted_by_priority_and_then_arrival() -> None:
    session = BoundedSession(MODEL)
    scheduler = Scheduler(session, Limits(sequences=1), clock=session.clock)
    order: list[str] = []
    for name, priority in (("first", 1), ("second", 1), ("urgent", 0), ("late", 2), ("third", 1)):

        def sink(event: Event, name: str = name) -> None:
            if isinstance(event, Finished):
                order.append(name)

        scheduler.submit(TokenRequest([1, 2], 3, priority=priority), sink)
    run_all(scheduler)
    assert order == ["urgent", "first", "second", "third", "late"]


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 200), min_size=2, max_size=8),
    drafts=st.sampled_from([0, 3, "auto"]),
    budget=st.sampled_from([4, 8, 32]),
)
def test_a_running_request_never_waits_long(prompts: list[int], drafts: Any, budget: int) -> None:
    session = BoundedSession(MODEL, prefill_chunk=32)
    scheduler = Scheduler(session, Limits(step_tokens=budget), clock=session.clock)
    for place, length in enumerate(prompts):
        submit(scheduler, TokenRequest([place % 8] * length, 25, draft_tokens=drafts))
    while not scheduler.idle:
        scheduler.step()
        waits = [scheduler._turn - job.served for job in scheduler._running]
        assert all(wait <= PATIENCE + len(prompts) for wait in waits)


def test_a_cancelled_request_is_gone_before_the_next_step() -> None:
    session = BoundedSession(MODEL, prefill_chunk=16)
    scheduler = Scheduler(session, Limits(sequences=2), clock=session.clock)
    recorders = [submit(scheduler, TokenRequest([1] * n, 500, draft_tokens=0)) for n in (3, 100, 5)]
    for _ in range(3):
        scheduler.step()
    for recorder in recorders[1:]:  # in the middle of its prompt, and still waiting
        assert recorder.handle is not None
        recorder.handle.cancel()
        assert not recorder.handle.done
    session.steps.clear()
    scheduler.step()
    assert [len(step) for step in session.steps] == [1]
    assert len(session.open_sequences) == 1
    assert [recorder.reason for recorder in recorders[1:]] == ["cancelled"] * 2
    assert all(recorder.handle.done for recorder in recorders[1:] if recorder.handle)
    assert not recorders[0].end
    assert scheduler.metrics().cancelled == 2
    scheduler.end_all()
    assert recorders[0].reason == "cancelled"
    assert not session.open_sequences


def test_time_is_up_for_the_running_and_the_waiting() -> None:
    session = BoundedSession(MODEL)
    scheduler = Scheduler(session, Limits(sequences=1), clock=session.clock)
    first = submit(scheduler, TokenRequest([1, 2], 1000, draft_tokens=0, timeout=10))
    waiting = submit(scheduler, TokenRequest([1, 2], 5, timeout=5))
    patient = submit(scheduler, TokenRequest([1, 2], 5))
    run_all(scheduler)
    assert (first.reason, waiting.reason, patient.reason) == ("timeout", "timeout", "length")
    assert first.tokens == MODEL.greedy([1, 2], 1000)[: len(first.tokens)]
    assert 8 <= len(first.tokens) <= 11  # a step takes a second
    assert not waiting.tokens
    assert scheduler.metrics().timed_out == 2
    end = waiting.end[0]
    assert isinstance(end, Finished)
    assert end.first_token_seconds is None
    assert end.queued_seconds == end.total_seconds


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (TokenRequest([], 5), UsageError, "prompt is empty"),
        (TokenRequest([99], 5), UsageError, "vocabulary"),
        (TokenRequest([1], 0), UsageError, "max_tokens"),
        (TokenRequest([1], 5, draft_tokens=7), UsageError, "from 0 to 3"),
        (TokenRequest([1] * 5000, 5), DoesNotFitError, "no room"),
        (TokenRequest([1] * 200, 5), DoesNotFitError, "cache of 160 rows"),
    ],
)
def test_what_is_wrong_with_a_request_concerns_nobody_else(
    request_: TokenRequest, error: type[Exception], words: str
) -> None:
    session = BoundedSession(MODEL, most_rows=160)
    scheduler = Scheduler(session, clock=session.clock)
    good = submit(scheduler, TokenRequest([1, 2], 20))
    scheduler.step()
    bad = submit(scheduler, request_)
    run_all(scheduler)
    assert isinstance(bad.error, error)
    assert words in str(bad.error)
    assert good.tokens == MODEL.greedy([1, 2], 20)
    assert scheduler.metrics().failed == 1


def test_logits_that_are_not_finite_end_only_their_request() -> None:
    model = FakeModel.drawn(4)
    model.decoder[7, 7] = math.nan
    session = BoundedSession(model)
    scheduler = Scheduler(session, clock=session.clock)
    healthy = TokenRequest([1, 2], 8, draft_tokens=0)
    recorders = [submit(scheduler, r) for r in (healthy, TokenRequest([3, 7, 7], 8), healthy)]
    run_all(scheduler)
    assert isinstance(recorders[1].error, VerificationError)
    assert recorders[0].tokens == recorders[2].tokens == alone(healthy, model)
    assert not session.open_sequences


def test_a_sink_that_raises_loses_its_request_only() -> None:
    session = BoundedSession(MODEL)
    scheduler = Scheduler(session, clock=session.clock)
    calls = 0

    def broken(event: Event) -> None:
        nonlocal calls
        calls += 1
        raise ValueError

    handle = scheduler.submit(TokenRequest([1, 2], 50), broken)
    good = submit(scheduler, TokenRequest([1, 2], 20))
    run_all(scheduler)
    assert calls == 1
    assert handle.done
    assert good.tokens == MODEL.greedy([1, 2], 20)
    assert scheduler.metrics().cancelled == 1


def test_too_many_that_wait_are_refused_at_once() -> None:
    session = BoundedSession(MODEL)
    scheduler = Scheduler(session, Limits(sequences=2, waiting=1), clock=session.clock)
    recorders = [submit(scheduler, TokenRequest([1, 2], 9)) for _ in range(5)]
    scheduler.step()
    assert [bool(recorder.end) for recorder in recorders] == [False] * 3 + [True] * 2
    assert "1 requests wait already" in str(recorders[3].error)
    run_all(scheduler)
    assert [recorder.reason for recorder in recorders[:3]] == ["length"] * 3


def test_when_pages_run_out_the_last_in_rank_waits_and_goes_on() -> None:
    session = BoundedSession(MODEL, most_rows=64)
    scheduler = Scheduler(session, clock=session.clock)
    requests = [TokenRequest([k, 2], 40, draft_tokens=2) for k in range(3)]
    recorders = [submit(scheduler, request) for request in requests]
    run_all(scheduler)
    metrics = scheduler.metrics()
    assert metrics.preempted >= 2
    assert [recorder.tokens for recorder in recorders] == [MODEL.greedy([k, 2], 40) for k in range(3)]
    # The first in rank was never touched: it had one sequence from beginning to end.
    prompts = [sequence.decoder.tokens[:2] for sequence in session.opened]
    assert prompts.count([0, 2]) == 1
    assert prompts.count([2, 2]) > 1
    assert metrics.prompt_tokens == 6


def test_an_answer_that_outgrows_the_whole_cache_fails_with_what_it_said() -> None:
    session = BoundedSession(MODEL, most_rows=32)
    scheduler = Scheduler(session, clock=session.clock)
    recorder = submit(scheduler, TokenRequest([1, 2], 100, draft_tokens=0))
    run_all(scheduler)
    assert isinstance(recorder.error, DoesNotFitError)
    assert "cache of 32 rows" in str(recorder.error)
    assert recorder.tokens == MODEL.greedy([1, 2], 31)


def test_prompts_that_begin_alike_are_run_once() -> None:
    session = BoundedSession(MODEL, prefill_chunk=64)
    scheduler = Scheduler(session, clock=session.clock)
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, 8, 100).tolist()
    submit(scheduler, TokenRequest(prompt, 3))
    run_all(scheduler)
    session.steps.clear()
    recorder = submit(scheduler, TokenRequest([*prompt, 1, 2], 20))
    run_all(scheduler)
    assert recorder.tokens == MODEL.greedy([*prompt, 1, 2], 20)
    metrics = scheduler.metrics()
    assert metrics.prompt_tokens == 202
    assert metrics.reused_tokens == 96
    assert sum(size for _, size in session.steps[0]) == 6


def test_the_same_arrivals_make_the_same_steps() -> None:
    def steps() -> list[list[int]]:
        session = BoundedSession(MODEL, prefill_chunk=8)
        scheduler = Scheduler(session, Limits(sequences=3), clock=session.clock)
        for k in range(6):
            submit(scheduler, TokenRequest([k] * (5 * k + 1), 12, draft_tokens=k % 4))
            scheduler.step()
        run_all(scheduler)
        return [[size for _, size in step] for step in session.steps]

    assert steps() == steps()


def test_a_failing_session_is_no_request_s_fault() -> None:
    session = BoundedSession(MODEL)
    scheduler = Scheduler(session, clock=session.clock)
    submit(scheduler, TokenRequest([1, 2], 9))

    def broken(calls: Any) -> Any:
        raise RuntimeError("the device is gone")

    session.decode = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="gone"):
        scheduler.step()
