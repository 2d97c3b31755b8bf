"""A greedy round of drafting and verification as one graph: MTP modules one by one, then the decoder.

What a module drafts goes from its logits into the next module's and the decoder's token ids without leaving
the graph. Calling each by itself costs the host about as much again as a small model's modules take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from step35_trt import model
from step35_trt.dialects.onnx import OnnxOps
from step35_trt.dialects.onnx_graph import OURS, GraphWriter

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.dialects.onnx import Spelling
    from step35_trt.weight_store import WeightStore


def round_graph(config: Step35Config, store: WeightStore, spelling: Spelling, depth: int) -> GraphWriter:
    """Modules 0 .. `depth` - 1 and the decoder (specification 3.2), each over packed tokens of its own.

    Inputs: `known [n]` int64, token ids; for each part, `mtp-k.` or `decoder.` before the name,
    `ids [t]`, which of `known` and after them of the drafts so far, module by module, each token is, `rows
    [r]`, and what the attention has to know (`onnx_paged`); for a module `held [h, D]`, hidden rows that it
    continues from, and from the second on `carried [t]`, which of those and after them of the rows that the
    module before has just made it takes; the caches of all.

    Outputs: `drafts [d]`, a row's likeliest token for every row that modules draft from, module by module,
    and `choices [r]`, the decoder's; the lowest id among equals, -1 where a logit is not finite; `hidden
    [t, D]` of the decoder and `mtp-k.hidden [t, D]`; the caches.
    """
    g = GraphWriter(store, spelling.passes)
    ops = OnnxOps(g, spelling)
    width = config.hidden_size
    ids = g.input("known", ir.DataType.INT64, ("n",))
    drafts: list[ir.Value] = []
    hidden: ir.Value | None = None
    for module in range(depth):
        g.scope = f"mtp-{module}."
        carried = g.input("held", ir.DataType.FLOAT, ("h", width))
        if hidden is not None:
            taken = g.input("carried", ir.DataType.INT64, ("t",))
            carried = ops.rows(g.op("Concat", carried, hidden, axis=0), taken)
        tokens, rows = _part(g, ids)
        logits, hidden = model.mtp_module(ops, config, module, tokens, carried, rows)
        g.output("hidden", hidden, ("t", width))
        token, said = greedy(g, logits)
        ids = g.op("Concat", ids, token, axis=0)
        drafts.append(said)
    g.scope = "decoder."
    tokens, rows = _part(g, ids)
    logits, hidden = model.decoder(ops, config, tokens, rows)
    g.output("hidden", hidden, ("t", width))
    _, choices = greedy(g, logits)
    g.scope = ""
    g.output("drafts", g.op("Concat", *drafts, axis=0), ("d",), ir.DataType.INT64)
    g.output("choices", choices, ("r",), ir.DataType.INT64)
    return g


def greedy(g: GraphWriter, logits: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Of each row its likeliest token, twice: a valid id in any case, and -1 where a logit is not finite."""
    token, said = g.tape.op_multi_out("Greedy", [logits], num_outputs=2, domain=OURS)
    for value in (token, said):
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((None,))
    return token, said


def _part(g: GraphWriter, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A part's token ids, and the rows whose logits are wanted."""
    taken = g.input("ids", ir.DataType.INT64, ("t",))
    return g.op("Gather", ids, taken, axis=0), g.input("rows", ir.DataType.INT64, ("r",))
