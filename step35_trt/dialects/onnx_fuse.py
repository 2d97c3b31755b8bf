"""Passes over a written graph that join our CPU operators: fewer launches, fewer passes over activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from step35_trt.dialects.onnx_graph import OURS
from step35_trt.quantize.cpu_layout import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOST_PRODUCTS = 4  # of one node (`plugins/int4_linear/cpu.c`)


class JoinProducts(ir.passes.InPlacePass):
    """`Int4Linear`s of one input become one node: its activations are quantised once.

    Only the last product of a node may have a width that tiles do not divide.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See `ir.passes.PassBase`."""
        groups: dict[tuple[ir.Value | None, int], list[ir.Node]] = {}
        for node in _ours(model.graph):
            groups.setdefault((node.inputs[0], _int(node, "block")), []).append(node)
        joined = [g for group in groups.values() for g in _runs(group) if len(g) > 1]
        for group in joined:
            _join(model.graph, group)
        return ir.passes.PassResult(model, bool(joined))


class AbsorbSwiglu(ir.passes.InPlacePass):
    """An `Int4Linear` of a clipped SwiGLU computes it while it quantises."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See `ir.passes.PassBase`."""
        absorbed = [node for node in _ours(model.graph) if _absorb(model.graph, node)]
        return ir.passes.PassResult(model, bool(absorbed))


PASSES = (AbsorbSwiglu(), JoinProducts())


def _ours(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in tuple(graph) if (node.domain, node.op_type) == (OURS, "Int4Linear"))


def _int(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()


def _runs(nodes: Sequence[ir.Node]) -> Iterator[list[ir.Node]]:
    run: list[ir.Node] = []
    for node in nodes:
        run.append(node)
        if len(run) == MOST_PRODUCTS or _int(node, "N") % TILE:
            yield run
            run = []
    yield run


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    weights = [value for node in nodes for value in node.inputs[1:]]
    attributes = [ir.AttrInt64("N", _int(nodes[-1], "N")), ir.AttrInt64("block", _int(nodes[0], "block"))]
    inputs = [nodes[0].inputs[0], *weights]
    joined = ir.Node(OURS, "Int4Linear", inputs, attributes, num_outputs=len(nodes), name=nodes[0].name)
    graph.insert_before(nodes[0], joined)
    for node, new in zip(nodes, joined.outputs, strict=True):
        _take_place(node.outputs[0], new)
    graph.remove(nodes, safe=True)


def _absorb(graph: ir.Graph, linear: ir.Node) -> bool:
    product = _made_by(linear.inputs[0], "Mul")
    if product is None:
        return False
    nodes, limit = [linear, product], 0.0
    gate, up = product.inputs
    bounded = _made_by(gate, "Min")
    if bounded is not None:
        cut = _made_by(up, "Clip")
        bound = bounded.inputs[1]
        assert cut is not None
        assert bound is not None
        assert bound.const_value is not None
        limit = float(bound.const_value.numpy())
        nodes += [bounded, cut]
        gate, up = bounded.inputs[0], cut.inputs[0]
    silu = _made_by(gate, "QuickGelu")
    if silu is None:
        return False
    nodes.append(silu)
    attributes = [*linear.attributes.values(), ir.AttrFloat32("limit", limit)]
    inputs = [silu.inputs[0], up, *linear.inputs[1:]]
    gated = ir.Node(OURS, "Int4GatedLinear", inputs, attributes, name=linear.name)
    graph.insert_before(linear, gated)
    _take_place(linear.outputs[0], gated.outputs[0])
    graph.remove(nodes, safe=True)
    return True


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of that kind that made `value`, where nothing else uses it."""
    node = value.producer() if value is not None else None
    only = value is not None and len(value.uses()) == 1
    return node if node is not None and node.op_type == kind and only else None


def _take_place(old: ir.Value, new: ir.Value) -> None:
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
