"""Several ranks in one process: a thread for each, which meet where their programs exchange something."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from step35_trt.runtime.session import Call

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from step35_trt.config import Step35Config
    from step35_trt.interpret.executor import Exchange
    from step35_trt.interpret.network import Array
    from step35_trt.interpret.session import InterpretedSequence, InterpretedSession
    from step35_trt.runtime.session import Capacity, Floats, Ids, Step
    from step35_trt.steps import CollectiveStep

T = TypeVar("T")


@dataclass
class Meeting:
    """Where ranks exchange what they have; sums are taken in fp32 and rounded once."""

    ranks: int
    _brought: dict[int, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.ranks)

    def exchange(self, rank: int) -> Exchange:
        """The `Exchange` of a rank, whose thread waits for all others."""

        def exchanged(step: CollectiveStep, value: Array) -> Array:
            self._brought[rank] = value.copy()
            self._barrier.wait()
            parts = [self._brought[r].astype(np.float32) for r in range(self.ranks)]
            self._barrier.wait()  # nobody brings the next before all have taken this
            whole = np.sum(parts, 0) if step.operation == "all_reduce" else np.concatenate(parts, -1)
            return whole.astype(value.dtype)

        return exchanged

    def all(self, work: Callable[[int], T]) -> list[T]:
        """What `work` gives for each rank, done by all at once.

        Raises:
            Exception: the first that a rank raised; the others do not wait for it.
        """

        def guarded(rank: int) -> T:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        if self.ranks == 1:
            return [work(0)]
        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.ranks)]
        failures = [failure for future in futures if (failure := future.exception())]
        for failure in sorted(failures, key=lambda f: isinstance(f, threading.BrokenBarrierError)):
            self._barrier.reset()
            raise failure
        return [future.result() for future in futures]


@dataclass(frozen=True)
class RankedSession:
    """`Session` over the programs of all ranks, which compute every step together.

    Attributes:
        ranks: Each rank's, whose executor exchanges through `meeting`.
        meeting: Of them.
    """

    ranks: tuple[InterpretedSession, ...]
    meeting: Meeting

    @classmethod
    def alone(cls, session: InterpretedSession) -> RankedSession:
        """A session that shares nothing."""
        return cls((session,), Meeting(1))

    @property
    def config(self) -> Step35Config:
        """See `Session`."""
        return self.ranks[0].config

    @property
    def prefill_chunk(self) -> int:
        """See `Session`."""
        return self.ranks[0].prefill_chunk

    @property
    def max_tokens(self) -> int:
        """See `Session`."""
        return self.ranks[0].max_tokens

    @property
    def capacity(self) -> Capacity:
        """See `Session`."""
        return self.ranks[0].capacity

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> RankedSequence:
        """See `Session`; nothing is kept of earlier sequences."""
        return RankedSequence(self, tuple(rank.open(prompt_ids, modules) for rank in self.ranks))

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self.meeting.all(lambda rank: self.ranks[rank].decode(_of_rank(calls, rank)))[0]

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self.meeting.all(lambda rank: self.ranks[rank].draft(module, _of_rank(calls, rank)))[0]


@dataclass(frozen=True)
class RankedSequence:
    """`Sequence` that every rank has; all end up with the same results, of which the first's are given."""

    session: RankedSession
    ranks: tuple[InterpretedSequence, ...]

    @property
    def length(self) -> int:
        """See `Sequence`."""
        return self.ranks[0].length

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.decode([Call(self, token_ids, rows)])[0]

    def truncate(self, length: int) -> None:
        """See `Sequence`."""
        for rank in self.ranks:
            rank.truncate(length)

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self.ranks[0].draft_length(module)

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.draft(module, [Call(self, token_ids, rows, hidden)])[0]

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        for rank in self.ranks:
            rank.truncate_draft(module, length)

    def close(self) -> None:
        """See `Sequence`."""
        for rank in self.ranks:
            rank.close()


def _of_rank(calls: SequenceOf[Call], rank: int) -> list[Call]:
    found = []
    for call in calls:
        assert isinstance(call.sequence, RankedSequence)
        found.append(replace(call, sequence=call.sequence.ranks[rank]))
    return found
