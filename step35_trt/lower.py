"""From a trace to a program: segments and kernels as steps, their buffers placed, their costs counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from step35_trt.config import LayerSpec
from step35_trt.segments import Segment, cut
from step35_trt.sharing import ALONE
from step35_trt.signatures import Vector
from step35_trt.steps import (
    Buffer,
    CollectiveStep,
    Cost,
    GatedAttention,
    KernelStep,
    SegmentStep,
    SelectRows,
    SparseMoe,
    Step,
    StepProgram,
    WeightBinding,
)
from step35_trt.trace import COLLECTIVES, Call, Value, trace_decoder, trace_mtp

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.sharing import Sharing
    from step35_trt.steps import BufferDtype, Operation, Share
    from step35_trt.trace import Trace
    from step35_trt.weight_forms import Forms

ALIGNMENT = 256  # bytes: what tensor cores and copies like best


@dataclass(frozen=True)
class ModelPrograms:
    """A model's programs, the distinct segments that their steps name by key, and what weights they take."""

    decoder: StepProgram
    mtp: tuple[StepProgram, ...]
    segments: dict[str, Segment]
    forms: Forms

    @classmethod
    def of(cls, config: Step35Config, forms: Forms, sharing: Sharing = ALONE) -> ModelPrograms:
        """Trace and lower the decoder and every MTP module, for one rank of those that share the model.

        Raises:
            UnsupportedError: the model does not fit the types; the module and the line are named.
        """
        modules = range(config.num_nextn_predict_layers)
        traces = [trace_decoder(config, forms, sharing)]
        traces += [trace_mtp(config, forms, k, sharing) for k in modules]
        segments: dict[str, Segment] = {}
        for trace in traces:
            for part in cut(trace):
                if isinstance(part, Segment):
                    segments.setdefault(part.key(trace.forms), part)
        decoder, *mtp = map(lower, traces)
        return cls(decoder, tuple(mtp), segments, sharing.share(forms))

    @property
    def programs(self) -> tuple[StepProgram, ...]:
        """The decoder's and then the modules'."""
        return (self.decoder, *self.mtp)


def lower(trace: Trace) -> StepProgram:
    """The program of a trace."""
    parts = cut(trace)
    buffers = _Buffers(trace, len(parts))
    for i, part in enumerate(parts):
        reads, writes = _ports(part)
        for value in reads:
            buffers.last[value.index] = max(buffers.last[value.index], i)
        for call in writes:
            buffers.add(call, i)
    steps = tuple(_step(part, trace.forms, buffers.names) for part in parts)
    placed, arena = place(buffers.finished())
    return StepProgram(
        activation=trace.forms.activation,
        inputs={name: buffers.names[value.index] for name, value in trace.inputs.items()},
        outputs={name: buffers.names[value.index] for name, value in trace.outputs.items()},
        buffers=placed,
        steps=steps,
        arena=arena,
    )


def place(buffers: list[Buffer]) -> tuple[tuple[Buffer, ...], int]:
    """Give each buffer the lowest offset at which it overlaps none that is alive with it; largest first.

    Returns:
        The buffers, and the bytes they need together.
    """
    placed: dict[str, Buffer] = {}
    for buffer in sorted(buffers, key=lambda b: (-b.row_bytes, b.first)):
        taken = sorted(
            (other.offset, other.offset + _room(other))
            for other in placed.values()
            if other.first <= buffer.last and buffer.first <= other.last
        )
        offset = 0
        for start, end in taken:
            if offset + _room(buffer) <= start:
                break
            offset = max(offset, end)
        placed[buffer.name] = buffer.model_copy(update={"offset": offset})
    arena = max((b.offset + _room(b) for b in placed.values()), default=0)
    return tuple(placed[b.name] for b in buffers), arena


