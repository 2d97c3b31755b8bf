"""Plain opset 24: any conforming runtime executes it, at whatever speed that runtime has.

Window layers use a ring cache whose capacity must exceed the window by the tokens of a call and by the rows
that a caller may take back. Experts run token by token (Scan), so only the chosen ones are ever gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from step35_trt.dialects.onnx_attention import composed
from step35_trt.errors import UnsupportedError
from step35_trt.program import CacheSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.onnx_attention import Heads
    from step35_trt.dialects.onnx_graph import GraphWriter
    from step35_trt.weight_file import Placed
    from step35_trt.weight_store import Layout, Matrix


@dataclass(frozen=True)
class StandardSpelling:
    """`Spelling` in standard operators, for fp32 weights."""

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
        return g.op("Gemm", x, g.weight(_plain(weight)), transB=1)

    def embedding(self, g: GraphWriter, token_ids: ir.Value, weight: str) -> ir.Value:
        """See `Spelling`."""
        return g.op("Gather", g.weight(_plain(g.store.matrix(weight)), "rows"), token_ids, axis=0)

    def silu(self, g: GraphWriter, x: ir.Value) -> ir.Value:
        """See `Spelling`."""
        return g.op("Swish", x)

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
        _, chosen = g.tape.op_multi_out(
            "TopK", [selection, g.constant([top_k])], {"axis": -1, "sorted": 1}, num_outputs=2
        )
        mix = g.op("GatherElements", weights, chosen, axis=-1)
        total = g.op("ReduceSum", mix, g.constant([-1]), keepdims=1)
        total = g.op("Add", total, g.constant(np.array(1e-20, np.float32)))
        mix = g.op("Mul", g.op("Div", mix, total), g.constant(float(scale)))
        names = [f"{experts}.{part}_proj.weight" for part in ("gate", "up", "down")]
        body = _one_token(
            [g.weight(g.store.matrix(name, fp32=True).values, "experts") for name in names], limit, experts
        )
        return g.op("Scan", x, chosen, mix, body=body, num_scan_inputs=3)


def _attend(g: GraphWriter, heads: Heads, layer: LayerSpec) -> ir.Value:
    d, groups = layer.head_dim, layer.kv_heads
    spec = CacheSpec.of(layer, "ring" if layer.window else "linear")
    past_key, past_value = g.cache(spec)
    capacity = g.op("Shape", past_key, start=2, end=3)
    at = g.op("Mod", g.past_length(), capacity)

    def write(past: ir.Value, new: ir.Value) -> ir.Value:
        split = g.op("Reshape", new, g.constant([1, -1, groups, d]))
        by_head = g.op("Transpose", split, perm=[0, 2, 1, 3])
        return g.op("TensorScatter", past, by_head, at, axis=-2, mode="circular")

    keys, values = write(past_key, heads.k), write(past_value, heads.v)
    g.cached(spec, keys, values)
    queries = g.op("Reshape", heads.q, g.constant([1, -1, layer.query_heads, d]))
    queries = g.op("Transpose", queries, perm=[0, 2, 1, 3])
    out = g.op("Attention", queries, keys, values, _seen(g, capacity, layer))
    back = g.op("Transpose", out, perm=[0, 2, 1, 3])
    return g.op("Reshape", back, g.constant([1, -1, layer.query_heads * d]))


def _seen(g: GraphWriter, capacity: ir.Value, layer: LayerSpec) -> ir.Value:
    """Which slots each token attends: bool `[t, capacity]`.

    The newest row written to slot s before the call's end is `last - (last - s) mod capacity`; a negative
    one was never written. In a linear cache the formula gives s itself.
    """

    def slots() -> ir.Value:
        size = g.op("Squeeze", capacity)
        last = g.op("Sub", g.total_length(), g.constant(1))
        age = g.op("Mod", g.op("Sub", last, g.op("Range", g.constant(0), size, g.constant(1))), capacity)
        return g.op("Sub", last, age)

    def mask() -> ir.Value:
        held = slots()
        own = g.op("Unsqueeze", g.positions(), g.constant([1]))
        seen = g.op("And", g.op("GreaterOrEqual", held, g.constant(0)), g.op("LessOrEqual", held, own))
        if layer.window:
            recent = g.op("Greater", held, g.op("Sub", own, g.constant(layer.window)))
            seen = g.op("And", seen, recent)
        return seen

    # Layers of one kind have caches of one capacity.
    return g.shared(f"mask.{layer.window}", mask)


def _one_token(stacks: list[ir.Value], limit: float, prefix: str) -> ir.Graph:
    """Scan's body: one token's chosen experts. It sees the outer graph: names must not meet its."""
    token = ir.val(f"{prefix}.token", ir.DataType.FLOAT, (None,))
    chosen = ir.val(f"{prefix}.chosen", ir.DataType.INT64, (None,))
    mix = ir.val(f"{prefix}.mix", ir.DataType.FLOAT, (None,))
    body = tape.Tape()

    def op(kind: str, *inputs: ir.Value, axis: int | None = None) -> ir.Value:
        return body.op(kind, inputs, {} if axis is None else {"axis": axis})

    def constant(name: str, values: np.ndarray) -> ir.Value:
        return body.initializer(ir.tensor(values, name=name), f"{prefix}.{name}")

    gate_w, up_w, down_w = (op("Gather", stack, chosen, axis=0) for stack in stacks)
    last = constant("last", np.array([-1], np.int64))
    column = op("Unsqueeze", token, last)
    gate, up = op("Swish", op("MatMul", gate_w, column)), op("MatMul", up_w, column)
    if limit:
        high = constant("high", np.array(limit, np.float32))
        gate = op("Min", gate, high)
        up = op("Clip", up, constant("low", np.array(-limit, np.float32)), high)
    each = op("Squeeze", op("MatMul", down_w, op("Mul", gate, up)), last)
    out = op("MatMul", mix, each)
    for i, node in enumerate(body.nodes):
        node.outputs[0].name = f"{prefix}.{i}"
    out.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(
        [token, chosen, mix], [out], nodes=body.nodes, initializers=body.initializers, name=prefix
    )


def _plain(weight: Matrix) -> Placed:
    if weight.scales is not None:
        raise UnsupportedError(
            "standard operators are exported in fp32", "Use --ops ort for quantised recipes."
        )
    return weight.values
