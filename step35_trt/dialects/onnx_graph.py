"""An ONNX graph being written: nodes, caches, and initializers that point into the weight files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from step35_trt import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from step35_trt.program import CacheSpec
    from step35_trt.weight_file import Placed
    from step35_trt.weight_store import WeightStore

    Attribute = int | float | str | Sequence[int] | ir.Graph

OPSET = 24
IR_VERSION = 11
CONTRIB = "com.microsoft"
OURS = "step35"

# How much of a weight one call reads: all of it, the chosen experts, or a row for each token.
Reads = Literal["all", "experts", "rows"]


@dataclass
class GraphWriter:
    """A graph being written: nodes, initializers that point into the weight files, inputs, caches.

    Attributes:
        store: Where weights are.
        passes: What is done to the finished graph.
        scope: What the names and sizes of inputs and outputs begin with, while several parts are written.
    """

    store: WeightStore
    passes: Sequence[ir.passes.InPlacePass] = ()
    scope: str = ""
    tape: tape.Tape = field(default_factory=tape.Tape)
    inputs: dict[str, ir.Value] = field(default_factory=dict)
    outputs: dict[str, ir.Value] = field(default_factory=dict)
    caches: list[CacheSpec] = field(default_factory=list)
    _initializers: dict[str, ir.Value] = field(default_factory=dict)
    _shared: dict[str, ir.Value] = field(default_factory=dict)
    _weights: dict[str, tuple[Placed, Reads]] = field(default_factory=dict)

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """A standard operator with one output."""
        return self.tape.op(kind, inputs, attributes)

    def foreign(
        self,
        domain: str,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int | float | str],
        shape: Sequence[int | str | None] | ir.Shape | None,
    ) -> ir.Value:
        """An operator of another domain with one fp32 output, whose shape inference cannot know."""
        value = self.tape.op(kind, inputs, attributes, domain=domain)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = None if shape is None else ir.Shape(shape)
        return value

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input of the scope, declared where it is first asked for."""
        name = self.scope + name
        if name not in self.inputs:
            self.inputs[name] = ir.val(name, dtype, self._scoped(shape))
        return self.inputs[name]

    def constant(self, values: NDArray[np.generic] | int | float | list[int]) -> ir.Value:
        """A small constant inside the graph; Python integers become int64, floats fp32."""
        if not isinstance(values, np.ndarray):
            values = np.array(values, np.float32 if isinstance(values, float) else np.int64)
        key = f"c.{values.dtype.name}.{'x'.join(map(str, values.shape))}.{values.tobytes().hex()}"
        if key not in self._initializers:
            assert values.nbytes <= 1024, "large tensors belong into the weight files"
            name = f"const_{len(self._initializers)}"
            self._initializers[key] = self.tape.initializer(ir.tensor(values, name=name), name)
        return self._initializers[key]

    def weight(self, placed: Placed, reads: Reads = "all") -> ir.Value:
        """A tensor of the weight files; `reads` says how much of it a call touches."""
        self._weights[placed.name] = (placed, reads)
        if placed.name not in self._initializers:
            tensor = ir.ExternalTensor(
                placed.file,
                placed.offset,
                placed.nbytes,
                ir.DataType.from_numpy(np.dtype(placed.dtype)),
                shape=ir.Shape(placed.shape),
                name=placed.name,
            )
            value = self.tape.initializer(tensor, placed.name)
            self._initializers[placed.name] = value
        return self._initializers[placed.name]

    @property
    def domains(self) -> set[str]:
        """Operator sets in use besides the standard one."""
        return {node.domain for node in self.tape.nodes} - {""}

    def bytes_read(self, reads: Reads) -> int:
        """Bytes of the weights that are read in this way."""
        return sum(placed.nbytes for placed, how in self._weights.values() if how == reads)

    def shared(self, key: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that several layers use, made once."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def cache(self, spec: CacheSpec) -> tuple[ir.Value, ir.Value]:
        """Declare a layer's cache inputs: keys and values."""
        self.caches.append(spec)
        names = f"past_key.{spec.layer}", f"past_value.{spec.layer}"
        keys, values = (ir.val(name, ir.DataType.FLOAT, _cache_shape(spec)) for name in names)
        self.inputs |= zip(names, (keys, values), strict=True)
        return keys, values

    def cached(self, spec: CacheSpec, keys: ir.Value, values: ir.Value) -> None:
        """Declare a layer's cache outputs."""
        for name, value in ((f"key.{spec.layer}", keys), (f"value.{spec.layer}", values)):
            self._declare(name, value, ir.DataType.FLOAT, _cache_shape(spec))

    def output(
        self,
        name: str,
        value: ir.Value,
        shape: Sequence[int | str],
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> None:
        """Declare a graph output of the scope."""
        self._declare(self.scope + name, value, dtype, self._scoped(shape))

    def _declare(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        value.name = name
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.outputs[name] = value

    def _scoped(self, shape: Sequence[int | str]) -> list[int | str]:
        return [self.scope + size if isinstance(size, str) else size for size in shape]

    def past_length(self) -> ir.Value:
        """Rows before this call, of a graph over one sequence: int64 `[1]`."""
        return self.input("past_length", ir.DataType.INT64, (1,))

    def total_length(self) -> ir.Value:
        """Rows after this call, of a graph over one sequence: int64 `[1]`."""

        def make() -> ir.Value:
            return self.op("Add", self.past_length(), self.op("Shape", self.inputs["token_ids"]))

        return self.shared("total_length", make)

    def positions(self) -> ir.Value:
        """Positions of the call's tokens, of a graph over one sequence: int64 `[t]`."""

        def make() -> ir.Value:
            scalar = self.constant(np.array([], np.int64))
            first = self.op("Reshape", self.past_length(), scalar)
            last = self.op("Reshape", self.total_length(), scalar)
            return self.op("Range", first, last, self.constant(1))

        return self.shared("positions", make)

    def model(self, name: str) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            list(self.inputs.values()),
            list(self.outputs.values()),
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": OPSET} | dict.fromkeys(sorted(self.domains), 1),
            name=name,
        )
        model = ir.Model(
            graph, ir_version=IR_VERSION, producer_name="step35-trt", producer_version=__version__
        )
        for change in self.passes:
            change(model)
        return model


def _cache_shape(spec: CacheSpec) -> tuple[int | str, ...]:
    if spec.kind == "paged":
        return (f"pages_{spec.table}", spec.kv_heads, "page", spec.head_dim)
    return (1, spec.kv_heads, f"capacity_{spec.layer}", spec.head_dim)
