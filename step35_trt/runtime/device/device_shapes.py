"""What packed steps look like to a device: their sizes, and their numbers as one vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.runtime.device.held_rows import Packing

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from step35_trt.runtime.programs.orders import StepOrder
    from step35_trt.runtime.programs.program_torch import BoundProgram


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

    @classmethod
    def of(cls, step: StepOrder) -> Shape:
        """A step's."""
        return cls(step.graph, len(step.token_ids), len(step.rows), len(step.slots))

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

    def parts(self, shape: Shape) -> list[Tensor]:
        """The numbers' parts."""
        return list(torch.split(self.numbers, shape.sizes))

    def packing(self, shape: Shape) -> Packing:
        """Which tokens are whose."""
        return Packing(*self.parts(shape)[2:])


def numbers(step: StepOrder) -> NDArray[np.int64]:
    """The parts of `Shape.sizes` of a step."""
    starts = np.cumsum((0, *step.lengths))
    owners = np.repeat(np.arange(len(step.lengths)), step.lengths)
    parts = [step.token_ids, step.rows, starts, step.pasts, step.slots, owners]
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
