"""What devices can share, and the reason where they cannot (specification 8.5, 8.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.engine import EngineSpec
from step35_trt.errors import UnsupportedError
from step35_trt.plan.plan import make_plan
from step35_trt.plan.splits import attention_refusal, expert_refusal, width_refusal
from step35_trt.plan.weight_cost import BF16, FP8_BLOCKS, FP8_ROWS, INT4_128

if TYPE_CHECKING:
    from step35_trt.config import Step35Config


def test_blocks_of_experts() -> None:
    """Specification 8.5: with blocks of 128, 1280 can be shared by 1, 2, 5 and 10."""
    whole = [n for n in range(1, 17) if not width_refusal(1280, n, FP8_BLOCKS, FP8_BLOCKS)]
    assert whole == [1, 2, 5, 10]
    assert "1280 / 4 = 320 is no multiple of 128" in width_refusal(1280, 4, FP8_BLOCKS, FP8_BLOCKS)
    assert "1280 / 8 = 160 is no multiple of 128" in width_refusal(1280, 8, INT4_128, INT4_128)
    assert width_refusal(1280, 4, FP8_BLOCKS, FP8_BLOCKS).endswith(": deal out whole experts")
    assert width_refusal(1280, 4, INT4_128, INT4_128).endswith("whole experts, or use groups of 64")
    assert width_refusal(1280, 8, INT4_128, INT4_128).endswith("whole experts, or use groups of 32")
    # A scale for each whole row outlives any cut, and so does no scale.
    assert [n for n in range(1, 17) if not width_refusal(1280, n, FP8_ROWS, FP8_ROWS)] == [
        1,
        2,
        4,
        5,
        8,
        10,
        16,
    ]
    assert "does not divide" in width_refusal(1280, 3, BF16, BF16)


@given(st.integers(1, 4096), st.integers(1, 32))
def test_a_share_is_whole_blocks(width: int, ranks: int) -> None:
    allowed = not width_refusal(width, ranks, FP8_BLOCKS, FP8_BLOCKS)
    assert allowed == (width % (ranks * 128) == 0)


def test_heads(step35: Step35Config) -> None:
    """Specification 8.6: 1, 2, 4, 8; more would copy KV heads."""
    assert [n for n in range(1, 33) if not attention_refusal(step35, n)] == [1, 2, 4, 8]
    assert attention_refusal(step35, 3) == "64 query heads do not divide by 3"
    assert attention_refusal(step35, 64) == "96 query heads do not divide by 64"
    assert attention_refusal(step35, 5) == "64 and 96 query heads do not divide by 5"
    assert "16 ranks are more than the 8 KV heads" in attention_refusal(step35, 16)


def test_experts(step35: Step35Config) -> None:
    assert [n for n in range(1, 17) if not expert_refusal(step35, n)] == [1, 2, 3, 4, 6, 8, 9, 12, 16]


def test_a_plan_names_what_is_refused(step35: Step35Config) -> None:
    splits = make_plan(step35, EngineSpec.load("h100x8-fp8")).splits
    refused = {(s.part, s.way, s.ranks) for s in splits if s.refusal}
    assert {("routed experts in official FP8", "tensor", n) for n in (4, 8)} <= refused
    assert ("attention", "tensor", 16) in refused
    assert ("attention", "tensor", 8) not in refused
    assert ("routed experts", "expert", 8) not in refused


@pytest.mark.parametrize(
    ("recipe", "devices", "experts", "says"),
    [
        ("fp8-official", 8, "tensor", "1280 / 8 = 160"),
        ("fp8-official", 4, "tensor", "1280 / 4 = 320"),
        ("fp8", 16, "expert", "KV heads"),
        ("fp8", 5, "expert", "64 and 96 query heads"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(
    step35: Step35Config, recipe: str, devices: int, experts: str, says: str
) -> None:
    engine = EngineSpec.load("h100x8-fp8")
    ways = engine.parallelism.model_copy(update={"experts": experts})
    spec = engine.model_copy(update={"recipe": recipe, "devices": devices, "parallelism": ways})
    with pytest.raises(UnsupportedError) as caught:
        make_plan(step35, spec)
    assert says in caught.value.message
    assert caught.value.hint


def test_a_width_that_cannot_be_cut_is_copied(step35: Step35Config) -> None:
    """INT4 in groups of 128: four devices share attention and experts, the shared expert is on each."""
    spec = EngineSpec.load("h100x8-fp8").model_copy(update={"recipe": "int4-awq", "devices": 4})
    plan = make_plan(step35, spec)
    share = {w.group: w.on_device / w.nbytes for w in plan.weights}
    assert share["shared expert"] == 1
    assert share["routed experts"] == share["dense MLP"] == pytest.approx(0.25)
