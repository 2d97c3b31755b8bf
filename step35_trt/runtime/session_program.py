"""The session protocol over programs run by torch, by one process or by several that share the model.

Every rank runs every step on its share. Rank 0 has the session: it tells the others each packed step and
hands out the results. What a follower knows of a sequence are its caches, by slot: rows of its own, or lines
of pages that rank 0 gives out (`PageAccount`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.cache.kv_rows import CachedRows
from step35_trt.runtime.cache.kv_sequence import SequenceRows
from step35_trt.runtime.cache.page_account import Growth, PageAccount
from step35_trt.runtime.packing import Packed, check_context
from step35_trt.runtime.programs.leading import lead
from step35_trt.runtime.programs.orders import DECODER, StepOrder
from step35_trt.runtime.programs.round_order import RoundOrder
from step35_trt.runtime.session import Call, Capacity, Step
from step35_trt.runtime.session_rounds import SessionRounds

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from step35_trt.config import Step35Config
    from step35_trt.runtime.cache.cache_extent import CacheLayout
    from step35_trt.runtime.device.round_runner import RoundRunner
    from step35_trt.runtime.programs.program_torch import TorchExecutor
    from step35_trt.runtime.programs.ranks import Ranks
    from step35_trt.runtime.session import Floats, Ids
    from step35_trt.steps import StepProgram

Order = TypeVar("Order", StepOrder, RoundOrder)
R = TypeVar("R")


class Runner(Protocol):
    """What a session has run."""

    @property
    def executor(self) -> TorchExecutor:
        """Of the programs."""
        ...

    @property
    def programs(self) -> tuple[StepProgram, ...]:
        """The decoder's, then the modules'."""
        ...

    @property
    def layout(self) -> CacheLayout | None:
        """The pages that it has; None where each slot keeps rows of its own."""
        ...

    @property
    def ranks(self) -> Ranks | None:
        """The other ranks; None where there are none."""
        ...

    @property
    def rounds(self) -> RoundRunner | None:
        """Runs rounds at once; None where steps are all that it runs."""
        ...

    def check(self, step: StepOrder) -> None:
        """See that a step can be run.

        Raises:
            DoesNotFitError: it cannot; nothing has changed.
        """
        ...

    def run(self, step: StepOrder, hidden: Floats | None = None) -> tuple[Tensor, Tensor]:
        """Run a step on this rank's share; logits and hidden rows, which the next run overwrites.

        Args:
            step: The same on all ranks.
            hidden: Of an MTP module's step, packed; rank 0's goes to all.
        """
        ...


@dataclass
class ProgramSession:
    """`Session` on rank 0.

    Attributes:
        config: The model.
        runner: This rank's share of the work; where there are several, it leads the others.
        max_tokens: See `Session`.
        prefill_chunk: See `Session`.
        max_sequences: How many may be open at once.
    """

    config: Step35Config
    runner: Runner
    max_tokens: int
    prefill_chunk: int = 512
    max_sequences: int = 1
    _open: dict[int, SequenceRows] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)
    _ended: list[int] = field(default_factory=list)  # and not yet taken notice of
    _closed: list[int] = field(default_factory=list)  # since the last step
    _account: PageAccount | None = None

    def __post_init__(self) -> None:
        self._free += reversed(range(self.max_sequences))
        if self.runner.layout is not None:
            self._account = PageAccount(self.runner.layout)

    @property
    def capacity(self) -> Capacity:
        """See `Session`; rows that slots keep grow as they are filled, and only the slots bound them."""
        self._notice()
        if self._account is not None:
            return Capacity(len(self._free), self._account.free_rows, self._account.layout.extent.page)
        held = sum(rows.length(DECODER) for rows in self._open.values())
        return Capacity(len(self._free), self.max_sequences * self.max_tokens - held, page_rows=1)

    @property
    def rounds(self) -> SessionRounds | None:
        """See `session.OffersRounds`; with pages for as much as a round may add to a sequence."""
        runner, layout = self.runner.rounds, self.runner.layout
        if runner is None or layout is None or layout.extent.call < 2 * runner.queries:
            return None
        return SessionRounds(self, runner)

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> ProgramSequence:
        """See `Session`; without pages nothing is left of earlier sequences."""
        self._notice()
        if not self._free:
            raise DoesNotFitError(
                f"{self.max_sequences} sequences are open, as many as this bundle holds at once",
                "Close one, or build the bundle with a larger max_sequences.",
            )
        slot = self._free.pop()
        rows = self._open[slot] = SequenceRows(self._account.rows if self._account else _slot_rows)
        if self._account is not None and prompt_ids is not None:
            every = len(self.runner.programs) - 1
            rows.begin_with(prompt_ids.tolist(), every if modules is None else modules)
        sequence = ProgramSequence(self, slot, rows)
        # A collector may call this in the middle of anything, so the end is only written down.
        sequence.end = weakref.finalize(sequence, self._ended.append, slot)
        sequence.end.atexit = False
        return sequence

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self._run(DECODER, calls)

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self._run(1 + module, calls)

    def _run(self, graph: int, calls: SequenceOf[Call]) -> list[Step]:
        growths = [Growth(_own(c).slot, _own(c).rows.of(graph), len(c.token_ids)) for c in calls]
        pasts, packed = tuple(growth.rows.length for growth in growths), Packed.of(calls)
        check_context(calls, pasts, self.max_tokens)
        slots = tuple(growth.slot for growth in growths)
        order = StepOrder(graph, slots, pasts, packed.lengths, packed.token_ids, packed.rows)
        out = self.lead(order, growths, partial(self._step, packed.hidden))
        for call, growth in zip(calls, growths, strict=True):
            growth.rows.append(call.token_ids.tolist())
            self.settled(_own(call).rows, growth.rows)
        return packed.split(*(value.to("cpu", torch.float32, copy=True).numpy() for value in out))

    def lead(self, order: Order, growths: SequenceOf[Growth], run: Callable[[Order], R]) -> R:
        """Have all ranks do what an order says, with the pages that it needs.

        Args:
            order: Without what lines have to change, and without the slots that were closed.
            growths: What it adds.
            run: Does it here.

        Raises:
            DoesNotFitError: there are not so many pages, or `run` does not find it possible; nothing has
                changed.
        """
        self._notice()
        closed, account = tuple(self._closed), self._account
        if account is None:
            out = run(replace(order, closed=closed))
        else:
            moves = account.grow(growths)
            try:
                out = run(replace(order, closed=closed, moves=moves))
            except DoesNotFitError:
                account.take_back(growths)
                raise
            account.told(growths)
        del self._closed[: len(closed)]
        return out

    def settled(self, sequence: SequenceRows, rows: CachedRows) -> None:
        """Of rows that a sequence has just got: see `SequenceRows.settled`."""
        if self._account is not None:
            sequence.settled(rows)

    def _step(self, hidden: Floats | None, order: StepOrder) -> tuple[Tensor, Tensor]:
        self.runner.check(order)
        return lead(self.runner.ranks, order, partial(self.runner.run, order, hidden))

    def _notice(self) -> None:
        """Take back what sequences had that have ended."""
        while self._ended:
            slot = self._ended.pop()
            self._open.pop(slot).close()
            self._free.append(slot)
            self._closed.append(slot)


@dataclass(eq=False)
class ProgramSequence:
    """`Sequence` as rank 0 counts it; the rows themselves lie in every rank's caches, under the slot."""

    session: ProgramSession
    slot: int
    rows: SequenceRows
    end: Callable[[], object] = lambda: None

    @property
    def length(self) -> int:
        """See `Sequence`."""
        return self.rows.length(DECODER)

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.decode([Call(self, token_ids, rows)])[0]

    def truncate(self, length: int) -> None:
        """See `Sequence`; the next step's order says so to the ranks."""
        self.rows.of(DECODER).truncate(length)

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self.rows.length(1 + module)

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.draft(module, [Call(self, token_ids, rows, hidden)])[0]

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self.rows.of(1 + module).truncate(length)

    def close(self) -> None:
        """See `Sequence`; with pages, what it leaves behind can be found until they are needed."""
        self.end()
        self.session._notice()


def _slot_rows(graph: int) -> CachedRows:
    return CachedRows((), ahead=graph - DECODER)


def _own(call: Call) -> ProgramSequence:
    assert isinstance(call.sequence, ProgramSequence)
    return call.sequence
