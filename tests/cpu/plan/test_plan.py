"""Plans of the shipped engines: they fit, and where a larger one does not, what is offered instead does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from step35_trt.engine import EngineSpec
from step35_trt.errors import UsageError
from step35_trt.plan.fitting import longest_context, most_sequences
from step35_trt.plan.plan import make_plan
from step35_trt.resources import known

if TYPE_CHECKING:
    from step35_trt.config import Step35Config

CONTEXT = 65536


@pytest.mark.parametrize("name", known("engines"))
def test_shipped_engines_fit(step35: Step35Config, name: str) -> None:
    plan = make_plan(step35, EngineSpec.load(name))
    assert plan.fits
    assert not plan.alternatives
    assert plan.memory.needed > 0.5 * plan.memory.capacity or name == "cpu-fp32"


def test_reach_is_the_edge(step35: Step35Config) -> None:
    plan = make_plan(step35, EngineSpec.load("h200-int4"))
    for reach in plan.reach:
        drafts = plan.limits.drafts
        assert plan.footprint.at(reach.context, reach.sequences, drafts).free >= 0
        assert plan.footprint.at(reach.context, reach.sequences + 1, drafts).free < 0
    longest = longest_context(plan.footprint, 8, 3)
    assert CONTEXT <= longest < 262144
    assert plan.footprint.at(longest, 8, 3).free >= 0 > plan.footprint.at(longest + 1, 8, 3).free
    assert most_sequences(plan.footprint, 262144, 3) < 8


def test_what_is_offered_fits(step35: Step35Config) -> None:
    """Each offer, taken literally, gives a plan that fits; one token or sequence more would not."""
    spec = EngineSpec.load("h200-int4").model_copy(update={"max_tokens": 262144})
    plan = make_plan(step35, spec)
    assert not plan.fits
    own = [text for text in plan.alternatives if text.startswith(f"{spec.name} with max")]
    assert len(own) == 2
    for offer in own:
        limits = {name: int(value) for name, value in re.findall(r"(max_\w+) (\d+)", offer)}
        assert make_plan(step35, spec.model_copy(update=limits)).fits
        tight = "max_tokens" if limits["max_sequences"] == 8 else "max_sequences"
        assert not make_plan(step35, spec.model_copy(update=limits | {tight: limits[tight] + 1})).fits
    others = [text.split(" on ")[0] for text in plan.alternatives if " on " in text]
    assert "h100x8-fp8" in others
    for name in others:
        update = {"max_tokens": 262144, "max_sequences": 8, "draft_tokens": 3}
        assert make_plan(step35, EngineSpec.load(name).model_copy(update=update)).fits


def test_modules_may_be_what_is_too_much(step35: Step35Config) -> None:
    spec = EngineSpec.load("dgx-spark-int4").model_copy(update={"draft_tokens": 3, "max_tokens": 1024})
    hardware = spec.hardware
    assert hardware is not None
    least = make_plan(step35, spec).footprint.at(1024, 1, 1).needed
    small = spec.model_copy(update={"hardware": hardware.model_copy(update={"memory": least})})
    plan = make_plan(step35, small)
    assert not plan.fits
    assert "dgx-spark-int4 with draft_tokens 1 and everything else as it is" in plan.alternatives


def test_bf16_fits_no_spark(step35: Step35Config) -> None:
    plan = make_plan(step35, EngineSpec.load("dgx-spark-int4").model_copy(update={"recipe": "bf16"}))
    assert not plan.fits
    assert not [text for text in plan.alternatives if text.startswith("dgx-spark-int4 with")]
    assert [r.sequences for r in plan.reach] == [0] * 5


def test_unified_memory_is_shared_with_the_system(step35: Step35Config) -> None:
    plan = make_plan(step35, EngineSpec.load("dgx-spark-int4"))
    lines = {item.what: item.nbytes for item in plan.memory.items}
    assert lines["page cache"] > 0
    assert lines["desktop"] > 0
    assert not {"page cache", "desktop"} & {
        item.what for item in make_plan(step35, EngineSpec.load("h200-int4")).memory.items
    }


def test_speeds_that_do_not_fit_say_so(step35: Step35Config) -> None:
    plan = make_plan(step35, EngineSpec.load("dgx-spark-int4"))
    assert {(s.step.sequences, s.step.drafts) for s in plan.speeds} == {
        (b, k) for b in (1, 8, 64) for k in range(4)
    }
    for speed in plan.speeds:
        step = speed.step
        assert speed.fits == (plan.footprint.at(step.context, step.sequences, step.drafts).free >= 0)
        assert speed.reachable == pytest.approx(step.tokens_per_second * 210 / 273)
    assert {s.fits for s in plan.speeds} == {True, False}


def test_acceptance_is_an_input(step35: Step35Config) -> None:
    spec = EngineSpec.load("h200-int4")
    never, always = (make_plan(step35, spec, [rate] * 3) for rate in (0.0, 1.0))
    for worse, better in zip(never.speeds, always.speeds, strict=True):
        ratio = better.step.tokens_per_second / worse.step.tokens_per_second
        assert ratio == pytest.approx(1 + worse.step.drafts)


def test_an_engine_without_hardware_cannot_be_planned(step35: Step35Config) -> None:
    with pytest.raises(UsageError, match="names no hardware"):
        make_plan(step35, EngineSpec(name="mine", summary="", target="cpu", recipe="fp32"))
