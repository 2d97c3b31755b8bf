"""Chains: a decoder, or what lies between other nodes, becomes one node of `plugins/chain/cpu.c`.

At one token a node's start and end cost as much as reading half a megabyte, and while a norm or a sum runs
memory is idle. In a chain one set of threads goes through all steps, and who waits asks for the next weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from step35_trt.dialects.onnx_chain_steps import (
    ATTEND,
    DROP,
    EMBED,
    EXPERTS,
    GATED,
    LINEAR,
    NORM,
    ROWS,
    Step,
    attribute,
    dim,
    steps_of,
    weights_of,
    widths_of,
)
from step35_trt.dialects.onnx_graph import OURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ChainSteps(ir.passes.InPlacePass):
    """Sums, norms, attention, products and experts become `Chain`s, where 4-bit weights are among them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See `ir.passes.PassBase`."""
        graph = model.graph
        chains = [c for c in _chains(graph, steps_of(graph)) if any(step.kind >= LINEAR for step in c)]
        for index, chain in enumerate(chains):
            _replace(graph, _scheduled(chain), f"chain.{index}")
        if chains:
            graph.sort()
        return ir.passes.PassResult(model, bool(chains))


def _chains(graph: ir.Graph, steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that can be done together.

    A node's level counts how often the way to it goes from steps to other nodes or back. On a way between two
    steps of one level there is no other node, so they can be one.
    """
    of = {node: step for step in steps for node in step.nodes}
    level: dict[ir.Node, int] = {}

    def reach(node: ir.Node) -> int:
        members = of[node].nodes if node in of else [node]
        before = {p for m in members for v in m.inputs if v is not None and (p := v.producer()) is not None}
        return max((level[p] + ((p in of) != (node in of)) for p in before - set(members)), default=0)

    for node in _in_order(graph, of):
        found = reach(node)
        for member in of[node].nodes if node in of else [node]:
            level[member] = found
    chains: dict[int, list[Step]] = {}
    for step in steps:
        chains.setdefault(level[step.nodes[0]], []).append(step)
    return list(chains.values())


def _in_order(graph: ir.Graph, of: dict[ir.Node, Step]) -> list[ir.Node]:
    """One node of each step and every other node, each after all that a step's nodes together need."""
    done: set[ir.Node] = set()
    order: list[ir.Node] = []

    def visit(node: ir.Node) -> None:
        if node in done:
            return
        members = of[node].nodes if node in of else [node]
        done.update(members)
        for member in members:
            for value in member.inputs:
                producer = value.producer() if value is not None else None
                if producer is not None:
                    visit(producer)
        order.append(node)

    for node in graph:
        visit(node)
    return order


def _scheduled(steps: Sequence[Step]) -> list[Step]:
    """Every step after those it reads from; what is ready early and short goes first, experts last."""
    waiting, made, order = list(steps), {v for s in steps for v in s.makes}, []
    while waiting:
        ready = [s for s in waiting if not made & set(s.reads)]
        step = min(ready, key=lambda s: s.kind)
        waiting.remove(step)
        made -= set(step.makes)
        order.append(step)
    return order


@dataclass
class _Program:
    """The node's attributes and inputs while steps are written."""

    inputs: list[ir.Value] = field(default_factory=list)
    ints: list[int | ir.Value] = field(default_factory=list)
    reals: list[float] = field(default_factory=list)
    results: list[ir.Value] = field(default_factory=list)

    def take(self, *values: ir.Value | None) -> None:
        for value in values:
            assert value is not None
            self.ints.append(value)
            if value not in self.results and value not in self.inputs:
                self.inputs.append(value)

    def write(self, step: Step) -> None:
        node = step.nodes[-1] if step.kind == EXPERTS else step.nodes[0]
        self.ints.append(step.kind)
        if step.kind == ROWS:
            self.take(node.inputs[1])
        self.take(*step.reads)
        if step.kind == EMBED:
            self.take(node.inputs[0], node.inputs[2])
            self.ints.append(attribute(node, "block_size"))
        elif step.kind == NORM:
            self.take(node.inputs[1])
            self.reals.append(node.attributes["epsilon"].as_float())
        elif step.kind == ATTEND:
            self.take(*node.inputs[len(step.reads) :])
            self.ints.append(attribute(node, "window"))
            self.reals.append(node.attributes["eps"].as_float())
        elif step.kind in {LINEAR, GATED}:
            self._products(step, node)
        elif step.kind == EXPERTS:
            self.take(step.nodes[1].inputs[1], *node.inputs[3:])
            self.ints += [attribute(node, name) for name in ("block", "top_k")]
            self.reals += [node.attributes[name].as_float() for name in ("scale", "limit")]
        self.results += step.makes

    def _products(self, step: Step, node: ir.Node) -> None:
        weights = weights_of(node)
        self.ints.append(attribute(node, "block"))
        if step.kind == LINEAR:
            self.ints.append(len(step.makes))
        for weight, scales, width in zip(weights[::2], weights[1::2], widths_of(node), strict=True):
            self.take(weight, scales)
            self.ints.append(width)
        for gemm in step.gemms:
            fp32 = gemm.inputs[1]
            assert fp32 is not None
            self.take(fp32)
            self.ints += [-1, dim(fp32, 0)]
        if step.kind == GATED:
            self.reals.append(node.attributes["limit"].as_float())

    def drop(self, values: Iterable[ir.Value]) -> None:
        for value in values:
            self.ints += [DROP, value]

    def node(self, outputs: Sequence[ir.Value], name: str) -> ir.Node:
        number = {value: i for i, value in enumerate([*self.inputs, *self.results])}
        attributes = [
            ir.AttrInt64s("steps", [v if isinstance(v, int) else number[v] for v in self.ints]),
            ir.AttrFloat32s("reals", self.reals),
            ir.AttrInt64s("results", [number[value] for value in outputs]),
        ]
        return ir.Node(OURS, "Chain", self.inputs, attributes, num_outputs=len(outputs), name=name)


def _replace(graph: ir.Graph, steps: Sequence[Step], name: str) -> None:
    program, nodes = _Program(), [node for step in steps for node in step.nodes]
    inside, made = set(nodes), [value for step in steps for value in step.makes]
    outputs = [
        value
        for value in made
        if value.is_graph_output() or any(user not in inside for user, _ in value.uses())
    ]
    last = {value: step for step in steps for value in (*step.makes, *step.reads)}
    for step in steps:
        program.write(step)
        program.drop(v for v in made if last[v] is step and v not in outputs)
    chain = program.node(outputs, name)
    graph.insert_before(nodes[0], chain)
    for old, new in zip(outputs, chain.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(nodes, safe=True)
