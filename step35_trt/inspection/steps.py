"""What a GPU bundle executes: a table of distinct steps, and the order they run in as a line.

Times are at the roofline of the engine's hardware: bytes at its published bandwidth or operations at its
published rate, whichever takes longer. Nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.pages.table import Table, several

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from step35_trt.hardware import Arithmetic, Hardware
    from step35_trt.program import SteppedProgram
    from step35_trt.steps import Buffer, Step, StepProgram

CONTEXT = 8192  # cached positions that a call is reckoned with
LETTERS = {"segment": "S", "gated_attention": "A", "sparse_moe": "M", "rows": "R", "collective": "C"}


@dataclass(frozen=True)
class Row:
    """A step with its cost in one call.

    Attributes:
        code: What drawings call it; equal for steps that run the same code on weights of the same forms.
        graph: 'decoder' or 'mtp-k'.
        name: Of the step.
        layer: Of the model; None for what lies outside the layers.
        kind: 'segment', a plugin, or a collective.
        shape: Of what it takes and gives.
        bytes: Read and written.
        flops: Multiply-adds, twice.
        seconds: At the roofline.
    """

    code: str
    graph: str
    name: str
    layer: int | None
    kind: str
    shape: str
    bytes: float
    flops: float
    seconds: float


def rows(program: SteppedProgram, hardware: Hardware, tokens: int, context: int) -> list[Row]:
    """Every step in order, for one sequence of `tokens` tokens with `context` positions cached."""
    codes: dict[str, str] = {}
    counts: dict[str, int] = {}
    found = []
    for graph, part in graphs(program):
        buffers = {buffer.name: buffer for buffer in part.buffers}
        for step in part.steps:
            kind, identity = _identity(step)
            if identity not in codes:
                letter = LETTERS.get(kind, LETTERS["collective"])
                counts[letter] = counts.get(letter, 0) + 1
                codes[identity] = f"{letter}{counts[letter]}"
            moved, work = step.cost.bytes(tokens, context), step.cost.flops(tokens, context)
            seconds = max(moved / hardware.bandwidth, work / _rate(hardware)[1])
            shape = _shape(step, buffers)
            row = Row(codes[identity], graph, step.name, _layer(step), kind, shape, moved, work, seconds)
            found.append(row)
    return found


def table(found: Sequence[Row], hardware: Hardware, tokens: int, context: int) -> Table:
    """Distinct steps, each with how often it runs and what all its runs cost."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(row.code, []).append(row)
    lines = []
    for code, same in groups.items():
        first = same[0]
        words = f"{code} {place(first)}", first.kind, str(len(same))
        lines.append((*words, *_figures(same), first.shape))
    lines.append(("all", "", str(len(found)), *_figures(found), ""))
    kind, rate = _rate(hardware)
    return Table(
        f"steps, decoder and all MTP modules: {call(tokens, context)}",
        ("step", "kind", "runs", "MB", "MFLOP", "µs at the roofline", "shape"),
        tuple(lines),
        f"projected: {hardware.name}, {hardware.bandwidth / 1e9:.0f} GB/s, "
        f"{rate / 1e12:.3g} TFLOP/s in {kind}; a step is named after its first run",
    )


def _rate(hardware: Hardware) -> tuple[Arithmetic, float]:
    """What products run at: in bf16, or in fp32 on a CPU without it."""
    kind: Arithmetic = "bf16" if "bf16" in hardware.operations else "fp32"
    return kind, hardware.operations[kind]


def call(tokens: int, context: int) -> str:
    """A call of one sequence, in words."""
    return f"{several(tokens, 'token')} after {context} positions"


def drawing(found: Sequence[Row], program: SteppedProgram) -> list[str]:
    """One line a graph: inputs, the steps' codes in order with what repeats drawn once, outputs."""
    lines = []
    for graph, part in graphs(program):
        codes = folded([row.code for row in found if row.graph == graph])
        lines.append(f"{graph}: {', '.join(part.inputs)} → {codes} → {', '.join(part.outputs)}")
    return lines


def folded(codes: Sequence[str]) -> str:
    """A sequence in one line; what follows itself is written once with a count: `S1 (A1 S2)x3 R1`."""
    parts, start = [], 0
    while start < len(codes):
        size, times = max(_repeats(codes, start), key=lambda found: found[0] * (found[1] - 1))
        text = " ".join(codes[start : start + size])
        parts.append(text if times == 1 else f"({text})x{times}" if size > 1 else f"{text}x{times}")
        start += size * times
    return " ".join(parts)


def _repeats(codes: Sequence[str], start: int) -> Iterator[tuple[int, int]]:
    """Lengths of patterns that begin here, and how often each follows itself; a single one first."""
    yield 1, 1
    for size in range(1, (len(codes) - start) // 2 + 1):
        pattern, times = codes[start : start + size], 1
        while codes[start + size * times : start + size * (times + 1)] == pattern:
            times += 1
        yield size, times


def graphs(program: SteppedProgram) -> list[tuple[str, StepProgram]]:
    """The decoder and the modules by the names that reports use."""
    return [("decoder", program.decoder), *((f"mtp-{k}", part) for k, part in enumerate(program.mtp))]


def _identity(step: Step) -> tuple[str, str]:
    """A step's kind, and what tells it from steps that run other code."""
    if step.kind == "segment":
        return "segment", step.engine
    if step.kind == "collective":
        return step.operation, step.operation
    own = {"layer", "q_gamma", "k_gamma", "experts"}
    return step.call.plugin, step.call.model_dump_json(exclude=own)


def _shape(step: Step, buffers: dict[str, Buffer]) -> str:
    if step.kind == "segment":
        given, made = (
            ", ".join(str(buffers[name].width or 1) for name in ports.values())
            for ports in (step.inputs, step.outputs)
        )
        return f"{given} → {made}"
    if step.kind == "collective":
        return str(buffers[step.input].width)
    call = step.call
    if call.plugin == "gated_attention":
        seen = f"window {call.window}" if call.window else "all keys"
        return f"{call.query_heads}:{call.kv_heads} heads of {call.head_dim}, {seen}"
    if call.plugin == "sparse_moe":
        return f"{call.held} experts in {call.coding}, {call.top_k} a token"
    return str(buffers[step.output].width)


def _layer(step: Step) -> int | None:
    parts = step.name.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else None


def place(row: Row) -> str:
    """Where in the model it is, without what its kind says already."""
    return row.name.removeprefix("model.").removesuffix(f".{row.kind}")


def _figures(found: Sequence[Row]) -> tuple[str, str, str]:
    moved, work = sum(row.bytes for row in found), sum(row.flops for row in found)
    seconds = sum(row.seconds for row in found)
    return f"{moved / 1e6:,.2f}", f"{work / 1e6:,.1f}", f"{seconds * 1e6:,.1f}"
