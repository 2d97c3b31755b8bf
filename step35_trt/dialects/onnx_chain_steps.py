"""Which nodes of a graph the steps of a chain can do (`onnx_chain`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from step35_trt.quantize.cpu_layout import TILE

# As in `plugins/chain/steps.c`.
EMBED, ROWS, ADD, NORM, ATTEND, LINEAR, GATED, EXPERTS, DROP = range(9)
ACTIVATIONS = {ADD: 2, GATED: 2, ATTEND: 4}  # inputs that are, of steps that have several
MOST_PRODUCTS = 4  # of one step


@dataclass
class Step:
    """A step to be: what it reads of activations, the nodes it stands for, and what they make."""

    kind: int
    reads: tuple[ir.Value, ...]
    nodes: list[ir.Node]
    makes: list[ir.Value]
    gemms: list[ir.Node] = field(default_factory=list)


def steps_of(graph: ir.Graph) -> list[Step]:
    """The nodes that a chain can do, in the graph's order; fp32 products go with 4-bit ones."""
    known, steps = _known_widths(graph), list[Step]()
    for node in graph:
        kind = _kind(node, known)
        if kind == EXPERTS:
            steps += _experts(node)
        elif kind is not None:
            reads = node.inputs[1:2] if kind == EMBED else node.inputs[: ACTIVATIONS.get(kind, 1)]
            steps.append(Step(kind, tuple(v for v in reads if v is not None), [node], list(node.outputs)))
    linears = {step.reads[0]: step for step in reversed(steps) if step.kind == LINEAR}
    for node in graph:
        step = linears.get(x) if _is_plain_gemm(node) and (x := node.inputs[0]) is not None else None
        if step is not None and len(step.makes) < MOST_PRODUCTS:
            step.gemms.append(node)
            step.nodes.append(node)
            step.makes.append(node.outputs[0])
    made = {value for step in steps for value in step.makes}
    # Experts whose logits no step makes stay a node.
    return [step for step in steps if step.kind != EXPERTS or step.reads[1] in made]


def weights_of(node: ir.Node) -> list[ir.Value]:
    """Weight and scales of each product of a node."""
    values = node.inputs[2 if node.op_type == "Int4GatedLinear" else 1 :]
    return [value for value in values if value is not None]


def widths_of(node: ir.Node) -> list[int]:
    """The width of each product of a node; only the last need not be whole tiles."""
    return [*(dim(weight, 0) * TILE for weight in weights_of(node)[:-2:2]), attribute(node, "N")]


def dim(value: ir.Value, axis: int) -> int:
    """A known dimension; 0 where it is not."""
    size = value.shape[axis] if value.shape is not None and len(value.shape) > axis else 0
    return size if isinstance(size, int) else 0


def attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute."""
    return node.attributes[name].as_int() if name in node.attributes else default


def _known_widths(graph: ir.Graph) -> dict[ir.Value, int]:
    """Which activations are known to be matrices with a row for each token, and their columns."""
    matrices = (
        v for v in graph.inputs if v.dtype == ir.DataType.FLOAT and dim(v, 1) and len(v.shape or ()) == 2
    )
    known = {value: dim(value, 1) for value in matrices}
    for node in graph:
        known |= {value: width for value, width in _made_rows(node, known).items() if width}
    return known


def _made_rows(node: ir.Node, known: dict[ir.Value, int]) -> dict[ir.Value, int]:
    """The outputs that are matrices with a row for each token, with their columns; 0: not known."""
    out = node.outputs[0]
    given = [known.get(value, 0) if value is not None else 0 for value in node.inputs]
    width = 0
    match node.op_type:
        case "Int4Linear" | "Int4GatedLinear" if given[0]:
            return dict(zip(node.outputs, widths_of(node), strict=True))
        case "GatherBlockQuantized" | "GatedAttention":
            width = dim(out, 1)
        case "Int4Experts" | "RMSNormalization":
            width = given[0]
        case "Gather" if attribute(node, "axis") == 0:
            width = given[0]
        case "Concat" if all(given):
            width = sum(given)
        case "Add" if given[0] == given[1]:
            width = given[0]
    return {out: width}


def _kind(node: ir.Node, known: dict[ir.Value, int]) -> int | None:
    width, x = known.get(node.outputs[0], 0), node.inputs[0]
    kind = None
    match node.op_type:
        case "Int4Linear" | "Int4GatedLinear" if x in known:
            return LINEAR if node.op_type == "Int4Linear" else GATED
        case "GatherBlockQuantized" if len(node.inputs) == 3:
            plain = {"bits": 8, "gather_axis": 0, "quantize_axis": 1}
            kind = EMBED if all(attribute(node, name, -1) == value for name, value in plain.items()) else None
        case "GatedAttention" if x in known:
            return ATTEND
        case "RMSNormalization" if attribute(node, "axis", -1) == -1:
            kind = NORM
        case "Gather" | "Add" | "Int4Experts":
            kind = {"Gather": ROWS, "Add": ADD, "Int4Experts": EXPERTS}[node.op_type]
    return kind if width and width % TILE == 0 else None


def _is_plain_gemm(node: ir.Node) -> bool:
    return (
        (node.domain, node.op_type) == ("", "Gemm")
        and len(node.inputs) == 2
        and {name: a.value for name, a in node.attributes.items()} == {"transB": 1}
        and node.inputs[1] is not None
        and node.inputs[1].is_initializer()
    )


def _experts(node: ir.Node) -> list[Step]:
    """With the sigmoid and the bias that stand before it, where nothing else uses those."""
    x, selection, scores = node.inputs[:3]
    assert x is not None
    assert selection is not None
    assert scores is not None
    biased, sigmoid = selection.producer(), scores.producer()
    if biased is None or sigmoid is None or (biased.op_type, sigmoid.op_type) != ("Add", "Sigmoid"):
        return []
    bias, logits = biased.inputs[1], sigmoid.inputs[0]
    ours = biased.inputs[0] is scores and len(scores.uses()) == 2 and len(selection.uses()) == 1
    if not ours or bias is None or not bias.is_initializer() or logits is None:
        return []
    if dim(bias, 0) % TILE:
        return []
    return [Step(EXPERTS, (x, logits), [sigmoid, biased, node], [node.outputs[0]])]
