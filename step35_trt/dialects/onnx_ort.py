"""ONNX Runtime's contributed operators: windowed GroupQueryAttention, QMoE and MoE, MatMulNBits.

Step's clamp and theirs differ (specification 2.7): they bound the gate before SiLU and use one limit L' for
gate and up. Both are made equal. SiLU grows with its argument where it is positive, so
`min(silu(g), L) = silu(min(g, L'))` with `silu(L') = L`; and with the up rows stretched by `s = L'/L` and the
down rows shrunk by it, `clamp(s u, -L', L') / s = clamp(u, -L, L)`. The stretch is folded into the stored
weights or scales, so the operators compute Step's function with one more rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from step35_trt.dialects.onnx_attention import composed
from step35_trt.dialects.onnx_graph import CONTRIB
from step35_trt.program import CacheSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.onnx_attention import Heads
    from step35_trt.dialects.onnx_graph import GraphWriter
    from step35_trt.weight_store import Layout, Matrix


@dataclass(frozen=True)
class OrtSpelling:
    """`Spelling` for ONNX Runtime. `int8_activations` lets quantised products use integer arithmetic."""

    int8_activations: bool

    @property
    def layout(self) -> Layout:
        """See `Spelling`."""
        return "blocks"

    @property
    def passes(self) -> Sequence[ir.passes.InPlacePass]:
        """See `Spelling`."""
        return ()

    def linear(self, g: GraphWriter, x: ir.Value, weight: Matrix) -> ir.Value:
        """See `Spelling`."""
        if weight.scales is None:
            return g.op("Gemm", x, g.weight(weight.values), transB=1)
        n, k = weight.shape
        attributes: dict[str, int | float | str] = {
            "K": k,
            "N": n,
            "bits": weight.bits,
            "block_size": weight.block,
            "accuracy_level": self._accuracy,
        }
        inputs = [x, g.weight(weight.values), g.weight(weight.scales)]
        return g.foreign(CONTRIB, "MatMulNBits", inputs, attributes, (None, n))

    def embedding(self, g: GraphWriter, token_ids: ir.Value, weight: str) -> ir.Value:
        """See `Spelling`."""
        matrix = g.store.matrix(weight)
        if matrix.scales is None:
            return g.op("Gather", g.weight(matrix.values, "rows"), token_ids, axis=0)
        attributes: dict[str, int | float | str] = {
            "bits": matrix.bits,
            "block_size": matrix.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        inputs = [g.weight(matrix.values, "rows"), token_ids, g.weight(matrix.scales, "rows")]
        width = matrix.shape[1]
        return g.foreign(CONTRIB, "GatherBlockQuantized", inputs, attributes, (None, width))

    def silu(self, g: GraphWriter, x: ir.Value) -> ir.Value:
        """See `Spelling`."""
        return g.foreign(CONTRIB, "QuickGelu", [x], {"alpha": 1.0}, x.shape)

    def gated_attention(
        self,
        g: GraphWriter,
        heads: Heads,
        gate: ir.Value,
        gammas: tuple[ir.Value, ir.Value],
        eps: float,
        layer: LayerSpec,
    ) -> ir.Value:
        """See `Spelling`."""
        return composed(_attend, g, heads, gate, gammas, eps, layer)

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
        """See `Spelling`."""
        before = inverse_silu(limit) if limit else 0.0
        stored = g.store.experts(experts, before / limit if limit else 1.0)
        attributes: dict[str, int | float | str] = {
            "k": top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 1,
        }
        if limit:
            attributes["swiglu_limit"] = before
        up, down = g.weight(stored.up.values, "experts"), g.weight(stored.down.values, "experts")
        if stored.up.scales is None or stored.down.scales is None:
            mixing = _as_log_softmax(g, selection, weights, top_k)
            out = g.foreign(CONTRIB, "MoE", [x, mixing, up, None, down], attributes, x.shape)
        else:
            attributes |= {
                "expert_weight_bits": stored.up.bits,
                "block_size": stored.up.block,
                "accuracy_level": self._accuracy,
            }
            up_scales, down_scales = (g.weight(m, "experts") for m in (stored.up.scales, stored.down.scales))
            inputs = [x, selection, up, up_scales, None, down, down_scales]
            out = g.foreign(CONTRIB, "QMoE", [*inputs, *[None] * 7, weights], attributes, x.shape)
        return g.op("Mul", out, g.constant(float(scale)))

    @property
    def _accuracy(self) -> int:
        return 4 if self.int8_activations else 0


def _attend(g: GraphWriter, heads: Heads, layer: LayerSpec) -> ir.Value:
    spec = CacheSpec.of(layer, "compacting" if layer.window else "linear")
    total = g.shared(
        "total_int32",
        lambda: g.op("Cast", g.op("Squeeze", g.total_length()), to=ir.DataType.INT32),
    )
    last = g.shared(
        "last_int32",
        lambda: g.op("Sub", g.op("Cast", g.total_length(), to=ir.DataType.INT32), _one(g)),
    )
    attributes: dict[str, int | float | str] = {
        "num_heads": layer.query_heads,
        "kv_num_heads": layer.kv_heads,
        "local_window_size": layer.window or -1,
        "sliding_window_cache": int(layer.window > 0),
    }
    past = g.cache(spec)
    out, keys, values = g.tape.op_multi_out(
        "GroupQueryAttention",
        [*heads, *past, last, total],
        attributes,
        num_outputs=3,
        domain=CONTRIB,
    )
    g.cached(spec, keys, values)
    out.type = ir.TensorType(ir.DataType.FLOAT)
    out.shape = ir.Shape((1, None, layer.query_heads * layer.head_dim))
    return out


def inverse_silu(value: float) -> float:
    """The positive x with `x sigmoid(x) = value`, by Newton's method in fp64."""
    x = max(value, 0.5)
    for _ in range(50):
        s = 1 / (1 + math.exp(-x))
        x -= (x * s - value) / (s * (1 + x * (1 - s)))
    return x


def _as_log_softmax(g: GraphWriter, selection: ir.Value, weights: ir.Value, top_k: int) -> ir.Value:
    """Logits whose softmax is the chosen weights over their sum.

    The fp32 operator selects and mixes by one tensor and applies a softmax to it.
    """
    _, chosen = g.tape.op_multi_out(
        "TopK", [selection, g.constant([top_k])], {"axis": -1, "sorted": 0}, num_outputs=2
    )
    logs = g.op("Log", g.op("GatherElements", weights, chosen, axis=-1))
    nowhere = g.op("Expand", g.constant(np.array(-np.inf, np.float32)), g.op("Shape", selection))
    return g.op("ScatterElements", nowhere, chosen, logs, axis=-1)


def _one(g: GraphWriter) -> ir.Value:
    return g.constant(np.array([1], np.int32))
