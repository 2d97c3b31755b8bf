"""Many generations at once: continuous batching over the packed steps of a session.

A turn runs each graph at most once, the MTP modules in order and then the decoder, each over the calls that
running requests wait for. So requests that decode draft together and are verified together, in one decoder
step that prompts fill up chunk by chunk (iteration-level scheduling: Yu et al., Orca, OSDI 2022; prompts in
chunks beside decoding: Agrawal et al., Sarathi-Serve, arXiv 2403.02310). A request that needs a graph which
the turn has passed waits for the next turn. Who gets a place in a step: `runtime/scheduling/room.py`.

Where the session runs whole rounds (`session.Rounds`), a turn ends with one packed round of all requests that
take part in them. Prompts and requests whose logits the host needs then have the other steps to themselves:
what reading the weights twice costs in such a turn, rounds spare in copies of logits and hidden rows.

Cache rows are not reserved for whole answers, whose length nobody knows. A request is admitted when its
prompt fits beside the prompts of those that run. When an answer then finds no page, the running request of
the last rank gives up its sequence and goes back to its place among those that wait; later its tokens so far
are run like a prompt, mostly from cached pages, and the answer goes on as if nothing had happened. The one
of the first rank is never disturbed, so everything ends.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from itertools import count
from typing import TYPE_CHECKING

from step35_trt.errors import DoesNotFitError, Step35Error
from step35_trt.runtime.decoding.calls import ModelCall, WholeRound
from step35_trt.runtime.decoding.drafting import SHORT
from step35_trt.runtime.decoding.generation import Generation
from step35_trt.runtime.scheduling.job import Job
from step35_trt.runtime.scheduling.requests import Limits, Metrics
from step35_trt.runtime.scheduling.room import fits, select, too_large
from step35_trt.runtime.scheduling.turn_depth import TurnDepths
from step35_trt.runtime.session import rounds_of

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.calls import Graph, Needed
    from step35_trt.runtime.decoding.generation import Clock
    from step35_trt.runtime.scheduling.requests import Ended, RequestHandle, Sink, TokenRequest
    from step35_trt.runtime.session import RoundResult, Session, Step


class Scheduler:
    """Requests in, events out, one turn at a time.

    `submit`, and `cancel` of what it returns, may be called from any thread; `step` and `metrics` from one.
    Given the same arrivals between the same turns, what runs when is the same, but for the depths that follow
    from measured costs; no answer depends on those (but see `TokenRequest.sampling`).

    Args:
        session: A loaded bundle, used by nobody else meanwhile.
        limits: How much to take on.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, session: Session, limits: Limits | None = None, *, clock: Clock = time.monotonic
    ) -> None:
        limits = limits or Limits()
        heads = session.config.num_nextn_predict_layers
        chunk = session.prefill_chunk
        wanted = chunk if limits.step_tokens is None else min(limits.step_tokens, chunk)
        self._session = session
        self._limits = limits
        self._clock = clock
        # A call that cannot be cut may be so long: a verification, or drafting after a short backlog.
        self._step_tokens = max(wanted, min(max(heads + 1, SHORT), chunk))
        self._rounds = rounds_of(session)
        self._graphs: tuple[Graph, ...] = (*range(heads), None, "round")
        self._depths = TurnDepths(session, self._step_tokens)
        self._arrived: deque[Job] = deque()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._numbers = count()
        self._turn = 0
        self._stuck = False  # whether a running request found no page
        self._counts: Counter[str] = Counter()
        self._drafted = [0] * heads  # of ended requests, as what follows
        self._accepted = [0] * heads

    def submit(self, request: TokenRequest, sink: Sink) -> RequestHandle:
        """Take a request; all that is wrong with it arrives at the sink."""
        job = Job(request, sink, next(self._numbers), self._clock())
        self._arrived.append(job)
        return job

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._arrived or self._waiting or self._running)

    def step(self) -> None:
        """Run one turn: end what is to end, admit, and run each graph for those that wait for it.

        Raises:
            Exception: anything but a request's own error; the session's state is unknown then.
        """
        self._turn += 1
        self._look_at_arrivals()
        self._end_early()
        self._admit()
        self._refuse_overflow()
        running = len(self._running)
        served = [self._run(graph) for graph in self._graphs]
        # Who ended in this turn has made room.
        if len(self._running) == running > 0 and (self._stuck or not any(served)):
            self._make_room()
        self._stuck = False

    def end_all(self, error: Step35Error | None = None) -> None:
        """End every request, as cancelled or with an error."""
        self._look_at_arrivals()
        for job in (*self._running, *self._waiting):
            if error is None:
                self._end(job, "cancelled")
            else:
                self._fail(job, error)

    def metrics(self) -> Metrics:
        """The figures up to now."""
        counts = self._counts
        drafted, accepted = list(self._drafted), list(self._accepted)
        for job in (*self._running, *self._waiting):
            job.count_drafts(drafted, accepted)
        return Metrics(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._arrived),
            finished=counts["stop"] + counts["length"],
            cancelled=counts["cancelled"],
            timed_out=counts["timeout"],
            failed=counts["failed"],
            preempted=counts["preempted"],
            prompt_tokens=counts["prompt_tokens"],
            reused_tokens=counts["reused_tokens"],
            generated_tokens=counts["generated_tokens"],
            steps=counts["steps"],
            step_tokens=counts["step_tokens"],
            drafted=tuple(drafted),
            accepted=tuple(accepted),
            free_rows=self._session.capacity.rows,
        )

    def _look_at_arrivals(self) -> None:
        while self._arrived:
            job = self._arrived.popleft()
            self._waiting.append(job)
            request = job.request
            job.member = self._depths.member(request)
            try:
                job.generation = Generation(
                    self._session,
                    request.prompt_ids,
                    request.sampling,
                    max_tokens=request.max_tokens,
                    stop_ids=request.stop_ids,
                    draft_tokens=request.draft_tokens if job.member is None else job.member,
                    clock=self._clock,
                )
            except Step35Error as error:
                self._fail(job, error)

    def _end_early(self) -> None:
        now = self._clock()
        for job in (*self._running, *self._waiting):
            if job.cancelled:
                self._end(job, "cancelled")
            elif job.expired(now):
                self._end(job, "timeout")

    def _admit(self) -> None:
        """Start those that wait, in order of rank; who does not fit is not overtaken."""
        self._waiting.sort(key=lambda job: job.rank)
        for job in tuple(self._waiting):
            capacity = self._session.capacity
            if len(self._running) >= self._limits.sequences or capacity.sequences < 1:
                return
            if not fits(job, self._running, capacity):
                if self._running:
                    return
                self._fail(job, too_large(job, capacity.rows))
                continue
            self._waiting.remove(job)
            self._running.append(job)
            self._start(job)

    def _start(self, job: Job) -> None:
        try:
            first = job.start(self._clock())
        except Step35Error as error:
            self._fail(job, error)
            return
        job.served = self._turn
        if first and job.generation is not None:
            self._counts["prompt_tokens"] += job.generation.stats.prompt_tokens
            self._counts["reused_tokens"] += job.generation.stats.reused_tokens

    def _refuse_overflow(self) -> None:
        if self._limits.waiting is None:
            return
        new = [job for job in self._waiting if not job.admitted]
        new.sort(key=lambda job: job.number)
        for job in new[self._limits.waiting :]:
            waiting = f"{self._limits.waiting} requests wait already"
            self._fail(job, DoesNotFitError(waiting, "Try again when some are answered."))

    def _run(self, graph: Graph) -> int:
        """One packed step of a graph; returns how many requests it served."""
        waiting = [job for job in self._running if job.needed is not None and job.needed.graph == graph]
        if not waiting:
            return 0
        chosen, stuck = select(waiting, self._turn, self._step_tokens, self._session.capacity)
        self._stuck |= stuck
        if not chosen:
            return 0
        started = self._clock()
        try:
            results = self._call(graph, [needed for _, needed in chosen])
        except DoesNotFitError:  # nothing has changed
            self._stuck = True
            return 0
        tokens = [len(needed) for _, needed in chosen]
        if graph is None or graph == "round":
            self._counts["steps"] += 1
            self._counts["step_tokens"] += sum(tokens)
            # Before the results are handed out, when the next round begins.
            self._depths.choose(graph, self._running, chosen)
        for (job, _), result in zip(chosen, results, strict=True):
            self._advance(job, result)
        self._depths.record(graph, tokens, self._clock() - started)
        return len(chosen)

    def _call(self, graph: Graph, calls: SequenceOf[Needed]) -> SequenceOf[Step | RoundResult]:
        if graph == "round":
            assert self._rounds is not None
            return self._rounds.round([needed.call for needed in calls if isinstance(needed, WholeRound)])
        steps = [needed.call for needed in calls if isinstance(needed, ModelCall)]
        return self._session.decode(steps) if graph is None else self._session.draft(graph, steps)

    def _advance(self, job: Job, result: Step | RoundResult) -> None:
        assert job.calls is not None
        assert job.generation is not None
        job.served = self._turn
        stats = job.generation.stats
        failure: Step35Error | None = None
        try:
            job.needed = job.calls.send(result)
        except StopIteration:
            pass
        except Step35Error as error:
            failure = error
        self._counts["generated_tokens"] += job.tell_tokens(self._clock())
        if failure is not None:
            self._fail(job, failure)
        elif stats.finish_reason is not None:
            self._end(job, stats.finish_reason)

    def _make_room(self) -> None:
        """Take the sequence of the last rank back."""
        last = max(self._running, key=lambda job: job.rank)
        if len(self._running) == 1:
            self._fail(last, too_large(last, self._session.capacity.rows + last.rows))
            return
        last.give_back()
        self._running.remove(last)
        self._waiting.append(last)
        self._counts["preempted"] += 1

    def _end(self, job: Job, reason: Ended) -> None:
        self._forget(job)
        self._counts[reason] += 1
        job.tell_end(reason, self._clock())

    def _fail(self, job: Job, error: Step35Error) -> None:
        self._forget(job)
        self._counts["failed"] += 1
        job.tell_failure(error)

    def _forget(self, job: Job) -> None:
        job.count_drafts(self._drafted, self._accepted)
        for jobs in (self._running, self._waiting):
            if job in jobs:
                jobs.remove(job)
