"""Runs packed steps on one device: decoding as recorded graphs, one for each shape, the rest as it comes.

A step's numbers (ids, wanted rows, where sequences start, their lengths and slots) go to the device as one
vector. What is recorded reads them there, so the same recording serves whichever sequences come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.dialects.torch import SequenceBatch
from step35_trt.errors import DoesNotFitError
from step35_trt.kernels import plugin
from step35_trt.runtime.orders import DECODER
from step35_trt.runtime.program_weights import DTYPES
from step35_trt.runtime.slot_caches import DeviceBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from step35_trt.dialects.slot_kernels import SlotKernels
    from step35_trt.runtime.orders import StepOrder
    from step35_trt.runtime.program_torch import BoundProgram, TorchExecutor
    from step35_trt.runtime.recording import Recorder
    from step35_trt.runtime.session import Floats
    from step35_trt.steps import StepProgram

NOBODY = SequenceBatch((), (), ())
KEPT = 256  # recordings: what a few sequences and drafts make of shapes, each some megabytes


@dataclass(frozen=True)
class Shape:
    """What a recording is for.

    Attributes:
        graph: `DECODER`, or k + 1 for MTP module k.
        tokens: Packed tokens.
        rows: Wanted rows.
        sequences: How many.
    """

    graph: int
    tokens: int
    rows: int
    sequences: int

    @property
    def sizes(self) -> list[int]:
        """Of the parts of a step's numbers: ids, rows, starts, pasts, slots, each token's sequence."""
        return [self.tokens, self.rows, self.sequences + 1, self.sequences, self.sequences, self.tokens]


@dataclass(frozen=True)
class Placed:
    """A shape with its memory on the device.

    Attributes:
        bound: The program.
        numbers: int64, the parts of `Shape.sizes` one after the other.
        sent: The same on the host, pinned where the device copies from it.
        carried: What an MTP module takes over, to be filled; None for the decoder.
    """

    bound: BoundProgram
    numbers: Tensor
    sent: Tensor
    carried: Tensor | None


@dataclass
class DeviceRunner:
    """`session_program.Runner` on one device.

    Attributes:
        executor: Of the programs, with `kernels`.
        programs: The decoder's, then the modules'.
        kernels: Where keys and values lie, and what computes.
        record: Records decoding steps; None where every step is to run as it comes.
        longest_call: Packed tokens of a step at most.
    """

    executor: TorchExecutor
    programs: tuple[StepProgram, ...]
    kernels: SlotKernels
    record: Recorder | None
    longest_call: int
    _placed: dict[Shape, Placed] = field(default_factory=dict)
    _replays: dict[Shape, Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Recordings point into the arena, so it may not grow afterwards.
        largest = max(self.programs, key=lambda program: program.arena)
        self.executor.bind(largest, self.longest_call, 1)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.executor.weights.device

    def lead(self, step: StepOrder, hidden: Floats | None) -> tuple[Tensor, Tensor]:
        """See `session_program.Runner`.

        Raises:
            DoesNotFitError: the step has more tokens than the runner was made for.
        """
        if max(len(step.token_ids), len(step.rows)) > self.longest_call:
            raise DoesNotFitError(
                f"a step of {len(step.token_ids)} tokens, where {self.longest_call} are the most"
            )
        shape = Shape(step.graph, len(step.token_ids), len(step.rows), len(step.slots))
        decoding = max(step.lengths) <= self.kernels.queries and min(step.lengths) > 0
        with torch.inference_mode():
            placed = self._place(shape, keep=decoding)
            self.send(placed, numbers(step))
            if placed.carried is not None:
                assert hidden is not None
                placed.carried.copy_(torch.from_numpy(hidden))
            if decoding:
                self.decode(shape)
            else:
                module = plugin.load("gated_attention", "batch")
                self._run(shape, placed, module.Batch.of(step.lengths, step.pasts, self.device))
        return placed.bound.outputs["logits"], placed.bound.outputs["hidden"]

    def placed(self, shape: Shape) -> Placed:
        """Where a decoding step of that shape has its inputs and outputs."""
        return self._place(shape, keep=True)

    def send(self, placed: Placed, values: NDArray[np.int64]) -> None:
        """Put a step's numbers (`Shape.sizes`) where it reads them; the step before has to be done."""
        placed.sent.numpy()[:] = values
        placed.numbers.copy_(placed.sent, non_blocking=True)

    def decode(self, shape: Shape) -> None:
        """Run the decoding step whose numbers were sent: a replay, from the second time on."""
        if shape in self._replays:
            self._replays[shape]()
            return
        placed = self.placed(shape)

        def work() -> None:
            self._run(shape, placed, self._described(shape, placed))

        if self.record is None:
            work()
        else:
            if len(self._replays) == KEPT:
                self._replays.pop(next(iter(self._replays)))
            self._replays[shape] = self.record(work)

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
        starts, pasts, _, owners = (part.int() for part in torch.split(placed.numbers, shape.sizes)[2:])
        longest = self.kernels.caches.extent.rows
        queries = min(self.kernels.queries, shape.tokens - shape.sequences + 1)
        return DeviceBatch(shape.tokens, shape.sequences, queries, longest, starts, pasts, owners)

    def _run(self, shape: Shape, placed: Placed, batch: object) -> None:
        ids, rows, _, _, slots, _ = torch.split(placed.numbers, shape.sizes)
        placed.bound.inputs["token_ids"].copy_(ids)
        placed.bound.inputs["rows"].copy_(rows)
        if placed.carried is not None:
            placed.bound.inputs["carried"].copy_(placed.carried)
        self.kernels.place(batch, slots.int())
        placed.bound.run(NOBODY)


def numbers(step: StepOrder) -> NDArray[np.int64]:
    """The parts of `Shape.sizes` of a step."""
    starts = np.cumsum((0, *step.lengths))
    owners = np.repeat(np.arange(len(step.lengths)), step.lengths)
    parts = [step.token_ids, step.rows, starts, step.pasts, step.slots, owners]
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
