"""Traces and their segments: types, origins, what is shared and what is live."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from step35_trt import model
from step35_trt.config import Step35Config
from step35_trt.errors import UnsupportedError
from step35_trt.resources import PUBLISHED
from step35_trt.segments import KERNELS, Segment, cut
from step35_trt.signatures import Type, Vector
from step35_trt.trace import Call, Trace, TraceOps, Value, trace_decoder, trace_mtp
from step35_trt.weight_forms import Forms
from tests.forms import forms
from tests.synthetic import raw_config

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = Step35Config.parse(raw_config())
FULL = Step35Config.load(PUBLISHED)


def test_calls_know_where_the_model_wrote_them() -> None:
    calls = trace_decoder(SMALL, forms(SMALL, "bf16")).calls
    source = open(model.__file__, encoding="utf-8").read().splitlines()  # noqa: SIM115
    routers = [call for call in calls if call.word == "linear_fp32"]
    assert [call.site.path for call in routers] == [f"model.layers.{i}.moe" for i in range(3, 9)]
    for call in calls:
        assert f"ops.{call.word}(" in source[call.site.line - 1]
    assert {call.site.path for call in calls if "lm_head.weight" in call.arguments} == {"model"}


def spoil_attention(ops: TraceOps) -> None:
    """The model with one operand of the wrong type: attention's gate has a logit for each feature."""
    linear = ops.linear

    def wrong(x: Value, weight: str) -> Value:
        return linear(x, weight.replace("layers.5.self_attn.g_proj", "layers.5.self_attn.q_proj"))

    object.__setattr__(ops, "linear", wrong)


def spoil_router(ops: TraceOps) -> None:
    """Scores in bf16."""
    linear = ops.linear
    object.__setattr__(ops, "linear_fp32", linear)


def spoil_norm(ops: TraceOps) -> None:
    """A weight of another width."""
    object.__setattr__(
        ops, "vector", lambda name: Vector(name.replace("input_layernorm", "self_attn.q_norm"))
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoil_attention,
            r"model\.layers\.5\.self_attn \(model\.py:\d+\): gated_attention: gate is bfloat16",
        ),
        (
            spoil_router,
            r"model\.layers\.3\.moe \(model\.py:\d+\): bias: x is bfloat16 \[tokens, 12\], float32",
        ),
        (
            spoil_norm,
            r"model\.layers\.0 \(model\.py:\d+\): rms_norm: the operand of model\.layers\.0\.self_attn",
        ),
    ],
)
def test_a_mismatch_names_module_and_line(spoil: Callable[[TraceOps], None], message: str) -> None:
    trace = Trace(forms(SMALL, "bf16"))
    ids, rows = trace.input("ids", Type("int64", 0, "tokens")), trace.input("rows", Type("int64", 0, "rows"))
    ops = TraceOps(trace)
    spoil(ops)
    with pytest.raises(UnsupportedError, match=message):
        model.decoder(ops, SMALL, ids, rows)


@pytest.mark.parametrize("module", [-1, 0, 2])
def test_segments_give_exactly_what_is_read_later(module: int) -> None:
    given = forms(SMALL, "bf16")
    trace = trace_decoder(SMALL, given) if module < 0 else trace_mtp(SMALL, given, module)
    parts = cut(trace)
    calls = [call for part in parts for call in (part.calls if isinstance(part, Segment) else (part,))]
    assert calls == trace.calls
    assert all(part.word in KERNELS for part in parts if isinstance(part, Call))
    assert not any(call.word in KERNELS for p in parts if isinstance(p, Segment) for call in p.calls)
    known = {value.index for value in trace.inputs.values()}
    reads: list[set[int]] = []
    for part in parts:
        inputs, outputs = (
            (part.inputs, part.outputs) if isinstance(part, Segment) else (part.operands, (part.result,))
        )
        reads.append({value.index for value in inputs})
        assert reads[-1] <= known
        known |= {value.index for value in outputs}
    wanted = {value.index for value in trace.outputs.values()}
    for i, part in enumerate(parts):
        for value in part.outputs if isinstance(part, Segment) else (part.result,):
            assert any(value.index in later for later in reads[i + 1 :]) or value.index in wanted


@pytest.mark.parametrize(("recipe", "most"), [("int4-awq", 12), ("fp8", 12), ("bf16", 12)])
def test_the_full_model_needs_about_a_dozen_engines(recipe: str, most: int) -> None:
    given = forms(FULL, recipe)
    traces = [trace_decoder(FULL, given), *(trace_mtp(FULL, given, k) for k in range(3))]
    keys = [part.key(given) for trace in traces for part in cut(trace) if isinstance(part, Segment)]
    assert len(keys) == 98
    assert len(set(keys)) <= most


def keys(config: Step35Config, given: Forms) -> list[str]:
    return [part.key(given) for part in cut(trace_decoder(config, given)) if isinstance(part, Segment)]


def test_what_differs_is_not_shared() -> None:
    """Layers with clamps, other heads, or weights of another form have engines of their own."""
    given = forms(SMALL, "bf16")
    segments = keys(SMALL, given)
    unclamped = Step35Config.parse(raw_config(swiglu_limits_shared=[0.0] * 12))
    same = [a == b for a, b in zip(segments, keys(unclamped, given), strict=True)]
    assert same.count(False) == 1  # the shared expert of the last layer
    one = "model.layers.5.self_attn.q_proj.weight"
    int4 = forms(SMALL, "int4-awq")
    mixed = Forms(given.shapes, lambda name: (int4 if name == one else given).coding(name), "bfloat16")
    changed = keys(SMALL, mixed)
    assert [i for i, (a, b) in enumerate(zip(segments, changed, strict=True)) if a != b] == [
        i for i, part in enumerate(s for s in cut(trace_decoder(SMALL, given)) if isinstance(s, Segment))
        if one in part.matrices
    ]  # fmt: skip


def test_an_alias_is_given_once() -> None:
    for part in cut(trace_decoder(SMALL, forms(SMALL, "bf16"))):
        if isinstance(part, Segment):
            names = part.alias()
            assert len(set(names.values())) == len(names) == len(part.matrices) + len(part.vectors)