def _room(buffer: Buffer) -> int:
    return -(-buffer.row_bytes // ALIGNMENT) * ALIGNMENT


@dataclass
class _Buffers:
    """Values that exist between steps: what they are called and how long they live."""

    trace: Trace
    steps: int
    names: dict[int, str] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    _made: list[tuple[Value, str, int]] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name, value in self.trace.inputs.items():
            self._declare(value, name, "model", -1)

    def add(self, call: Call, step: int) -> None:
        """The result of a call, named after its weight or after its module and operation."""
        weight = next((a for a in call.arguments if isinstance(a, str) and a.endswith(".weight")), None)
        stem = weight.removesuffix(".weight") if weight else f"{call.site.path}.{call.word}"
        self._seen[stem] += 1
        name = stem if self._seen[stem] == 1 else f"{stem}.{self._seen[stem]}"
        self._declare(call.result, name, call.site.path, step)

    def finished(self) -> list[Buffer]:
        """All buffers, unplaced."""
        kept = {value.index for value in self.trace.outputs.values()}
        return [
            Buffer(
                name=self.names[value.index],
                value=self.trace.said[value.index],
                share=self._share(value),
                path=path,
                dtype=cast("BufferDtype", value.type.dtype),
                width=value.type.width,
                rows=value.type.rows,
                offset=0,
                first=first,
                last=self.steps if value.index in kept else self.last[value.index],
            )
            for value, path, first in self._made
        ]

    def _share(self, value: Value) -> Share:
        if value.index in self.trace.partial:
            return "summand"
        return "slice" if value.index in self.trace.sliced else "whole"

    def _declare(self, value: Value, name: str, path: str, step: int) -> None:
        self.names[value.index], self.last[value.index] = name, step
        self._made.append((value, path, step))


def _ports(part: Segment | Call) -> tuple[tuple[Value, ...], list[Call]]:
    """What a step reads, and the calls whose results it gives."""
    if isinstance(part, Call):
        return part.operands, [part]
    given = {value.index for value in part.outputs}
    return part.inputs, [call for call in part.calls if call.result.index in given]


def _step(part: Segment | Call, forms: Forms, names: dict[int, str]) -> Step:
    reads, writes = _ports(part)
    moved = sum(_row_bytes(v) for v in (*reads, *(call.result for call in writes)))
    if isinstance(part, Segment):
        return _segment(part, forms, names, moved)
    if part.word in COLLECTIVES:
        return CollectiveStep(
            name=f"{part.site.path}.{part.word}",
            operation=cast("Operation", part.word),
            input=names[part.operands[0].index],
            output=names[part.result.index],
            cost=Cost(token_bytes=moved),
        )
    return KernelStep(
        name=f"{part.site.path}.{part.word}",
        call=_kernel(part, forms),
        inputs=tuple(names[value.index] for value in part.operands),
        output=names[part.result.index],
        cost=_kernel_cost(part, forms, moved),
    )


def _segment(part: Segment, forms: Forms, names: dict[int, str], moved: int) -> SegmentStep:
    alias, weights = part.alias(), {}
    read = flops = looked_up = 0
    for name in part.matrices:
        form = forms(name)
        weights[alias[name]] = WeightBinding(weight=name, part="values")
        if form.scale_dtype is not None:
            weights[f"{alias[name]}.scales"] = WeightBinding(weight=name, part="scales")
    for vector in part.vectors:
        weights[alias[vector.name]] = WeightBinding(weight=vector.name, part="vector", plus=vector.plus)
        read += forms(vector.name).nbytes
    for call in part.calls:
        weight = next((a for a in call.arguments if isinstance(a, str)), None)
        if weight is None:
            continue
        form = forms(weight)
        if call.word == "embedding":
            looked_up += form.row_bytes
        else:
            read += form.nbytes
            flops += 2 * form.shape[0] * form.shape[1]
    return SegmentStep(
        name=part.path,
        engine=part.key(forms),
        inputs={f"x{i}": names[value.index] for i, value in enumerate(part.inputs)},
        outputs={f"y{i}": names[value.index] for i, value in enumerate(part.outputs)},
        weights=weights,
        cost=Cost(weight_bytes=read, token_bytes=moved + looked_up, token_flops=flops),
    )


def _kernel(call: Call, forms: Forms) -> GatedAttention | SparseMoe | SelectRows:
    if call.word == "gated_attention":
        *_, q_gamma, k_gamma, eps, layer = call.arguments
        assert isinstance(q_gamma, Vector)
        assert isinstance(k_gamma, Vector)
        assert isinstance(eps, float)
        assert isinstance(layer, LayerSpec)
        return GatedAttention(
            layer=layer.index,
            query_heads=layer.query_heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            window=layer.window,
            rope_theta=layer.rope_theta,
            rotary_dims=layer.rotary_dims,
            rope_scaling=layer.rope_scaling,
            eps=eps,
            q_gamma=q_gamma.name,
            k_gamma=k_gamma.name,
        )
    if call.word == "sparse_moe":
        *_, experts, top_k, scale, limit = call.arguments
        assert isinstance(experts, str)
        assert isinstance(top_k, int)
        assert isinstance(scale, float)
        assert isinstance(limit, float)
        gate = f"{experts}.gate_proj.weight"
        return SparseMoe(
            experts=experts,
            count=forms(f"{experts}.gate.weight").shape[0],
            held=forms.shapes[gate][0],
            top_k=top_k,
            scale=scale,
            limit=limit,
            coding=forms.coding(gate).kind,
        )
    return SelectRows()


def _kernel_cost(call: Call, forms: Forms, moved: int) -> Cost:
    kernel = _kernel(call, forms)
    if isinstance(kernel, GatedAttention):
        row = 2 * kernel.kv_heads * kernel.head_dim * (2 if forms.activation == "bfloat16" else 4)
        return Cost(
            token_bytes=moved + row,
            cache_bytes=row,
            pair_flops=4 * kernel.query_heads * kernel.head_dim,
            window=kernel.window,
        )
    if isinstance(kernel, SparseMoe):
        matrices = [forms(f"{kernel.experts}.{part}_proj.weight") for part in ("gate", "up", "down")]
        chosen = kernel.top_k * kernel.held / kernel.count
        products = sum(2 * form.shape[0] * form.shape[1] for form in matrices)
        return Cost(
            token_bytes=moved,
            token_flops=round(chosen * products),
            expert_bytes=sum(form.nbytes for form in matrices),
            experts=kernel.held,
            top_k=chosen,
        )
    return Cost(token_bytes=moved)


def _row_bytes(value: Value) -> int:
    return max(1, value.type.width) * {"bfloat16": 2, "float32": 4, "int64": 8}[value.type.dtype]
