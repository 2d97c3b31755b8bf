"""Step by step against the definition: right programs pass, a broken layer is named, rounding is forgiven."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from step35_trt.interpret.ranks import RankedSession
from step35_trt.interpret.verify import compare_steps, routing_flips
from step35_trt.resources import NANO
from step35_trt.steps import GatedAttention, KernelStep, SegmentStep, StepProgram, WeightBinding
from tests.forms import RECIPES, interpreted
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from step35_trt.interpret.session import InterpretedSession
    from step35_trt.interpret.weights import FormedWeights


def calls(session: InterpretedSession, *lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, session.config.vocab_size, length) for length in lengths]


@cache
def nano(recipe: str) -> InterpretedSession:
    return interpreted(NANO, recipe)


@pytest.mark.parametrize("recipe", ["fp32", *RECIPES])
def test_nano_passes(recipe: str) -> None:
    """Prefill beyond the window, single tokens, and drafts to verify: 1e-5 in fp32, 1e-3 in bf16."""
    session = nano(recipe)
    comparison = compare_steps(
        RankedSession.alone(session), session.executor.weights, calls(session, 72, 1, 4)
    )
    assert comparison.first_off is None
    assert {finding.graph for finding in comparison.findings} == {"decoder", "mtp-0", "mtp-1", "mtp-2"}
    programs = [session.decoder, *session.mtp]
    assert len(comparison.findings) == sum(len(p.buffers) - len(p.inputs) for p in programs)
    assert comparison.worst.error < (1e-5 if recipe == "fp32" else 1e-3)


@dataclass(frozen=True)
class Spoiled:
    """Weights that an engine is bound to, one of them changed."""

    weights: FormedWeights
    name: str
    change: Callable[[np.ndarray], np.ndarray]

    def bound(self, binding: WeightBinding) -> np.ndarray:
        values = self.weights.bound(binding)
        return self.change(values) if binding.weight == self.name else values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weights, name)


def with_weight(
    session: InterpretedSession, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> InterpretedSession:
    weights = Spoiled(session.executor.weights, name, change)
    return replace(session, executor=replace(session.executor, weights=weights))


def with_steps(
    session: InterpretedSession, change: Callable[[KernelStep | SegmentStep], KernelStep | SegmentStep]
) -> InterpretedSession:
    def changed(program: StepProgram) -> StepProgram:
        steps = tuple(change(step) for step in program.steps)  # type: ignore[arg-type]
        return program.model_copy(update={"steps": steps})

    return replace(session, decoder=changed(session.decoder), mtp=tuple(map(changed, session.mtp)))


def widen_window(layer: int) -> Callable[[KernelStep | SegmentStep], KernelStep | SegmentStep]:
    def change(step: KernelStep | SegmentStep) -> KernelStep | SegmentStep:
        if (
            isinstance(step, KernelStep)
            and isinstance(step.call, GatedAttention)
            and step.call.layer == layer
        ):
            return step.model_copy(
                update={"call": step.call.model_copy(update={"window": step.call.window + 1})}
            )
        return step

    return change


def swap_keys_and_values(step: KernelStep | SegmentStep) -> KernelStep | SegmentStep:
    if isinstance(step, KernelStep) and step.name == "model.layers.4.self_attn.gated_attention":
        q, k, v, gate = step.inputs
        return step.model_copy(update={"inputs": (q, v, k, gate)})
    return step


def forget_the_one(step: KernelStep | SegmentStep) -> KernelStep | SegmentStep:
    """A norm whose stored weight is taken as it is."""
    name = "model.layers.7.post_attention_layernorm.weight"
    if not isinstance(step, SegmentStep):
        return step
    weights = {
        key: binding.model_copy(update={"plus": 0.0}) if binding.weight == name else binding
        for key, binding in step.weights.items()
    }
    return step.model_copy(update={"weights": weights})


def transpose(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weight.T)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full layers' q and o projections are square: a transposed one fits."""
    raw = raw_config(hidden_size=128, heads=(8, 12), head_dim=16)
    return write_checkpoint(tmp_path_factory.mktemp("square") / "checkpoint", raw)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("broken", "graph", "path", "name"),
    [
        (
            lambda s: with_weight(s, "model.layers.4.self_attn.q_proj.weight", transpose),
            "decoder",
            "model.layers.4.self_attn",
            "q_proj",
        ),
        (
            lambda s: with_weight(s, "model.layers.8.self_attn.o_proj.weight", transpose),
            "decoder",
            "model.layers.8",
            "add",
        ),
        (lambda s: with_steps(s, widen_window(5)), "decoder", "model.layers.5.self_attn", "gated_attention"),
        (lambda s: with_steps(s, widen_window(10)), "mtp-1", "model.layers.10.self_attn", "gated_attention"),
        (
            lambda s: with_steps(s, swap_keys_and_values),
            "decoder",
            "model.layers.4.self_attn",
            "gated_attention",
        ),
        (lambda s: with_steps(s, forget_the_one), "decoder", "model.layers.7", "rms_norm"),
        (
            lambda s: with_weight(s, "model.layers.6.moe.router_bias", np.negative),
            "decoder",
            "model.layers.6.moe",
            "bias",
        ),
    ],
    ids=["transposed-q", "transposed-o", "window", "window-mtp", "swapped", "plus-one", "router-bias"],
)
def test_a_broken_layer_is_named(
    square: Path,
    recipe: str,
    broken: Callable[[InterpretedSession], InterpretedSession],
    graph: str,
    path: str,
    name: str,
) -> None:
    session = interpreted(square, recipe)
    comparison = compare_steps(
        RankedSession.alone(broken(session)), session.executor.weights, calls(session, 20, 4)
    )
    found = comparison.first_off
    assert found is not None
    assert (found.graph, found.path) == (graph, path)
    assert name in found.name
    # Nothing else is blamed but what the same step gives.
    others = {finding.path for finding in comparison.findings if not finding.passed}
    assert all(other.startswith(path.removesuffix(".self_attn").removesuffix(".moe")) for other in others)


def test_a_wrong_choice_of_experts_counts_by_its_margin() -> None:
    wanted = np.array([[0.9, 0.5, 0.49, 0.1]] * 3, np.float32)
    made = wanted.copy()
    made[1, 1:3] = 0.49, 0.5  # a turn of 0.01
    made[2, [1, 3]] = 0.1, 0.5  # one of 0.4
    turned, counted = routing_flips(made, wanted, 2, np.full(3, 0.02, np.float32))
    assert turned.tolist() == [False, True, True]
    assert counted.tolist() == [False, False, True]
    _, strict = routing_flips(made, wanted, 2, np.full(3, 0.005, np.float32))
    assert strict.tolist() == [False, True, True]


def test_a_nan_does_not_pass() -> None:
    session = nano("bf16")
    broken = with_weight(
        session, "model.layers.2.self_attn.g_proj.weight", lambda values: np.full_like(values, np.nan)
    )
    found = compare_steps(RankedSession.alone(broken), session.executor.weights, calls(session, 4)).first_off
    assert found is not None
    assert found.name == "model.layers.2.self_attn.g_proj"
