"""ONNX Runtime with our own CPU operators for 4-bit weights (`plugins/`), its own operators for the rest.

Ours read the weights where the file is mapped, so nothing is packed again at load and memory holds one copy;
the experts' clamp is Step's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.dialects.onnx_graph import OURS
from step35_trt.dialects.onnx_ort import OrtSpelling

if TYPE_CHECKING:
    import onnx_ir as ir

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.onnx_graph import GraphWriter
    from step35_trt.weight_store import Layout, Matrix


@dataclass(frozen=True)
class CpuSpelling:
    """`Spelling` for int4 weights and int8 activations on the CPU."""

    runtime: OrtSpelling = field(default_factory=lambda: OrtSpelling(int8_activations=True))

    @property
    def layout(self) -> Layout:
        """See `Spelling`."""
        return "tiles"

    def linear(self, g: GraphWriter, x: ir.Value, weight: Matrix) -> ir.Value:
        """See `Spelling`."""
        if weight.bits != 4 or weight.scales is None:
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

    def attend(self, g: GraphWriter, q: ir.Value, k: ir.Value, v: ir.Value, layer: LayerSpec) -> ir.Value:
        """See `Spelling`."""
        return self.runtime.attend(g, q, k, v, layer)

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
        if bits != 4:
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
