"""ONNX Runtime with our own CPU operators (`plugins/`): paged attention, and products with 4-bit weights.

Those read the weights where the file is mapped, so nothing is packed again at load and memory holds one copy;
the experts' clamp is Step's own. A decode step launches few operators: each costs as much as reading half a
megabyte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.dialects.onnx_chain import ChainSteps
from step35_trt.dialects.onnx_fuse import PASSES
from step35_trt.dialects.onnx_graph import OURS
from step35_trt.dialects.onnx_ort import OrtSpelling
from step35_trt.dialects.onnx_paged import paged_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.onnx_attention import Heads
    from step35_trt.dialects.onnx_graph import GraphWriter
    from step35_trt.weight_store import Layout, Matrix


@dataclass(frozen=True)
class CpuSpelling:
    """`Spelling` of the CPU engines: attention is ours, with int8 activations also products of int4 weights.

    `runtime` writes everything else.
    """

    runtime: OrtSpelling = field(default_factory=lambda: OrtSpelling(int8_activations=True))

    @property
    def layout(self) -> Layout:
        """See `Spelling`."""
        return "tiles" if self.runtime.int8_activations else self.runtime.layout

    @property
    def passes(self) -> Sequence[ir.passes.InPlacePass]:
        """See `Spelling`."""
        return (*PASSES, ChainSteps())

    def linear(self, g: GraphWriter, x: ir.Value, weight: Matrix) -> ir.Value:
        """See `Spelling`."""
        if weight.bits != 4 or weight.scales is None or not self.runtime.int8_activations:
            return self.runtime.linear(g, x, weight)
        n, _ = weight.shape
        inputs = [x, g.weight(weight.values), g.weight(weight.scales)]
        return g.foreign(OURS, "Int4Linear", inputs, {"N": n, "block": weight.block}, (None, n))

    def embedding(self, g: GraphWriter, token_ids: ir.Value, weight: str) -> ir.Value:
        """See `Spelling`."""
        return self.runtime.embedding(g, token_ids, weight)

    def silu(self, g: GraphWriter, x: ir.Value) -> ir.Value:
        """See `Spelling`."""
        return self.runtime.silu(g, x)

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
        return paged_attention(g, heads, gate, gammas, eps, layer)

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
        bits, _ = g.store.coding(f"{experts}.up_proj.weight")
        if bits != 4 or not self.runtime.int8_activations:
            return self.runtime.experts(g, x, selection, weights, experts, top_k, scale, limit)
        stored = g.store.experts(experts, stretch=1.0)
        inputs = [x, selection, weights]
        for matrix in (stored.up, stored.down):
            assert matrix.scales is not None
            inputs += [g.weight(matrix.values, "experts"), g.weight(matrix.scales, "experts")]
        attributes: dict[str, int | float | str] = {
            "block": stored.up.block,
            "top_k": top_k,
            "scale": float(scale),
            "limit": float(limit),
        }
        return g.foreign(OURS, "Int4Experts", inputs, attributes, x.shape)
