"""The onnx dialect: the vocabulary as an ONNX graph over one sequence's packed tokens.

What every spelling shares is here; `onnx_standard` and `onnx_ort` say how products, the embedding and the
two plugins are written in plain opset 24 and in ONNX Runtime's contributed operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import onnx_ir as ir

from step35_trt import model
from step35_trt.dialects.onnx_graph import GraphWriter
from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.config import LayerSpec, Step35Config
    from step35_trt.weight_store import Layout, Matrix, WeightStore

    Attribute = int | float | str | Sequence[int] | ir.Graph


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
