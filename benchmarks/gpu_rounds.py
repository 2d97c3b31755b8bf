"""What a greedy round takes as the host sees it: at once, and by steps whose results it fetches."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.runtime.cache.page_account import Growth
from step35_trt.runtime.decoding.drafting import take_back
from step35_trt.runtime.decoding.sampling import greedy
from step35_trt.runtime.programs.orders import StepOrder
from step35_trt.runtime.session import Call, RoundCall
from step35_trt.runtime.session_program import ProgramSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.config import Step35Config
    from step35_trt.runtime.device.device_runner import DeviceRunner
    from step35_trt.runtime.session import Floats
    from step35_trt.runtime.session_program import ProgramSequence

WARM = 1  # rounds before those that count: the first records
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Rounds:
    """Sequences of a length that stays as it is: a round's rows are taken back, so all rounds are alike.

    Attributes:
        session: On the runner that is timed.
        sequences: All of one length.
        ids: `[rows]`, their tokens.
    """

    session: ProgramSession
    sequences: list[ProgramSequence]
    ids: np.ndarray

    @classmethod
    def of(cls, config: Step35Config, runner: DeviceRunner, context: int) -> Rounds:
        """As many sequences as there are slots, of what lies in the pages."""
        extent = runner.layout.extent
        session = ProgramSession(config, runner, extent.rows, extent.call, extent.slots)
        ids = np.random.default_rng(context).integers(0, config.vocab_size, extent.rows)
        found = cls(session, [session.open() for _ in range(extent.slots)], ids)
        for sequence in found.sequences:
            for graph in range(len(runner.programs)):
                found._fill(runner, sequence, graph, context - graph)
        return found

    def _fill(self, runner: DeviceRunner, sequence: ProgramSequence, graph: int, length: int) -> None:
        """Give a sequence pages for so many rows of a graph without computing them."""
        rows = sequence.rows.of(graph)
        while rows.length < length:
            part = self.ids[rows.length : min(length, rows.length + runner.layout.extent.call)]
            order = StepOrder(graph, (sequence.slot,), (rows.length,), (len(part),), part, _NONE)
            growth = Growth(sequence.slot, rows, len(part))
            self.session.lead(order, [growth], lambda told: runner.kernels.caches.move(told.moves))
            rows.append(part.tolist())
            self.session.settled(sequence.rows, rows)

    def at_once(self, drafts: int) -> None:
        """A round by the session's own; modules begin as after one of which no draft stood."""
        rounds = self.session.rounds
        assert rounds is not None
        rows = self.sequences[0].length
        known = self.ids[: rows + 1].tolist()
        rounds.round([RoundCall(sequence, known, drafts, drafts) for sequence in self.sequences])
        self._take_back(rows, drafts)

    def by_steps(self, drafts: int) -> None:
        """The same with logits and hidden rows brought to the host, which chooses."""
        rows = self.sequences[0].length
        found = [[int(self.ids[rows])] for _ in self.sequences]
        width = self.session.config.hidden_size
        hidden: list[Floats] = [np.zeros((1, width), np.float32) for _ in self.sequences]
        for module in range(drafts):
            calls = []
            for sequence, newest, given in zip(self.sequences, found, hidden, strict=True):
                count = rows - sequence.draft_length(module)
                ids = np.array([*self.ids[rows + 1 - count : rows], *newest][-count:], np.int64)
                # The first ones are rows of earlier rounds, which the host has kept.
                carried = np.concatenate([np.zeros((count - len(given), width), np.float32), given])
                calls.append(Call(sequence, ids, np.array([count - 1]), carried))
            steps = self.session.draft(module, calls)
            hidden = [step.hidden for step in steps]
            for newest, step in zip(found, steps, strict=True):
                newest.append(int(greedy(step.logits)[0]))
        verified = [
            Call(sequence, np.array(newest), np.arange(len(newest)))
            for sequence, newest in zip(self.sequences, found, strict=True)
        ]
        for step in self.session.decode(verified):
            greedy(step.logits)
        self._take_back(rows, drafts)

    def seconds(self, work: Callable[[int], None], drafts: int, repeats: int) -> float:
        """Median time of a round of so many drafts."""
        taken = []
        for _ in range(WARM + repeats):
            started = time.perf_counter()
            work(drafts)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[WARM:])

    def _take_back(self, rows: int, drafts: int) -> None:
        for sequence in self.sequences:
            sequence.truncate(rows)
            take_back(sequence, rows - 1, drafts, 0)
