"""Runs packed steps on one device: decoding as recorded graphs, one for each shape, the rest as it comes.

A step's numbers (ids, wanted rows, where sequences start, their lengths and slots) go to the device as one
vector. What is recorded reads them there, so the same recording serves whichever sequences come. Where a
sequence takes pages, the entries of its slot's lines are changed before the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from step35_trt.dialects.torch import SequenceBatch
from step35_trt.errors import DoesNotFitError
from step35_trt.kernels import plugin
from step35_trt.runtime.device.device_pages import DeviceBatch
from step35_trt.runtime.device.device_shapes import Placed, Shape, numbers
from step35_trt.runtime.device.held_rows import HeldRows
from step35_trt.runtime.device.round_runner import RoundRunner
from step35_trt.runtime.programs.orders import DECODER, StepOrder
from step35_trt.runtime.programs.program_weights import DTYPES
from step35_trt.runtime.programs.round_order import ROUND, RoundOrder

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from step35_trt.dialects.slot_kernels import SlotKernels
    from step35_trt.runtime.cache.cache_extent import CacheLayout
    from step35_trt.runtime.device.recording import Recorder
    from step35_trt.runtime.programs.program_torch import TorchExecutor
    from step35_trt.runtime.programs.ranks import Ranks
    from step35_trt.runtime.session import Floats, Ids
    from step35_trt.steps import StepProgram

NOBODY = SequenceBatch((), (), ())
KEPT = 256  # recordings: what a few sequences and drafts make of shapes, each some megabytes


@dataclass
class DeviceRunner:
    """`session_program.Runner` on one device.

    Attributes:
        executor: Of the programs, with `kernels`.
        programs: The decoder's, then the modules'.
        kernels: Where keys and values lie, and what computes.
        record: Records decoding steps; None where every step is to run as it comes.
        longest_call: Packed tokens of a step at most.
        ranks: See `Runner`.
        held: Hidden rows that rounds begin with.
        rounds: See `Runner`.
    """

    executor: TorchExecutor
    programs: tuple[StepProgram, ...]
    kernels: SlotKernels
    record: Recorder | None
    longest_call: int
    ranks: Ranks | None = None
    held: HeldRows = field(init=False)
    rounds: RoundRunner = field(init=False)
    _placed: dict[Shape, Placed] = field(default_factory=dict, init=False)
    _replays: dict[Shape, Callable[[], None]] = field(default_factory=dict, init=False)
    _copied: torch.cuda.Event | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # Recordings point into the arena, so it may not grow afterwards.
        largest = max(self.programs, key=lambda program: program.arena)
        self.executor.bind(largest, self.longest_call, 1)
        self.held = self._room()
        self.rounds = RoundRunner(self)

    @property
    def layout(self) -> CacheLayout:
        """See `session_program.Runner`."""
        return self.kernels.caches.layout

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.executor.weights.device

    def check(self, step: StepOrder) -> None:
        """See `session_program.Runner`.

        Raises:
            DoesNotFitError: the step has more tokens than the runner was made for.
        """
        if max(len(step.token_ids), len(step.rows)) > self.longest_call:
            raise DoesNotFitError(
                f"a step of {len(step.token_ids)} tokens, where {self.longest_call} are the most"
            )

    def run(self, step: StepOrder, hidden: Floats | None = None) -> tuple[Tensor, Tensor]:
        """See `session_program.Runner`."""
        shape = Shape.of(step)
        decoding = max(step.lengths) <= self.kernels.queries and min(step.lengths) > 0
        with torch.inference_mode():
            self.kernels.caches.move(step.moves)
            placed = self._place(shape, keep=decoding)
            self.send(placed, numbers(step))
            if placed.carried is not None:
                if hidden is not None:
                    placed.carried.copy_(torch.from_numpy(hidden))
                if self.ranks is not None:
                    self.ranks.share(placed.carried)
            if decoding:
                self.decode(shape)
            else:
                module = plugin.load("gated_attention", "batch")
                self._run(shape, placed, module.Batch.of(step.lengths, step.pasts, self.device))
        return placed.bound.outputs["logits"], placed.bound.outputs["hidden"]

    def obey(self, order: Ids) -> None:
        """See `leading.follow`."""
        if order[0] == ROUND:
            self.rounds.start(RoundOrder.decode(order))
        else:
            self.run(StepOrder.decode(order))

    def placed(self, shape: Shape) -> Placed:
        """Where a decoding step of that shape has its inputs and outputs."""
        return self._place(shape, keep=True)

    def send(self, placed: Placed, values: NDArray[np.int64]) -> None:
        """Put a step's numbers (`Shape.sizes`) where it reads them."""
        self.sent_before()
        placed.sent.numpy()[:] = values
        placed.numbers.copy_(placed.sent, non_blocking=True)
        self.sending()

    def sent_before(self) -> None:
        """Wait until what was sent last has left the host's memory."""
        if self._copied is not None:
            self._copied.synchronize()  # a rank that nobody asks for results runs ahead of its device

    def sending(self) -> None:
        """Something has just been given to be sent."""
        if self._copied is not None:
            self._copied.record()

    def launch(self, shape: Shape, placed: Placed) -> None:
        """All operations of a decoding step whose numbers were sent; they look at no value."""
        self._run(shape, placed, self._described(shape, placed))

    def decode(self, shape: Shape) -> None:
        """Run the decoding step whose numbers were sent: a replay, from the second time on."""
        if shape in self._replays:
            self._replays[shape]()
            return
        placed = self.placed(shape)

        if self.record is None:
            self.launch(shape, placed)
        else:
            if len(self._replays) == KEPT:
                self._replays.pop(next(iter(self._replays)))
            self._replays[shape] = self.record(partial(self.launch, shape, placed))

    def _place(self, shape: Shape, *, keep: bool) -> Placed:
        if shape in self._placed:
            return self._placed[shape]
        program = self.programs[shape.graph]
        bound = self.executor.bind(program, shape.tokens, shape.rows)
        sent = torch.zeros(sum(shape.sizes), dtype=torch.int64)
        if self.device.type == "cuda":
            sent = sent.pin_memory()
        carried = None
        if shape.graph != DECODER:
            # Not in the arena: what the recording before left there may be the very rows that come in.
            width = bound.inputs["carried"].shape[1]
            carried = torch.zeros(shape.tokens, width, dtype=DTYPES[program.activation], device=self.device)
        placed = Placed(bound, torch.zeros(len(sent), dtype=sent.dtype, device=self.device), sent, carried)
        if keep:
            self._placed[shape] = placed
        return placed

    def _described(self, shape: Shape, placed: Placed) -> DeviceBatch:
        starts, pasts, _, owners = (part.int() for part in placed.parts(shape)[2:])
        longest = self.kernels.caches.extent.rows
        queries = min(self.kernels.queries, shape.tokens - shape.sequences + 1)
        return DeviceBatch(shape.tokens, shape.sequences, queries, longest, starts, pasts, owners)

    def _run(self, shape: Shape, placed: Placed, batch: object) -> None:
        ids, rows, _, _, slots, _ = placed.parts(shape)
        placed.bound.inputs["token_ids"].copy_(ids)
        placed.bound.inputs["rows"].copy_(rows)
        if placed.carried is not None:
            placed.bound.inputs["carried"].copy_(placed.carried)
        self.kernels.place(batch, slots.int())
        placed.bound.run(NOBODY)
        self.held.keep(shape.graph, placed.packing(shape), placed.bound.outputs["hidden"])

    def _room(self) -> HeldRows:
        """For what modules take over; none without modules."""
        first = self.programs[-1]
        width = next(b.width for b in first.buffers if b.name == first.outputs["hidden"])
        slots, queries = self.kernels.caches.extent.slots, self.kernels.queries
        graphs, dtype = len(self.programs) - 1, DTYPES[first.activation]
        return HeldRows.of(graphs, slots, queries, width, dtype, self.device)
