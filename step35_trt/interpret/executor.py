"""Runs a program step by step on the CPU: segments through the interpreter, plugins by their definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.errors import UnsupportedError
from step35_trt.interpret.network import Array, evaluate
from step35_trt.interpret.weights import FormedWeights, to_numpy, to_torch
from step35_trt.weight_forms import NUMPY

if TYPE_CHECKING:
    from step35_trt.dialects.tensorrt_functional import Functional
    from step35_trt.steps import Buffer, CollectiveStep, KernelStep, SegmentStep, StepProgram

# Takes a buffer and the value computed for it, returns the value that goes into it.
Settle = Callable[["Buffer", Array], Array]


# Takes a step and this rank's input, returns this rank's output.
Exchange = Callable[["CollectiveStep", Array], Array]


def refuse(step: CollectiveStep, _: Array) -> Array:
    """The `Exchange` of a process that is alone."""
    raise UnsupportedError(f"{step.name}: {step.operation} needs other ranks")


@dataclass(frozen=True)
class Executor:
    """Programs over one set of networks and weights.

    Attributes:
        networks: By engine key.
        weights: What engines are bound to and plugins read.
        exchange: Does a collective with the other ranks.
    """

    networks: Mapping[str, Functional]
    weights: FormedWeights
    exchange: Exchange = refuse

    def run(
        self,
        program: StepProgram,
        inputs: Mapping[str, Array],
        batch: SequenceBatch,
        settle: Settle = lambda _, value: value,
    ) -> dict[str, Array]:
        """The program's outputs by name.

        Buffers lie where the program places them, in one arena: values that overlap while they are needed
        would show.

        Raises:
            UnsupportedError: the program has a step that a single process does not do.
        """
        arena = _Arena.of(program, inputs)
        for name, value in inputs.items():
            arena.write(program.inputs[name], value)
        for step in program.steps:
            if step.kind == "segment":
                results = self._segment(step, arena)
            elif step.kind == "kernel":
                results = {step.output: self._kernel(step, arena, batch)}
            else:
                results = {step.output: self.exchange(step, arena.read(step.input))}
            for name, value in results.items():
                arena.write(name, settle(arena.buffers[name], value))
        return {name: arena.read(buffer).copy() for name, buffer in program.outputs.items()}

    def _segment(self, step: SegmentStep, arena: _Arena) -> dict[str, Array]:
        written = self.networks[step.engine]
        given = {name: arena.read(buffer) for name, buffer in step.inputs.items()}
        given |= {name: self.weights.bound(binding) for name, binding in step.weights.items()}
        results = evaluate(written.trt, written.network, given, written.constants)
        return {buffer: results[name] for name, buffer in step.outputs.items()}

    def _kernel(self, step: KernelStep, arena: _Arena, batch: SequenceBatch) -> Array:
        inputs, call = [to_torch(arena.read(name)) for name in step.inputs], step.call
        ops = TorchOps(self.weights, batch)
        with torch.inference_mode():
            if call.plugin == "gated_attention":
                q_gamma, k_gamma = (ops.plus_one(ops.vector(name)) for name in (call.q_gamma, call.k_gamma))
                q, k, v, gate = inputs
                settings = call.eps, call.layer_spec
                return to_numpy(ops.gated_attention(q, k, v, gate, q_gamma, k_gamma, *settings))
            if call.plugin == "sparse_moe":
                x, selection, weights = inputs
                mixed = ops.sparse_moe(
                    x, selection, weights, call.experts, call.top_k, call.scale, call.limit
                )
                return to_numpy(mixed)
            return to_numpy(ops.rows(*inputs))


@dataclass(frozen=True)
class _Arena:
    """The program's buffers in one piece of memory, for a call of given length."""

    memory: np.ndarray[tuple[int], np.dtype[np.uint8]]
    buffers: dict[str, Buffer]
    counts: dict[str, int]

    @classmethod
    def of(cls, program: StepProgram, inputs: Mapping[str, Array]) -> _Arena:
        counts = {"tokens": len(inputs["token_ids"]), "rows": len(inputs["rows"])}
        memory = np.zeros(program.arena * max(counts.values()), np.uint8)
        return cls(memory, {buffer.name: buffer for buffer in program.buffers}, counts)

    def read(self, name: str) -> Array:
        """A view of a buffer."""
        buffer = self.buffers[name]
        count, start = self.counts[buffer.rows], buffer.offset * max(self.counts.values())
        flat = self.memory[start : start + count * buffer.row_bytes].view(NUMPY[buffer.dtype])
        return flat.reshape((count, buffer.width) if buffer.width else (count,))

    def write(self, name: str, value: Array) -> None:
        """Fill a buffer."""
        self.read(name)[...] = value
