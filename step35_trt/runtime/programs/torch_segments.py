"""Segments by torch: their calls said again to the torch dialect, on each step's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from step35_trt.dialects.torch import HeldWeights, SequenceBatch, TorchOps
from step35_trt.signatures import Vector
from step35_trt.trace import Value

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.segments import Segment
    from step35_trt.steps import SegmentStep, WeightBinding

# A word of `Ops` on tensors.
Word = Callable[..., "Tensor"]

NOBODY = SequenceBatch((), (), ())  # what dense algebra knows of sequences


class SegmentWeights(HeldWeights, Protocol):
    """What a step's calls multiply by and add."""

    def vector(self, binding: WeightBinding) -> Tensor:
        """A vector in fp32, what is added to it included."""
        ...

    def embedding(self, token_ids: Tensor, name: str) -> Tensor:
        """`Ops.embedding`."""
        ...


@dataclass(frozen=True)
class TorchSegments:
    """`program_torch.SegmentRunner`.

    Attributes:
        segments: By the key that steps name them by.
        weights: Of all steps.
        words: Spellings of words that are better than the definition's where the weights lie; see `Ops`.
    """

    segments: Mapping[str, Segment]
    weights: SegmentWeights
    words: Mapping[str, Word] = field(default_factory=dict)

    def bind(self, step: SegmentStep, buffers: Mapping[str, Tensor]) -> Callable[[], None]:
        """See `program_torch.SegmentRunner`."""
        segment, weights = self.segments[step.engine], self.weights
        alias, ops = segment.alias(), TorchOps(weights, NOBODY)
        words: dict[str, Word] = {"embedding": weights.embedding, **self.words}

        def own(argument: Any) -> Any:
            if isinstance(argument, Vector):
                return weights.vector(step.weights[alias[argument.name]])
            return step.weights[alias[argument]].weight if isinstance(argument, str) else argument

        calls = [
            (
                words.get(call.word) or getattr(ops, call.word),
                tuple(map(own, call.arguments)),
                call.result.index,
            )
            for call in segment.calls
        ]
        inputs = [(v.index, buffers[step.inputs[f"x{i}"]]) for i, v in enumerate(segment.inputs)]
        outputs = [(v.index, buffers[step.outputs[f"y{i}"]]) for i, v in enumerate(segment.outputs)]

        def run() -> None:
            values = dict(inputs)
            for word, arguments, result in calls:
                values[result] = word(*(values[a.index] if isinstance(a, Value) else a for a in arguments))
            for index, buffer in outputs:
                buffer.copy_(values[index])

        return run
