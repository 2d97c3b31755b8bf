"""Segments by engines: contexts for the sizes of calls, and each step's buffers and weights bound to them.

Steps that share an engine differ in addresses alone. A context whose work was recorded must keep its shapes,
so each size that comes again has a context of its own; sizes that come once share one. All of them use one
piece of scratch memory, for executions follow each other on one stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.runtime.device.engine_runtime import EngineTensor, Scratch
from step35_trt.runtime.device.engine_streams import streams_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from step35_trt.dialects.tensorrt_segment import Profile
    from step35_trt.runtime.device.engine_runtime import EngineContext, LoadedEngine
    from step35_trt.runtime.device.engine_streams import Streams
    from step35_trt.steps import Buffer, SegmentStep, StepProgram, WeightBinding
    from step35_trt.weight_forms import Forms

ALIGNMENT = 256  # bytes, of every address that an engine is given: what cudaMalloc promises


class BoundWeights(Protocol):
    """Weights as engines take them."""

    @property
    def device(self) -> torch.device:
        """Where they are kept."""
        ...

    def bound(self, binding: WeightBinding) -> Tensor:
        """Values or scales in the form that they are stored in, or a vector in fp32 with its `plus` added."""
        ...


@dataclass
class EngineSegments:
    """`program_torch.SegmentRunner` by engines.

    Attributes:
        engines: By the key that steps name them by.
        weights: Of all steps.
        returning: Calls of at most so many tokens come again, and may be recorded.
        scratch: uint8; as much as the engine that needs most.
        streams: Where executions are queued.
    """

    engines: Mapping[str, LoadedEngine]
    weights: BoundWeights
    returning: int
    scratch: Tensor
    streams: Streams
    _contexts: dict[tuple[str, int, int], EngineContext] = field(default_factory=dict)

    @classmethod
    def of(cls, engines: Mapping[str, LoadedEngine], weights: BoundWeights, returning: int) -> EngineSegments:
        """Take the scratch memory."""
        most = max(engine.scratch_bytes for engine in engines.values())
        scratch = torch.empty(max(most, ALIGNMENT), dtype=torch.uint8, device=weights.device)
        return cls(engines, weights, returning, scratch, streams_of(weights.device))

    def bind(self, step: SegmentStep, buffers: Mapping[str, Tensor]) -> Callable[[], None]:
        """See `program_torch.SegmentRunner`; weights that are not there yet are fetched."""
        places = step.inputs | step.outputs
        tensors = {name: buffers[buffer] for name, buffer in places.items()}
        tokens = len(next(iter(tensors.values())))
        if not tokens:
            return lambda: None  # no logits are wanted: engines take at least one row
        tensors |= {name: self.weights.bound(binding) for name, binding in step.weights.items()}
        context, shapes = self._context(step.engine, tokens)

        def run() -> None:
            for name, shape in shapes.items():
                context.resize(name, shape)
            for name, tensor in tensors.items():
                context.place(name, tensor.data_ptr())
            self.streams.enqueue(context)

        return run

    def check_recordable(self) -> None:
        """See that a single token's step can become part of a CUDA graph.

        Raises:
            UnsupportedError: an engine's cannot.
        """
        for key in self.engines:
            context, _ = self._context(key, 1)
            if not context.recordable(self.streams.own):
                raise UnsupportedError(f"engine {key} cannot be part of a CUDA graph")

    def _context(self, key: str, tokens: int) -> tuple[EngineContext, dict[str, tuple[int, ...]]]:
        """A context for calls of that many tokens, and the shapes that it has to be told before each."""
        engine = self.engines[key]
        profile = narrowest(engine.ranges, tokens)
        returning = tokens <= self.returning or tokens in {size.mostly for size in engine.ranges}
        place = key, profile, tokens if returning else 0
        shapes = {name: t.of(tokens) for name, t in engine.tensors.items() if t.sized}
        if place not in self._contexts:
            scratch = Scratch(self.scratch.data_ptr(), self.scratch.nbytes)
            context = engine.context(profile, scratch, self.streams.current, returning=returning)
            if returning:
                for name, shape in shapes.items():
                    context.resize(name, shape)
            self._contexts[place] = context
        return self._contexts[place], {} if returning else shapes


def narrowest(ranges: tuple[Profile, ...], tokens: int) -> int:
    """The profile of the fewest tokens at most among those that a call is in.

    Raises:
        UnsupportedError: there is none.
    """
    fitting = [i for i, size in enumerate(ranges) if size.least <= tokens <= size.most]
    if not fitting:
        most = max(size.most for size in ranges)
        raise UnsupportedError(f"a call of {tokens} tokens, where engines take {most} at most")
    return min(fitting, key=lambda i: ranges[i].most)


def check_engines(
    engines: Mapping[str, LoadedEngine],
    programs: Iterable[StepProgram],
    forms: Forms,
    ranges: tuple[Profile, ...],
) -> None:
    """See that engines take and give what steps bind to them, tensor by tensor.

    Args:
        engines: By key.
        programs: Whose steps name them.
        forms: Of the weights.
        ranges: What they have optimisation profiles for.

    Raises:
        CorruptInputError: an engine is not of these programs.
    """
    for program in programs:
        buffers = {buffer.name: buffer for buffer in program.buffers}
        for step in program.steps:
            if step.kind != "segment":
                continue
            engine = engines[step.engine]
            different = {n for n, _ in _expected(step, buffers, forms).items() ^ engine.tensors.items()}
            if different or engine.ranges != ranges:
                what = ", ".join(sorted(different)) or "profiles"
                raise CorruptInputError(
                    f"engine {step.engine} has other {what} than {step.name} needs",
                    "Build the bundle again with this version.",
                )


def _expected(step: SegmentStep, buffers: Mapping[str, Buffer], forms: Forms) -> dict[str, EngineTensor]:
    found = {}
    for name, place in (step.inputs | step.outputs).items():
        buffer = buffers[place]
        shape = (-1, buffer.width) if buffer.width else (-1,)
        found[name] = EngineTensor(buffer.dtype, shape, output=name in step.outputs)
    for name, binding in step.weights.items():
        form = forms(binding.weight)
        if binding.part == "vector":
            found[name] = EngineTensor("float32", (1, *form.shape))
        elif binding.part == "scales":
            assert form.scale_dtype is not None
            found[name] = EngineTensor(form.scale_dtype, form.scale_shape)
        else:
            found[name] = EngineTensor(form.dtype, form.shape)
    return found
