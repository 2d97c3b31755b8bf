"""Gated attention of several sequences over paged caches, as our own operator (`plugins/gated_attention`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from step35_trt.dialects.onnx_graph import OURS
from step35_trt.errors import UnsupportedError
from step35_trt.program import CacheSpec
from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec
    from step35_trt.dialects.onnx_attention import Heads
    from step35_trt.dialects.onnx_graph import GraphWriter

# What the operator takes (`plugins/gated_attention/attend.h`).
LANES, MOST_DIM, MOST_PER_GROUP = 16, 256, 64


def paged_attention(
    g: GraphWriter,
    heads: Heads,
    gate: ir.Value,
    gammas: tuple[ir.Value, ir.Value],
    eps: float,
    layer: LayerSpec,
) -> ir.Value:
    """`Ops.gated_attention`.

    Graph inputs, all int64: `starts [s + 1]`, where each sequence's tokens begin and the last one's end;
    `pasts [s]`, rows that a sequence has already; `pages.full`, `pages.window` `[s, p]`, where its page p
    lies in the caches of layers without and with a window.

    Raises:
        UnsupportedError: the operator does not take heads of this form.
    """
    d = layer.head_dim
    if d % LANES or d > MOST_DIM or layer.query_heads // layer.kv_heads > MOST_PER_GROUP:
        raise UnsupportedError(
            f"layer {layer.index} has {layer.query_heads} heads of {d} elements on {layer.kv_heads}; "
            f"the CPU takes 16, 32, ... or {MOST_DIM} elements and up to {MOST_PER_GROUP} heads on each",
            "step35-trt export-onnx CHECKPOINT -o DIR --ops ort",
        )
    spec = CacheSpec.of(layer, "paged")
    batch = [
        g.input(f"pages.{spec.table}", ir.DataType.INT64, ("s", "p")),
        g.input("starts", ir.DataType.INT64, ("s + 1",)),
        g.input("pasts", ir.DataType.INT64, ("s",)),
    ]
    inputs = [*heads, gate, *gammas, g.constant(inverse_frequencies(layer)), *g.cache(spec), *batch]
    attributes: dict[str, int | float | str] = {"window": layer.window, "eps": eps}
    out, keys, values = g.tape.op_multi_out("GatedAttention", inputs, attributes, num_outputs=3, domain=OURS)
    g.cached(spec, keys, values)
    out.type = ir.TensorType(ir.DataType.FLOAT)
    out.shape = ir.Shape((None, layer.query_heads * d))
    return out
