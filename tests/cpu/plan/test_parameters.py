"""The parameter table of the specification (section 5), exactly, from the config alone."""

from __future__ import annotations

from step35_trt.config import Step35Config
from step35_trt.engine import EngineSpec
from step35_trt.plan.parameters import MTP_GROUPS, count_groups, parameters
from step35_trt.plan.plan import make_plan
from tests.cpu.test_config import published
from tests.synthetic import random_weights, raw_config

# Group: units and total. The router's row includes its bias, 12,096 in all.
TABLE = {
    "full attention": (12, 909_118_464),
    "window attention": (33, 3_611_697_408),
    "dense MLP": (3, 415_236_096),
    "routed experts": (42, 190_253_629_440),
    "shared expert": (42, 660_602_880),
    "router": (42, 49_545_216 + 12_096),
    "norms": (45, 372_736),
    "embedding": (1, 527_958_016),
    "head": (1, 527_958_016),
    "MTP body": (3, 3 * 281_432_320),
    "MTP head": (3, 3 * (809_390_336 - 281_432_320)),
}


def test_the_table(step35: Step35Config) -> None:
    counts = {c.group: (c.units, c.parameters) for c in count_groups(parameters(step35))}
    assert counts == TABLE


def test_the_sums(step35: Step35Config) -> None:
    every = parameters(step35)
    main = sum(p.count for p in every if p.group not in MTP_GROUPS)
    assert main == 196_956_130_368
    assert main - sum(p.count for p in every if p.group in ("embedding", "head")) == 195_900_214_336
    assert sum(p.count for p in every) == 199_384_301_376
    # 10,931,407,936 of the body, and the head.
    assert make_plan(step35, EngineSpec.load("h200-int4")).active_parameters == 10_931_407_936 + 527_958_016


def test_every_tensor_of_a_checkpoint_is_counted() -> None:
    config = Step35Config.parse(raw_config())
    stored = {name: weight.size for name, weight in random_weights(config).items()}
    assert {p.name: p.count for p in parameters(config)} == stored


def test_a_model_without_modules() -> None:
    short = {
        name: value[:45]
        for name, value in published().items()
        if isinstance(value, list) and len(value) == 48
    }
    config = Step35Config.parse(published() | short | {"num_nextn_predict_layers": 0})
    plan = make_plan(config, EngineSpec.load("h200-int4"))
    assert plan.parameter_count == sum(c.parameters for c in plan.parameters) == 196_956_130_368
    assert {speed.step.drafts for speed in plan.speeds} == {0}
