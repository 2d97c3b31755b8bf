"""Programs run on torch's tensors: segments by whoever runs them, plugins as kernels or by their definition.

For calls of given numbers of tokens and rows a program is bound once: views of one arena whose place does not
change, and a list of launches over them. Running it decides nothing and waits for nothing, which is what a
CUDA graph needs to record it; the definition of the plugins, for the CPU, is the exception.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.errors import UnsupportedError
from step35_trt.runtime.programs.program_weights import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.dialects.torch import Kernels
    from step35_trt.steps import Buffer, CollectiveStep, KernelStep, SegmentStep, StepProgram

# Takes a collective step, this rank's input and where its output goes.
Exchange = Callable[["CollectiveStep", "Tensor", "Tensor"], None]
Launch = Callable[["SequenceBatch"], None]

BUFFERS = DTYPES | {"int64": torch.int64}
NOBODY = SequenceBatch((), (), ())  # what dense algebra and experts know of sequences
KEPT = 64  # bound programs: decoding has few sizes, the rest are ends of prompts


class StepWeights(Protocol):
    """`dialects.torch.HeldWeights`, and what steps bind."""

    @property
    def device(self) -> torch.device:
        """Where they are kept."""
        ...

    def tensor(self, name: str) -> Tensor:
        """See `HeldWeights`."""
        ...

    def expert(self, name: str, index: int) -> Tensor | None:
        """See `HeldWeights`."""
        ...


class SegmentRunner(Protocol):
    """Who runs segments: torch (`torch_segments`), or engines (`segment_engines`)."""

    def bind(self, step: SegmentStep, buffers: Mapping[str, Tensor]) -> Callable[[], None]:
        """What computes a step's outputs from its inputs, where they lie.

        Args:
            step: With the weights that are its own.
            buffers: By name; they stay where they are.
        """
        ...


def refuse(step: CollectiveStep, _: Tensor, __: Tensor) -> None:
    """The `Exchange` of a process that is alone."""
    raise UnsupportedError(f"{step.name}: {step.operation} needs other ranks")


@dataclass
class TorchExecutor:
    """Programs over one set of segments and weights, in one arena.

    Attributes:
        segments: Runs them.
        weights: What this rank holds.
        exchange: Does a collective with the other ranks.
        kernels: Run the plugins in the definition's place.
    """

    segments: SegmentRunner
    weights: StepWeights
    exchange: Exchange = refuse
    kernels: Kernels | None = None
    _arena: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _bound: dict[tuple[int, int, int], BoundProgram] = field(default_factory=dict)

    def bind(self, program: StepProgram, tokens: int, rows: int) -> BoundProgram:
        """A program for calls of so many packed tokens and wanted rows; the last few are kept.

        The arena grows where a call is longer than any before, which unbinds all: reserve the longest first.
        """
        key = id(program), tokens, rows
        longest = max(tokens, rows)
        if len(self._arena) < program.arena * longest:
            self._bound.clear()
            self._arena = torch.empty(program.arena * longest, dtype=torch.uint8, device=self.weights.device)
        if key not in self._bound:
            if len(self._bound) == KEPT:
                self._bound.pop(next(iter(self._bound)))
            self._bound[key] = BoundProgram.of(self, program, self._arena, tokens, rows)
        return self._bound[key]

    def run(
        self, program: StepProgram, inputs: Mapping[str, Tensor], batch: SequenceBatch
    ) -> dict[str, Tensor]:
        """The program's outputs by name, which the next run overwrites.

        Args:
            program: Of this executor's segments.
            inputs: By name; copied in, from any device.
            batch: Which tokens belong to which sequence.
        """
        bound = self.bind(program, len(inputs["token_ids"]), len(inputs["rows"]))
        with torch.inference_mode():
            for name, value in inputs.items():
                bound.inputs[name].copy_(value)
            bound.run(batch)
        return bound.outputs


@dataclass(frozen=True)
class BoundProgram:
    """A program with its buffers in place.

    Attributes:
        program: What is bound.
        inputs: Buffers to be filled, by name.
        outputs: Buffers that are filled by a run, by name.
        launches: The steps.
    """

    program: StepProgram
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    launches: tuple[Launch, ...]

    @classmethod
    def of(
        cls, executor: TorchExecutor, program: StepProgram, arena: Tensor, tokens: int, rows: int
    ) -> BoundProgram:
        """Bind a program; `arena` is uint8 and long enough."""
        counts = {"tokens": tokens, "rows": rows}
        buffers = {b.name: _view(b, arena, counts) for b in program.buffers}
        launches = []
        for step in program.steps:
            if step.kind == "segment":
                launches.append(_segment(executor.segments.bind(step, buffers)))
            elif step.kind == "kernel":
                launches.append(_kernel(executor, step, buffers))
            else:
                launches.append(_collective(executor, step, buffers))
        return cls(
            program,
            {name: buffers[buffer] for name, buffer in program.inputs.items()},
            {name: buffers[buffer] for name, buffer in program.outputs.items()},
            tuple(launches),
        )

    def run(self, batch: SequenceBatch) -> None:
        """All steps in order."""
        for launch in self.launches:
            launch(batch)


def _view(buffer: Buffer, arena: Tensor, counts: Mapping[str, int]) -> Tensor:
    """A buffer's rows. Its offset is in bytes for each token of the longest call (see `Buffer`)."""
    count, start = counts[buffer.rows], buffer.offset * max(counts.values())
    flat = arena[start : start + count * buffer.row_bytes].view(BUFFERS[buffer.dtype])
    return flat.view(count, buffer.width) if buffer.width else flat


def _segment(run: Callable[[], None]) -> Launch:
    return lambda _: run()


def _kernel(executor: TorchExecutor, step: KernelStep, buffers: Mapping[str, Tensor]) -> Launch:
    weights, kernels, call = executor.weights, executor.kernels, step.call
    inputs, output = [buffers[name] for name in step.inputs], buffers[step.output]
    if call.plugin == "gated_attention":
        gammas = [weights.tensor(name).float() + 1.0 for name in (call.q_gamma, call.k_gamma)]
        layer, eps = call.layer_spec, call.eps

        def attention(batch: SequenceBatch) -> None:
            q, k, v, gate = inputs
            if kernels is None:
                v = v.clone()  # the definition's cache keeps what it is given, the arena does not
            ops = TorchOps(weights, batch, kernels)
            output.copy_(ops.gated_attention(q, k, v, gate, gammas[0], gammas[1], eps, layer))

        return attention
    if call.plugin == "sparse_moe":
        ops = TorchOps(weights, NOBODY, kernels)
        settings = call.experts, call.top_k, call.scale, call.limit
        return lambda _: _put(output, ops.sparse_moe(inputs[0], inputs[1], inputs[2], *settings))
    return lambda _: _put(output, inputs[0][inputs[1]])


def _collective(executor: TorchExecutor, step: CollectiveStep, buffers: Mapping[str, Tensor]) -> Launch:
    given, output = buffers[step.input], buffers[step.output]
    return lambda _: executor.exchange(step, given, output)


def _put(output: Tensor, value: Tensor) -> None:
    output.copy_(value)
