"""Programs: buffers that never collide, costs that add up, and a form that survives JSON."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.checkpoint import expected_tensors
from step35_trt.config import Step35Config
from step35_trt.lower import lower, place
from step35_trt.resources import PUBLISHED
from step35_trt.steps import Buffer, Cost, StepProgram
from step35_trt.trace import trace_decoder, trace_mtp
from tests.forms import forms
from tests.synthetic import raw_config

SMALL = Step35Config.parse(raw_config())
FULL = Step35Config.load(PUBLISHED)


def buffer(name: str, width: int, first: int, last: int) -> Buffer:
    return Buffer(
        name=name,
        value=0,
        path="model",
        dtype="bfloat16",
        width=width,
        rows="tokens",
        offset=0,
        first=first,
        last=last,
    )


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(-1, 20), st.integers(0, 8)), max_size=30))
def test_buffers_that_live_together_lie_apart(lives: list[tuple[int, int, int]]) -> None:
    buffers = [buffer(str(i), width, first, first + n) for i, (width, first, n) in enumerate(lives)]
    placed, arena = place(buffers)
    assert [b.name for b in placed] == [b.name for b in buffers]
    for i, a in enumerate(placed):
        assert a.offset % 256 == 0
        assert a.offset + a.row_bytes <= arena
        for b in placed[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert a.offset + a.row_bytes <= b.offset or b.offset + b.row_bytes <= a.offset
    together = max(
        (sum(b.row_bytes for b in placed if b.first <= t <= b.last) for t in range(-1, 30)), default=0
    )
    assert together <= arena


def test_memory_is_shared() -> None:
    """The whole decoder needs little more than its widest moment."""
    program = lower(trace_decoder(FULL, forms(FULL, "bf16")))
    widest = max(
        sum(b.row_bytes for b in program.buffers if b.first <= t <= b.last) for t in range(len(program.steps))
    )
    assert widest <= program.arena < 1.05 * widest
    assert program.arena < sum(b.row_bytes for b in program.buffers) / 5


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["small", "full"])
def test_every_weight_is_counted_once(config: Step35Config) -> None:
    """Read in every call, looked up by row, or an expert's: together all that the checkpoint holds."""
    given_forms = forms(config, "bf16")
    program = lower(trace_decoder(config, given_forms))
    dense = sum(step.cost.weight_bytes for step in program.steps)
    experts = sum(step.cost.expert_bytes * step.cost.experts for step in program.steps)
    modules = tuple(layer.prefix + "." for layer in config.mtp_layers)
    # Attention's own gammas belong to its kernel.
    outside = ("embed_tokens.weight", "q_norm.weight", "k_norm.weight")
    want = sum(
        math.prod(shape) * (4 if len(shape) == 1 or name.endswith("moe.gate.weight") else 2)
        for name, shape in expected_tensors(config).items()
        if not name.startswith(modules) and not name.endswith(outside)
    )  # fmt: skip
    assert dense + experts == want


def test_costs_of_the_full_model() -> None:
    """Two operations for each parameter that is active for a token."""
    program = lower(trace_decoder(FULL, forms(FULL, "bf16")))
    flops = sum(step.cost.token_flops for step in program.steps)
    assert 2 * 10.5e9 < flops < 2 * 11.5e9
    full, window = (
        next(
            s
            for s in program.steps
            if s.kind == "kernel" and s.name.startswith(f"model.layers.{i}.self_attn")
        )
        for i in (0, 1)
    )
    assert full.cost.cache_bytes == window.cost.cache_bytes == 2 * 8 * 128 * 2
    assert window.cost.window == 512
    assert full.cost.flops(1, 10_000) == 10_000 * 4 * 64 * 128
    assert window.cost.flops(1, 10_000) == 512 * 4 * 96 * 128


def test_a_call_reads_each_chosen_expert_once() -> None:
    cost = Cost(weight_bytes=5, token_bytes=2, expert_bytes=10, experts=8, top_k=2)
    assert cost.bytes(1, 0) == pytest.approx(5 + 2 + 2 * 10)
    assert cost.bytes(1000, 0) == pytest.approx(5 + 2000 + 8 * 10)
    assert cost.bytes(2, 0) == pytest.approx(5 + 4 + 10 * 8 * (1 - 0.75**2))


def test_steps_read_what_was_written() -> None:
    for trace in (trace_decoder(SMALL, forms(SMALL, "bf16")), trace_mtp(SMALL, forms(SMALL, "bf16"), 1)):
        program = lower(trace)
        assert StepProgram.model_validate_json(program.model_dump_json()) == program
        buffers = {b.name: b for b in program.buffers}
        assert len(buffers) == len(program.buffers)
        known = set(program.inputs.values())
        for i, step in enumerate(program.steps):
            reads = step.inputs.values() if step.kind == "segment" else (
                step.inputs if step.kind == "kernel" else (step.input,)
            )  # fmt: skip
            assert set(reads) <= known
            assert all(buffers[name].first < i <= buffers[name].last for name in reads)
            writes = set(step.outputs.values()) if step.kind == "segment" else {step.output}
            assert all(buffers[name].first == i for name in writes)
            known |= writes
        assert set(program.outputs.values()) <= known
        assert all(buffers[name].last == len(program.steps) for name in program.outputs.values())
