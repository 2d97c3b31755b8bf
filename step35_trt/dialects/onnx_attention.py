"""Gated attention out of smaller operators: norm, rotation, some attention over a cache, gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import onnx_ir as ir

from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec
    from step35_trt.dialects.onnx_graph import GraphWriter


class Heads(NamedTuple):
    """Queries, keys and values: `[t, heads * d]` as projected, `[1, t, heads * d]` once rotated."""

    q: ir.Value
    k: ir.Value
    v: ir.Value


class Attend(Protocol):
    """Cache write and (windowed) causal attention of normed, rotated `[1, t, heads * d]`."""

    def __call__(self, g: GraphWriter, heads: Heads, layer: LayerSpec) -> ir.Value:
        """To `[1, t, H * d]`."""
        ...


def composed(
    attend: Attend,
    g: GraphWriter,
    heads: Heads,
    gate: ir.Value,
    gammas: tuple[ir.Value, ir.Value],
    eps: float,
    layer: LayerSpec,
) -> ir.Value:
    """`Ops.gated_attention` around `attend` (specification 2.4)."""
    h, d = layer.query_heads, layer.head_dim
    turned = Heads(
        _turned(g, heads.q, gammas[0], eps, h, layer),
        _turned(g, heads.k, gammas[1], eps, layer.kv_heads, layer),
        g.op("Reshape", heads.v, g.constant([1, -1, layer.kv_heads * d])),
    )
    split = g.op("Reshape", attend(g, turned, layer), g.constant([-1, h, d]))
    open_ = g.op("Unsqueeze", g.op("Sigmoid", gate), g.constant([-1]))
    return g.op("Reshape", g.op("Mul", split, open_), g.constant([-1, h * d]))


def _turned(
    g: GraphWriter, x: ir.Value, gamma: ir.Value, eps: float, heads: int, layer: LayerSpec
) -> ir.Value:
    """Norm each head of `[t, heads * d]` and rotate it: `[1, t, heads * d]`."""
    d = layer.head_dim
    split = g.op("Reshape", x, g.constant([-1, heads, d]))
    normed = g.op("RMSNormalization", split, gamma, axis=-1, epsilon=eps)
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
