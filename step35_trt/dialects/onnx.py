"""The onnx dialect: the vocabulary as an ONNX graph over packed tokens.

What every spelling shares is here; `onnx_standard`, `onnx_ort` and `onnx_cpu` say how products, the
embedding and the two plugins are written in plain opset 24, in ONNX Runtime's contributed operators and with
our own. The first two make graphs over one sequence, for any program to run; the last makes the engines'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import onnx_ir as ir

from step35_trt import model
from step35_trt.dialects.onnx_attention import Heads
from step35_trt.dialects.onnx_graph import GraphWriter

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

    @property
    def passes(self) -> Sequence[ir.passes.InPlacePass]:
        """What is done to a finished graph."""
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

    def gated_attention(
        self,
        g: GraphWriter,
        heads: Heads,
        gate: ir.Value,
        gammas: tuple[ir.Value, ir.Value],
        eps: float,
        layer: LayerSpec,
    ) -> ir.Value:
        """`Ops.gated_attention`; `gammas` are those of q and k."""
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
        gammas = self._stored(q_gamma), self._stored(k_gamma)
        return self.spelling.gated_attention(self.g, Heads(q, k, v), gate, gammas, eps, layer)

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


def decoder_graph(config: Step35Config, store: WeightStore, spelling: Spelling) -> GraphWriter:
    """The main stack.

    Inputs `token_ids [t]`, `rows [r]` int64, what the spelling's attention has to know of the sequences, and
    each layer's cache; outputs `logits [r, V]`, `hidden [t, D]` and the caches.
    """
    g = GraphWriter(store, spelling.passes)
    ids, rows = _declare(g)
    logits, hidden = model.decoder(OnnxOps(g, spelling), config, ids, rows)
    return _finish(g, config, logits, hidden)


def mtp_graph(config: Step35Config, store: WeightStore, spelling: Spelling, module: int) -> GraphWriter:
    """An MTP module: as `decoder_graph`, with `carried [t, D]`, the hidden state it continues from."""
    g = GraphWriter(store, spelling.passes)
    ids, rows = _declare(g)
    carried = g.input("carried", ir.DataType.FLOAT, ("t", config.hidden_size))
    logits, hidden = model.mtp_module(OnnxOps(g, spelling), config, module, ids, carried, rows)
    return _finish(g, config, logits, hidden)


def _declare(g: GraphWriter) -> tuple[ir.Value, ir.Value]:
    ids = g.input("token_ids", ir.DataType.INT64, ("t",))
    return ids, g.input("rows", ir.DataType.INT64, ("r",))


def _finish(g: GraphWriter, config: Step35Config, logits: ir.Value, hidden: ir.Value) -> GraphWriter:
    g.output("logits", logits, ("r", config.vocab_size))
    g.output("hidden", hidden, ("t", config.hidden_size))
    # Results first: what a person looks for leads.
    g.outputs = {k: g.outputs[k] for k in ("logits", "hidden")} | g.outputs
    return g
