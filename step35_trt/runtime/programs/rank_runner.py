"""Runs packed steps by the plugins' definition, on caches that grow: what CPUs do, alone or together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from step35_trt.dialects.torch import SequenceBatch
from step35_trt.runtime.programs.orders import DECODER, StepOrder
from step35_trt.runtime.programs.program_weights import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.dialects.torch import Rows
    from step35_trt.runtime.programs.program_torch import TorchExecutor
    from step35_trt.runtime.programs.ranks import Ranks
    from step35_trt.runtime.session import Floats, Ids
    from step35_trt.steps import StepProgram


@dataclass
class RankRunner:
    """`session_program.Runner` on what one rank holds.

    Attributes:
        executor: Of the programs.
        programs: The decoder's, then the modules'.
        ranks: See `Runner`.
        layout: See `Runner`.
        rounds: See `Runner`.
    """

    executor: TorchExecutor
    programs: tuple[StepProgram, ...]
    ranks: Ranks | None = None
    layout: None = None
    rounds: None = None
    _slots: dict[int, dict[int, Rows]] = field(default_factory=dict)

    def check(self, step: StepOrder) -> None:
        """See `Runner`; its memory grows with its steps."""

    def run(self, step: StepOrder, hidden: Floats | None = None) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
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

    def obey(self, order: Ids) -> None:
        """See `leading.follow`."""
        self.run(StepOrder.decode(order))

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
