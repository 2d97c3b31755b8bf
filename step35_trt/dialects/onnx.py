"""The onnx dialect: the vocabulary as an ONNX graph over one sequence's packed tokens.

What every spelling shares is here; `onnx_standard` and `onnx_ort` say how products, the embedding and the
two plugins are written in plain opset 24 and in ONNX Runtime's contributed operators.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from step35_trt import __version__, model
from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from step35_trt.config import LayerSpec, Step35Config
    from step35_trt.program import CacheSpec
    from step35_trt.weight_file import Placed
    from step35_trt.weight_store import Layout, Matrix, WeightStore

    Attribute = int | float | str | Sequence[int] | ir.Graph

OPSET = 24
IR_VERSION = 11
CONTRIB = "com.microsoft"
OURS = "step35"

# How much of a weight one call reads: all of it, the chosen experts, or a row for each token.
Reads = Literal["all", "experts", "rows"]


@dataclass(frozen=True)
class VectorRef:
    """A vector parameter and what has been added to it; folded when it is stored."""

    name: str
    plus: float = 0.0


class Spelling(Protocol):
    """How the parts that differ between operator sets are written."""

    @property
    def layout(self) -> Layout:
        """How its operators want 4-bit weights."""
        ...

    def linear(self, g: GraphWriter, x: ir.Value, weight: Matrix) -> ir.Value:
        """`x Wᵀ`: `[t, K]` to `[t, N]`."""
        ...

    def embedding(self, g: GraphWriter, token_ids: ir.Value, weight: str) -> ir.Value:
        """`[t]` to `[t, D]`."""
        ...

    def silu(self, g: GraphWriter, x: ir.Value) -> ir.Value:
        """`x sigmoid(x)`."""
        ...

    def attend(self, g: GraphWriter, q: ir.Value, k: ir.Value, v: ir.Value, layer: LayerSpec) -> ir.Value:
        """Cache write and (windowed) causal attention of normed, rotated `[1, t, heads * d]`."""
        ...

    def experts(
        self,
        g: GraphWriter,
        x: ir.Value,
        selection: ir.Value,
        weights: ir.Value,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> ir.Value:
        """`Ops.sparse_moe`."""
        ...


@dataclass
class GraphWriter:
    """A graph being written: nodes, initializers that point into the weight files, inputs, caches."""

    store: WeightStore
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
        """Declare a graph input."""
        self.inputs[name] = ir.val(name, dtype, shape)
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
        """Declare a layer's cache inputs."""
        self.caches.append(spec)
        shape = (1, spec.kv_heads, f"capacity_{spec.layer}", spec.head_dim)
        return (
            self.input(f"past_key.{spec.layer}", ir.DataType.FLOAT, shape),
            self.input(f"past_value.{spec.layer}", ir.DataType.FLOAT, shape),
        )

    def cached(self, spec: CacheSpec, keys: ir.Value, values: ir.Value) -> None:
        """Declare a layer's cache outputs."""
        shape = (1, spec.kv_heads, f"capacity_{spec.layer}", spec.head_dim)
        for name, value in ((f"key.{spec.layer}", keys), (f"value.{spec.layer}", values)):
            self.output(name, value, shape)

    def output(self, name: str, value: ir.Value, shape: Sequence[int | str]) -> None:
        """Declare an fp32 graph output."""
        value.name = name
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.outputs[name] = value

    def total_length(self) -> ir.Value:
        """Rows after this call, int64 `[1]`."""

        def make() -> ir.Value:
            return self.op("Add", self.inputs["past_length"], self.op("Shape", self.inputs["token_ids"]))

        return self.shared("total_length", make)

    def positions(self) -> ir.Value:
        """Positions of the call's tokens, int64 `[t]`."""

        def make() -> ir.Value:
            scalar = self.constant(np.array([], np.int64))
            first = self.op("Reshape", self.inputs["past_length"], scalar)
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
        return ir.Model(
            graph, ir_version=IR_VERSION, producer_name="step35-trt", producer_version=__version__
        )


