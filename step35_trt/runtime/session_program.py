"""The session protocol over programs run by torch, by one process or by several that share the model.

Every rank runs every step on its share. Rank 0 has the session: it tells the others each packed step and
hands out the results. What a follower knows of a sequence are its caches, by slot.
"""

from __future__ import annotations

import signal
import sys
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch

from step35_trt.dialects.torch import SequenceBatch
from step35_trt.errors import DoesNotFitError, RankLostError
from step35_trt.runtime.orders import DECODER, StepOrder
from step35_trt.runtime.packing import Packed, check_context
from step35_trt.runtime.program_weights import DTYPES
from step35_trt.runtime.session import Call, Capacity, Step

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from step35_trt.config import Step35Config
    from step35_trt.dialects.torch import Rows
    from step35_trt.runtime.program_torch import TorchExecutor
    from step35_trt.runtime.ranks import Ranks
    from step35_trt.runtime.session import Floats, Ids
    from step35_trt.steps import StepProgram


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

    def lead(self, step: StepOrder, hidden: Floats | None) -> tuple[Tensor, Tensor]:
        """Run a step; logits and hidden rows, which the next run overwrites.

        Args:
            step: What to run.
            hidden: Of an MTP module's step, packed.
        """
        ...


@dataclass
class RankRunner:
    """Runs packed steps on what one rank holds.

    Attributes:
        executor: Of the programs.
        programs: The decoder's, then the modules'.
        ranks: The others; None where there are none.
    """

    executor: TorchExecutor
    programs: tuple[StepProgram, ...]
    ranks: Ranks | None = None
    _slots: dict[int, dict[int, Rows]] = field(default_factory=dict)

    def run(self, step: StepOrder, hidden: Floats | None = None) -> tuple[Tensor, Tensor]:
        """Run a step; logits and hidden rows, which the next run overwrites.

        Args:
            step: The same on all ranks.
            hidden: Of an MTP module's step, packed; rank 0's goes to all.
        """
        for slot in step.closed:
            self._slots.pop(slot, None)
        program = self.programs[step.graph]
        caches = tuple(self._slots.setdefault(slot, {}) for slot in step.slots)
        for past, kept in zip(step.pasts, caches, strict=True):
            for layer in _layers(program) & kept.keys():
                kept[layer].truncate(past)
        inputs = {"token_ids": torch.from_numpy(step.token_ids), "rows": torch.from_numpy(step.rows)}
        if step.graph != DECODER:
            inputs["carried"] = self._carried(program, len(step.token_ids), hidden)
        outputs = self.executor.run(program, inputs, SequenceBatch(step.lengths, step.pasts, caches))
        return outputs["logits"], outputs["hidden"]

    def follow(self) -> NoReturn:
        """What all ranks but the first do: run what they are told until there is no more.

        Raises:
            RankLostError: a rank ended, and it is for this one to say so.
            SystemExit: the work is done.
        """
        assert self.ranks is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's processes rank 0 decides
        try:
            while (order := self.ranks.hear()) is not None:
                with self.ranks.working():
                    self.run(StepOrder.decode(order))
            self.ranks.part()
        except RankLostError as error:
            if self.ranks.speaks:
                raise
            sys.exit(error.exit_code)
        sys.exit(0)

    def lead(self, step: StepOrder, hidden: Floats | None) -> tuple[Tensor, Tensor]:
        """Rank 0: run a step with all others."""
        if self.ranks is None:
            return self.run(step, hidden)
        with self.ranks.working():
            self.ranks.tell(step.encoded())
            return self.run(step, hidden)

    def _carried(self, program: StepProgram, tokens: int, hidden: Floats | None) -> Tensor:
        buffer = next(b for b in program.buffers if b.name == program.inputs["carried"])
        dtype, device = DTYPES[program.activation], self.executor.weights.device
        if hidden is None:
            carried = torch.empty(tokens, buffer.width, dtype=dtype, device=device)
        else:
            carried = torch.from_numpy(hidden).to(device, dtype)
        if self.ranks is not None:
            self.ranks.share(carried)
        return carried


def _layers(program: StepProgram) -> set[int]:
    """Layers whose caches a graph has."""
    calls = (step.call for step in program.steps if step.kind == "kernel")
    return {call.layer for call in calls if call.plugin == "gated_attention"}


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
    _sequences: weakref.WeakSet[ProgramSequence] = field(default_factory=weakref.WeakSet)
    _free: list[int] = field(default_factory=list)
    _closed: list[int] = field(default_factory=list)  # since the last step

    def __post_init__(self) -> None:
        self._free += reversed(range(self.max_sequences))

    @property
    def capacity(self) -> Capacity:
        """See `Session`; caches grow as they are filled, so rows are bounded by the sequences alone."""
        held = sum(sequence.length for sequence in self._sequences)
        return Capacity(len(self._free), self.max_sequences * self.max_tokens - held, page_rows=1)

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> ProgramSequence:
        """See `Session`; nothing is left of earlier sequences."""
        if not self._free:
            raise DoesNotFitError(
                f"{self.max_sequences} sequences are open, as many as this bundle holds at once",
                "Close one, or build the bundle with a larger max_sequences.",
            )
        sequence = ProgramSequence(self, self._free.pop())
        self._sequences.add(sequence)
        sequence.end = weakref.finalize(sequence, self._end, sequence.slot)
        sequence.end.atexit = False
        return sequence

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        pasts = [_own(call).length for call in calls]
        check_context(calls, pasts, self.max_tokens)
        steps = self._run(DECODER, calls, pasts)
        for call, past in zip(calls, pasts, strict=True):
            _own(call).length = past + len(call.token_ids)
        return steps

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        pasts = [_own(call).draft_length(module) for call in calls]
        steps = self._run(1 + module, calls, pasts)
        for call, past in zip(calls, pasts, strict=True):
            _own(call).drafts[module] = past + len(call.token_ids)
        return steps

    def _run(self, graph: int, calls: SequenceOf[Call], pasts: list[int]) -> list[Step]:
        packed = Packed.of(calls)
        slots = tuple(_own(call).slot for call in calls)
        closed, self._closed = tuple(self._closed), []
        order = StepOrder(graph, slots, tuple(pasts), packed.lengths, packed.token_ids, packed.rows, closed)
        out = self.runner.lead(order, packed.hidden)
        return packed.split(*(value.to("cpu", torch.float32, copy=True).numpy() for value in out))

    def _end(self, slot: int) -> None:
        self._free.append(slot)
        self._closed.append(slot)


@dataclass(eq=False)
class ProgramSequence:
    """`Sequence` as rank 0 counts it; the rows themselves lie in every rank's caches, under the slot."""

    session: ProgramSession
    slot: int
    length: int = 0
    drafts: dict[int, int] = field(default_factory=dict)
    end: Callable[[], object] = lambda: None

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.decode([Call(self, token_ids, rows)])[0]

    def truncate(self, length: int) -> None:
        """See `Sequence`; the next step's order says so to the ranks."""
        self.length = length

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self.drafts.get(module, 0)

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.draft(module, [Call(self, token_ids, rows, hidden)])[0]

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self.drafts[module] = length

    def close(self) -> None:
        """See `Sequence`."""
        self.length = 0
        self.end()


def _own(call: Call) -> ProgramSequence:
    assert isinstance(call.sequence, ProgramSequence)
    return call.sequence
