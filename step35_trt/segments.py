"""A trace cut at what its back end does not host: segments of dense algebra between kernels.

Segments that compute the same thing on weights of the same forms have the same key and share what is
compiled; 45 layers come down to about a dozen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from step35_trt.signatures import Vector
from step35_trt.trace import COLLECTIVES, Call, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from step35_trt.ops import Ops, T
    from step35_trt.signatures import Site
    from step35_trt.trace import Trace
    from step35_trt.weight_forms import Forms

# The two plugins, and the choice of rows: without it, every segment has one dynamic dimension.
KERNELS = frozenset({"gated_attention", "sparse_moe", "rows"})


@dataclass(frozen=True)
class Segment:
    """Consecutive operations.

    Attributes:
        calls: In order.
        inputs: Activations that come from outside, in order of first use.
        outputs: Results that are needed outside, in order.
        matrices: Names of the weights, in order of first use.
        vectors: Likewise.
    """

    calls: tuple[Call, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    matrices: tuple[str, ...]
    vectors: tuple[Vector, ...]

    @property
    def path(self) -> str:
        """The module that the segment ends in."""
        return self.calls[-1].site.path

    def key(self, forms: Forms) -> str:
        """What it computes: equal keys can share an engine. 16 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=8)
        for line in self._lines(forms):
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    def alias(self) -> dict[str, str]:
        """Names that its engine's inputs have for weights, whatever layer they belong to."""
        names = {name: f"w{i}" for i, name in enumerate(self.matrices)}
        return names | {vector.name: f"v{i}" for i, vector in enumerate(self.vectors)}

    def replay(
        self, ops: Ops[T, Vector], inputs: Sequence[T], entering: Callable[[Site], None] = lambda _: None
    ) -> list[T]:
        """Say the calls to another dialect, which is told of each call's site; returns the outputs."""
        values = dict(zip((value.index for value in self.inputs), inputs, strict=True))
        for call in self.calls:
            entering(call.site)
            arguments = [values[a.index] if isinstance(a, Value) else a for a in call.arguments]
            values[call.result.index] = getattr(ops, call.word)(*arguments)
        return [values[value.index] for value in self.outputs]

    def _lines(self, forms: Forms) -> Iterator[str]:
        """The calls with layers' own names replaced by places."""
        places = {value.index: f"x{i}:{value.type}" for i, value in enumerate(self.inputs)}
        alias = self.alias()
        for i, call in enumerate(self.calls):
            arguments = " ".join(_spell(a, places, alias, forms) for a in call.arguments)
            yield f"{call.word} {arguments}"
            places[call.result.index] = f"%{i}"
        yield " ".join(places[value.index] for value in self.outputs)


def _spell(argument: Any, places: dict[int, str], alias: dict[str, str], forms: Forms) -> str:
    if isinstance(argument, Value):
        return places[argument.index]
    if isinstance(argument, Vector):  # what is added to it is folded when it is bound
        return f"{alias[argument.name]}:{forms(argument.name)}"
    return f"{alias[argument]}:{forms(argument)}" if isinstance(argument, str) else repr(argument)


def cut(trace: Trace) -> list[Segment | Call]:
    """Segments, and the kernels and collectives between them, in order.

    A segment gives what a later step reads and what the trace gives; what is computed and read within it does
    not exist outside.
    """
    parts: list[list[Call] | Call] = []
    for call in trace.calls:
        if call.word in KERNELS | COLLECTIVES:
            parts.append(call)
        elif parts and isinstance(parts[-1], list):
            parts[-1].append(call)
        else:
            parts.append([call])
    last_use = {value.index: len(parts) for value in trace.outputs.values()}
    for i, part in reversed(list(enumerate(parts))):
        for call in part if isinstance(part, list) else [part]:
            for value in call.operands:
                last_use.setdefault(value.index, i)
    return [
        _segment(part, [c.result for c in part if last_use.get(c.result.index, i) > i])
        if isinstance(part, list)
        else part
        for i, part in enumerate(parts)
    ]


def _segment(calls: list[Call], outputs: list[Value]) -> Segment:
    own = {call.result.index for call in calls}
    inputs = {v.index: v for call in calls for v in call.operands if v.index not in own}
    names = dict.fromkeys(a for call in calls for a in call.arguments if isinstance(a, str))
    vectors = dict.fromkeys(a for call in calls for a in call.arguments if isinstance(a, Vector))
    return Segment(tuple(calls), tuple(inputs.values()), tuple(outputs), tuple(names), tuple(vectors))