@dataclass(frozen=True)
class OnnxOps:
    """`Ops[ir.Value, VectorRef]` that writes nodes."""

    g: GraphWriter
    spelling: Spelling

    def vector(self, name: str) -> VectorRef:
        """See `Ops`."""
        return VectorRef(name)

    def plus_one(self, vector: VectorRef) -> VectorRef:
        """See `Ops`."""
        return replace(vector, plus=vector.plus + 1.0)

    def embedding(self, token_ids: ir.Value, weight: str) -> ir.Value:
        """See `Ops`."""
        return self.spelling.embedding(self.g, token_ids, weight)

    def rows(self, x: ir.Value, index: ir.Value) -> ir.Value:
        """See `Ops`."""
        return self.g.op("Gather", x, index, axis=0)

    def concat(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """See `Ops`."""
        return self.g.op("Concat", a, b, axis=-1)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """See `Ops`."""
        return self.g.op("Add", a, b)

    def linear(self, x: ir.Value, weight: str) -> ir.Value:
        """See `Ops`."""
        return self.spelling.linear(self.g, x, self.g.store.matrix(weight))

    def linear_fp32(self, x: ir.Value, weight: str) -> ir.Value:
        """See `Ops`."""
        return self.spelling.linear(self.g, x, self.g.store.matrix(weight, fp32=True))

    def bias(self, x: ir.Value, vector: VectorRef) -> ir.Value:
        """See `Ops`."""
        return self.g.op("Add", x, self._stored(vector))

    def sigmoid(self, x: ir.Value) -> ir.Value:
        """See `Ops`."""
        return self.g.op("Sigmoid", x)

    def swiglu(self, gate: ir.Value, up: ir.Value, limit: float) -> ir.Value:
        """See `Ops`."""
        activated = self.spelling.silu(self.g, gate)
        if limit:
            activated = self.g.op("Min", activated, self.g.constant(float(limit)))
            up = self.g.op("Clip", up, self.g.constant(-float(limit)), self.g.constant(float(limit)))
        return self.g.op("Mul", activated, up)

    def rms_norm(self, x: ir.Value, gamma: VectorRef, eps: float) -> ir.Value:
        """See `Ops`."""
        return self.g.op("RMSNormalization", x, self._stored(gamma), axis=-1, epsilon=eps)

    def gated_attention(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        gate: ir.Value,
        q_gamma: VectorRef,
        k_gamma: VectorRef,
        eps: float,
        layer: LayerSpec,
    ) -> ir.Value:
        """See `Ops`."""
        heads, d = layer.query_heads, layer.head_dim
        q = self._turned(q, q_gamma, eps, heads, layer)
        k = self._turned(k, k_gamma, eps, layer.kv_heads, layer)
        v = self.g.op("Reshape", v, self.g.constant([1, -1, layer.kv_heads * d]))
        out = self.spelling.attend(self.g, q, k, v, layer)
        split = self.g.op("Reshape", out, self.g.constant([-1, heads, d]))
        open_ = self.g.op("Unsqueeze", self.sigmoid(gate), self.g.constant([-1]))
        return self.g.op("Reshape", self.g.op("Mul", split, open_), self.g.constant([-1, heads * d]))

    def sparse_moe(
        self,
        x: ir.Value,
        selection: ir.Value,
        weights: ir.Value,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> ir.Value:
        """See `Ops`."""
        return self.spelling.experts(self.g, x, selection, weights, experts, top_k, scale, limit)

    def _stored(self, vector: VectorRef) -> ir.Value:
        return self.g.weight(self.g.store.vector(vector.name, vector.plus))

    def _turned(self, x: ir.Value, gamma: VectorRef, eps: float, heads: int, layer: LayerSpec) -> ir.Value:
        """Norm each head of `[t, heads * d]` and rotate it: `[1, t, heads * d]`."""
        g, d = self.g, layer.head_dim
        normed = self.rms_norm(g.op("Reshape", x, g.constant([-1, heads, d])), gamma, eps)
        flat = g.op("Reshape", normed, g.constant([1, -1, heads * d]))
        frequencies = inverse_frequencies(layer)

        def turn() -> ir.Value:
            positions = g.op("Cast", g.positions(), to=ir.DataType.FLOAT)
            column = g.op("Unsqueeze", positions, g.constant([0, 2]))
            return g.op("Mul", column, g.constant(frequencies))

        key = frequencies.tobytes().hex()
        angles = g.shared(f"angles.{key}", turn)
        cos = g.shared(f"cos.{key}", lambda: g.op("Cos", angles))
        sin = g.shared(f"sin.{key}", lambda: g.op("Sin", angles))
        # The attribute means "all of the head" when it is 0.
        partial = 0 if layer.rotary_dims == d else layer.rotary_dims
        return g.op("RotaryEmbedding", flat, cos, sin, num_heads=heads, rotary_embedding_dim=partial)


def decoder_graph(config: Step35Config, store: WeightStore, spelling: Spelling) -> GraphWriter:
    """The main stack.

    Inputs `token_ids [t]`, `past_length [1]`, `rows [r]` int64 and a cache for each layer; outputs
    `logits [r, V]`, `hidden [t, D]` and the caches.
    """
    g = GraphWriter(store)
    ids, rows = _declare(g)
    logits, hidden = model.decoder(OnnxOps(g, spelling), config, ids, rows)
    return _finish(g, config, logits, hidden)


def mtp_graph(config: Step35Config, store: WeightStore, spelling: Spelling, module: int) -> GraphWriter:
    """An MTP module: as `decoder_graph`, with `carried [t, D]`, the hidden state it continues from."""
    g = GraphWriter(store)
    ids, rows = _declare(g)
    carried = g.input("carried", ir.DataType.FLOAT, ("t", config.hidden_size))
    logits, hidden = model.mtp_module(OnnxOps(g, spelling), config, module, ids, carried, rows)
    return _finish(g, config, logits, hidden)


def _declare(g: GraphWriter) -> tuple[ir.Value, ir.Value]:
    ids = g.input("token_ids", ir.DataType.INT64, ("t",))
    g.input("past_length", ir.DataType.INT64, (1,))
    return ids, g.input("rows", ir.DataType.INT64, ("r",))


def _finish(g: GraphWriter, config: Step35Config, logits: ir.Value, hidden: ir.Value) -> GraphWriter:
    g.output("logits", logits, ("r", config.vocab_size))
    g.output("hidden", hidden, ("t", config.hidden_size))
    # Results first: what a person looks for leads.
    g.outputs = {k: g.outputs[k] for k in ("logits", "hidden")} | g.outputs
    return g
